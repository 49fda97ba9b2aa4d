"""A small SD3 as the trainer's tests use it, its text encoders left out."""

from __future__ import annotations

import torch

from flowdppo_fast.trainer import FlowDPPOTrainer

ROWS, STEPS, TOKENS = 16, 3, 5


def sd3_settings(**sections):
    """Settings of the small SD3: 16 rows and 3 steps of 4 x 8 x 8 latents without guidance."""
    sampling = {"pipeline_kwargs": {"height": 8, "width": 8, "guidance_scale": 1.0}, "noise": "seeded"}
    return {**sections, "sampling": {**sampling, **sections.get("sampling", {})}}


def sd3_prompts(pipes, tokens=TOKENS):
    torch.manual_seed(0)
    return [{"prompt_embeds": torch.randn(tokens, 16), "pooled_prompt_embeds": torch.randn(16)} for _ in range(2)]


def bright(images, prompts, metadata):
    return images.mean((1, 2, 3))


def sd3_trainer(pipes, small_config, **sections):
    config = small_config(**sd3_settings(run={"row_log": False}, **sections))
    return FlowDPPOTrainer(pipes.sd3(), bright, sd3_prompts(pipes), config)
