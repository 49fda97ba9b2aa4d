"""Fine-tune Stable Diffusion 3, FLUX.1 or Wan (video) with Flow-DPPO until what they draw is brighter.

    python examples/finetune.py --architecture sd3        # or flux, wan: a tiny random model, seconds on a CPU
    python examples/finetune.py --architecture sd3 --model stabilityai/stable-diffusion-3.5-medium
    python examples/finetune.py --architecture flux --model black-forest-labs/FLUX.1-dev
    python examples/finetune.py --architecture wan --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers
    accelerate launch --config_file examples/accelerate/ddp.yaml --num_processes 2 examples/finetune.py

The trainer runs the pipeline's own call, so an architecture is no more than the arguments of that call. A second start
with the same ``--output`` continues from the last checkpoint.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tiny_models
import torch
from diffusers import DiffusionPipeline

from flowdppo_fast.trainer import FlowDPPOConfig, FlowDPPOTrainer

PROMPTS = ["a leopard", "a heron", "a boat", "a violin", "a lighthouse", "two robots", "a tram", "a fox"]
HELD_OUT = ["a windmill", "a kite", "a skater", "a balloon"]

# no guidance, the scale that FLUX.1's transformer takes as an input, and guidance from two calls per step
ARGUMENTS: dict[str, dict[str, Any]] = {
    "sd3": {"guidance_scale": 1.0},
    "flux": {"guidance_scale": 3.5},
    "wan": {"guidance_scale": 4.5, "num_frames": 5},
}


def brightness(images: torch.Tensor, prompts: Sequence[str], metadata: Sequence[dict]) -> torch.Tensor:
    """The mean pixel, in [0, 1], of each image ``[C, H, W]`` or video ``[F, C, H, W]``."""
    return images.flatten(1).mean(1)


def settings(call: dict[str, Any], iterations: int, output: str, *, tiny: bool) -> FlowDPPOConfig:
    sections = {
        "model": {"train": "lora", "lora_rank": 8},
        # 4 prompts x 8 images per rollout; the first half of the 8 steps draws noise and is trained
        "sampling": {"num_steps": 8, "prompts_per_rollout": 4, "group_size": 8, "pipeline_kwargs": call},
        # rows whose KL is beyond this and that move further away are dropped
        "objective": {"name": "dppo", "threshold": 1e-3},
        # before the first update after a rollout every ratio is 1: it takes two for the bound to have something to do
        "optimizer": {"learning_rate": 2e-2, "updates_per_rollout": 2, "micro_batch_size": 16},
        # held-out prompts, before the first iteration and after the last
        "evaluation": {"every": iterations, "images_per_prompt": 2},
        "run": {"iterations": iterations, "output_dir": output, "project": "finetune"},
    }
    sections["run"]["device"] = "auto" if torch.cuda.is_available() else "cpu"
    if not tiny:
        # as in examples/configs, where there are settings for whole runs
        sections["model"] |= {"lora_rank": 32, "mixed_precision": "bf16", "gradient_checkpointing": True}
        sections["sampling"]["batch_size"] = 4
        sections["objective"]["threshold"] = 1e-5
        sections["optimizer"] |= {"learning_rate": 3e-4, "micro_batch_size": 1}
    return FlowDPPOConfig.from_dict(sections)


def main(arguments: Sequence[str] | None = None) -> list[dict[str, float]]:
    """Runs the example; returns the metrics of each iteration."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--architecture", choices=ARGUMENTS, default="sd3")
    parser.add_argument("--model", help="name on the Hub or folder of released weights (default: a tiny random model)")
    parser.add_argument("--size", type=int, help="height and width in pixels (default: 32, with --model 512)")
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--output", help="folder of the run (default: runs/finetune-ARCHITECTURE)")
    args = parser.parse_args(arguments)
    tiny = args.model is None
    folder = Path(args.output or f"runs/finetune-{args.architecture}")

    if tiny:
        # matrices this small are slower on several
        torch.set_num_threads(1)
        pipeline = getattr(tiny_models, args.architecture)()
    else:
        pipeline = DiffusionPipeline.from_pretrained(args.model, torch_dtype=torch.bfloat16, use_safetensors=True)
    size = args.size or (32 if tiny else 512)
    call = {**ARGUMENTS[args.architecture], "height": size, "width": size}
    if tiny:
        call["max_sequence_length"] = 24
    config = settings(call, args.iterations, str(folder), tiny=tiny)
    trainer = FlowDPPOTrainer(pipeline, brightness, PROMPTS, config, eval_prompts=HELD_OUT)
    history = trainer.train(resume=True)
    trainer.save_pretrained(folder / "final")

    if trainer.accelerator.is_main_process:
        before, after = history[0]["eval/reward"], history[-1]["eval_final/reward"]
        print(f"brightness of held-out prompts: {before:.4f} before, {after:.4f} after {len(history)} iterations")
        print(f"rows dropped by the bound: {sum(m['masked_fraction'] for m in history) / len(history):.1%}")
        print(*(folder / name for name in ("metrics.png", "images", "final")), sep="\n")
    return history


if __name__ == "__main__":
    main()
