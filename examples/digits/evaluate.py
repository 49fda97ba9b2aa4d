"""Measure the digits model: who reads its samples as the asked digit, what the rewards are, how long sampling takes.

    OMP_NUM_THREADS=1 python examples/digits/evaluate.py --grid digits.png

needs ``flowdppo_fast`` installed with the ``trainer`` extra (for the stochastic sampler) and scikit-learn. A support
vector machine, which had no part in making the model or its rewards, reads the samples beside the judge.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from judge import Judge
from PIL import Image
from pipeline import DigitsPipeline
from pretrain import load_images, split
from rewards import BoldReward, ReadableReward, SlantReward
from sklearn.svm import SVC

from flowdppo_fast.trainer import FlowMatchSDEScheduler


def save_grid(images: torch.Tensor, columns: int, path: Path, zoom: int = 4) -> None:
    """Write ``[B, 1, H, W]`` images in [0, 1] as one PNG, ``columns`` to a row."""
    tiles = F.pad(images[:, 0], (1, 1, 1, 1), value=0.3).unflatten(0, (-1, columns))
    page = (tiles.transpose(1, 2).flatten(2, 3).flatten(0, 1) * 255).round().byte()
    picture = Image.fromarray(page.cpu().numpy())
    picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.BICUBIC).save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the digits model.")
    parser.add_argument("--checkpoint", type=Path, default=Path(__file__).parent / "checkpoint")
    parser.add_argument("--per-digit", type=int, default=100, help="samples of each digit")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--eta", type=float, default=0.7, help="noise level of the stochastic sampler")
    parser.add_argument("--grid", type=Path, help="PNG with ten samples of each digit per sampler")
    args = parser.parse_args()

    images, labels = load_images()
    train, held_out = split(len(images))
    judge = Judge.from_pretrained(args.checkpoint)
    svm = SVC().fit(images[train].flatten(1).numpy(), labels[train].numpy())
    rewards = {"readable": ReadableReward(judge), "bold": BoldReward(), "slant": SlantReward()}

    def report(name: str, pages: torch.Tensor, asked: torch.Tensor) -> None:
        prompts = [str(int(digit)) for digit in asked]
        read = judge(pages).argmax(1) == asked
        worst = min((read[asked == digit].float().mean().item(), digit) for digit in range(10))
        independent = torch.from_numpy(svm.predict(pages.flatten(1).numpy())) == asked
        scores = "  ".join(f"{key} {reward(pages, prompts).mean():.3f}" for key, reward in rewards.items())
        print(
            f"{name:<24} judge {read.float().mean():.1%} (worst {worst[1]}: {worst[0]:.1%})  "
            f"svm {independent.float().mean():.1%}  {scores}"
        )

    report("held-out digits", images[held_out], labels[held_out])

    pipeline = DigitsPipeline.from_pretrained(args.checkpoint)
    pipeline.set_progress_bar_config(disable=True)
    ode = pipeline.scheduler
    sde = FlowMatchSDEScheduler.from_config(
        ode, sampler="flow_sde", eta=args.eta, sde_steps=range(args.steps - 1), seed=0
    )
    asked = torch.arange(10).repeat_interleave(args.per_digit)
    rows = []
    for name, scheduler, guidance in (
        ("ODE", ode, 1.0),
        (f"Flow-SDE eta={args.eta:g}", sde, 1.0),
        ("ODE, guidance 1.5", ode, 1.5),
    ):
        pipeline.scheduler = scheduler
        options = {"num_inference_steps": args.steps, "guidance_scale": guidance, "output_type": "pt"}
        pages = pipeline(asked.tolist(), generator=torch.Generator().manual_seed(0), **options).images
        report(f"{name}, {args.steps} steps", pages, asked)
        rows.append(pages.unflatten(0, (10, -1))[:, :10])
        start = time.perf_counter()
        pipeline([0] * 64, **options)
        print(f"{'':<24} 64 samples in {time.perf_counter() - start:.2f} s on {torch.get_num_threads()} thread(s)")
    if args.grid:
        pages = torch.cat(rows, 1)
        save_grid(pages.flatten(0, 1), pages.shape[1], args.grid)


if __name__ == "__main__":
    main()
