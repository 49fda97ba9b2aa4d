"""A reward of one's own: several named numbers per image, their weights, and what held-out prompts say.

    python examples/custom_reward.py

A reward is any callable ``(images, prompts, metadata)``. The trainer logs each name, adds them up by
``advantage.reward_weights``, and compares the images of one prompt with each other. The model is a tiny random one
(``tiny_models.py``); ``finetune.py`` shows what changes for released weights.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tiny_models
import torch
from torch import Tensor

from flowdppo_fast.trainer import FlowDPPOConfig, FlowDPPOTrainer
from flowdppo_fast.trainer.rewards import JPEGCompressibility

# what stands under "metadata" goes to the reward and not to the pipeline
PROMPTS = [
    {"prompt": "a lighthouse by day", "metadata": {"brightness": 0.75}},
    {"prompt": "a tram by day", "metadata": {"brightness": 0.75}},
    {"prompt": "a lighthouse at dusk", "metadata": {"brightness": 0.6}},
    {"prompt": "a tram at dusk", "metadata": {"brightness": 0.6}},
]
HELD_OUT = [
    {"prompt": "a heron by day", "metadata": {"brightness": 0.75}},
    {"prompt": "a heron at dusk", "metadata": {"brightness": 0.6}},
]
# 0: logged and not trained on
WEIGHTS = {"warm": 1.0, "as bright as asked": 0.5, "kB": 0.0}


class Look:
    """Warm colours, the brightness that the prompt's metadata asks for, and minus the size as a JPEG file."""

    def __init__(self) -> None:
        # built-in rewards are callables like this one
        self.jpeg = JPEGCompressibility()

    def __call__(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> dict[str, Tensor]:
        """Numbers ``[B]`` by name, of images ``[B, 3, H, W]`` in [0, 1]; the larger the better."""
        asked = torch.tensor([entry["brightness"] for entry in metadata], device=images.device)
        return {
            "warm": (images[:, 0] - images[:, 2]).mean((1, 2)),
            "as bright as asked": -(images.mean((1, 2, 3)) - asked).abs(),
            "kB": self.jpeg(images, prompts),
        }


def main(arguments: Sequence[str] | None = None) -> list[dict[str, float]]:
    """Runs the example; returns the metrics of each iteration."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--output", default="runs/custom_reward", help="folder of the run")
    args = parser.parse_args(arguments)
    call = {"height": 32, "width": 32, "guidance_scale": 1.0, "max_sequence_length": 24}
    config = FlowDPPOConfig.from_dict(
        {
            "model": {"train": "lora", "lora_rank": 8},
            "sampling": {"num_steps": 8, "prompts_per_rollout": 4, "group_size": 8, "pipeline_kwargs": call},
            # per_reward: each name is brought to the same scale before it is weighted
            "advantage": {"reward_weights": WEIGHTS, "per_reward": True},
            "objective": {"threshold": 1e-3},
            "optimizer": {"learning_rate": 2e-2, "updates_per_rollout": 2, "micro_batch_size": 16},
            # the same seeds each time, no noise
            "evaluation": {"every": 5, "images_per_prompt": 8},
            "run": {"iterations": args.iterations, "output_dir": args.output, "device": "cpu"},
        }
    )
    trainer = FlowDPPOTrainer(tiny_models.sd3(), Look(), PROMPTS, config, eval_prompts=HELD_OUT)
    history = trainer.train(resume=True)

    print(f"{'held-out prompts':<20} {'before':>8} {'after':>8}")
    for name in WEIGHTS:
        before, after = history[0][f"eval/{name}"], history[-1][f"eval_final/{name}"]
        print(f"{name:<20} {before:8.4f} {after:8.4f}")
    print(Path(args.output) / "metrics.png")
    return history


if __name__ == "__main__":
    # matrices this small are slower on several
    torch.set_num_threads(1)
    main()
