"""Fine-tune the digits model with Flow-DPPO until it draws bold digits that are still readable.

    python examples/digits/demo.py [--output runs/demo] [--resume] [section.key=value ...]

takes about a minute on one CPU core and leaves metrics, a plot and samples from before and after in one folder.
After Ctrl-C a second start continues from the last checkpoint. Settings are those of ``examples/configs/digits.yaml``.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from judge import Judge
from pipeline import DigitsPipeline
from rewards import BoldReward, ReadableReward
from tqdm import tqdm

from flowdppo_fast.runs import figures
from flowdppo_fast.trainer import FlowDPPOConfig, FlowDPPOTrainer
from flowdppo_fast.trainer.recipe import Recipe

HERE = Path(__file__).parent
RECIPE = HERE.parent / "configs" / "digits.yaml"
DIGITS = [str(digit) for digit in range(10)]
# seeds that no rollout draws: those are 63-bit hashes
HELD_OUT_SEEDS = range(20)


class BoldDigits:
    """Two rewards in [0, 1]: does the judge read the asked digit, and is there as much ink as in a bold one."""

    def __init__(self, judge: Judge):
        self.readable, self.bold = ReadableReward(judge), BoldReward()

    def __call__(self, images, prompts, metadata) -> dict[str, torch.Tensor]:
        return {"readable": self.readable(images, prompts), "bold": self.bold(images, prompts)}


def settings(overrides: Sequence[str] = ()) -> FlowDPPOConfig:
    """Those of the recipe, with a folder of the demo's own."""
    return Recipe.from_yaml(RECIPE, ["run.output_dir=runs/demo", *overrides]).config


def draw(pipeline: DigitsPipeline, num_steps: int) -> tuple[torch.Tensor, list[str]]:
    """Each digit with each held-out seed by the ODE: images ``[10 * seeds, 1, H, W]`` and what was asked."""
    asked = [digit for digit in DIGITS for _ in HELD_OUT_SEEDS]
    generators = [torch.Generator().manual_seed(seed) for _ in DIGITS for seed in HELD_OUT_SEEDS]
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(asked, num_inference_steps=num_steps, generator=generators, output_type="pt").images
    return images, asked


@figures.style()
def plot_samples(before: torch.Tensor, after: torch.Tensor, path: Path, columns: int = 8) -> None:
    """The first ``columns`` held-out seeds of each digit, before on the left and after on the right."""
    figure, axes = figures.panels(2, height=5.4)
    for axis, images, title in ((axes[0], before, "before"), (axes[1], after, "after")):
        tiles = images[:, 0].unflatten(0, (len(DIGITS), -1))[:, :columns]
        tiles = torch.nn.functional.pad(tiles, (1, 1, 1, 1), value=0.5)
        height, width = tiles.shape[-2:]
        axis.imshow(1 - tiles.transpose(1, 2).flatten(2, 3).flatten(0, 1).numpy(), cmap="gray", vmin=0, vmax=1)
        axis.set_title(f"{title} fine-tuning")
        axis.set_yticks([height * (row + 0.5) for row in range(len(DIGITS))], DIGITS)
        axis.set_xticks([width * (column + 0.5) for column in range(columns)], list(HELD_OUT_SEEDS)[:columns])
        axis.set_xlabel("seed")
        axis.set_ylabel("asked digit")
        axis.grid(False)
    figures.save(figure, path)


def mean_rewards(reward: BoldDigits, images: torch.Tensor, asked: list[str]) -> dict[str, float]:
    """The mean of each reward over images."""
    return {name: value.mean().item() for name, value in reward(images, asked, None).items()}


def report_rows(history: Sequence[dict[str, float]]) -> tuple[int, int, int]:
    """Counts of trained rows (an image at a step in an update), of those whose ratio is not 1, and of masked ones."""
    rows = sum(m["rows"] for m in history)
    moved = round(sum(m["rows"] * m["ratio_moved_fraction"] for m in history))
    masked = round(sum(m["rows"] * m["masked_fraction"] for m in history))
    shares = f"{moved} ({moved / rows:.1%}) with a ratio other than 1, {masked} ({masked / rows:.1%}) masked"
    print(f"{rows} trained rows: {shares}")
    return rows, moved, masked


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Runs the demo; returns the held-out rewards before and after."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", help="folder of the run (default: runs/demo)")
    parser.add_argument("--resume", action="store_true", help="fail unless there is a run to continue")
    parser.add_argument(
        "--checkpoint", type=Path, default=HERE / "checkpoint", help="the pretrained model and its judge"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings other than the recipe's")
    args = parser.parse_args(arguments)
    started = time.perf_counter()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))

    overrides = [*args.overrides, *([f"run.output_dir={args.output}"] if args.output else [])]
    config = settings(overrides)
    folder = Path(config.run.output_dir)
    continued = (folder / "metrics.jsonl").exists()
    if args.resume and not continued:
        parser.error(f"--resume: {folder} holds no run")

    pipeline = DigitsPipeline.from_pretrained(args.checkpoint)
    reward = BoldDigits(Judge.from_pretrained(args.checkpoint))
    steps = config.sampling.num_steps
    before, asked = draw(pipeline, steps)
    trainer = FlowDPPOTrainer(pipeline, reward, DIGITS, config)

    def tell(metrics: dict[str, float]) -> None:
        if metrics["iteration"] % 5 == 0 or metrics["iteration"] == 1:
            tqdm.write(
                f"iteration {metrics['iteration']:3d}  reward {metrics['reward']:.3f} "
                f"(readable {metrics['reward/readable']:.3f}, bold {metrics['reward/bold']:.3f})  "
                f"KL {metrics['kl_new_old_nats']:.3f} nats  masked {metrics['masked_fraction']:.1%}"
            )

    try:
        history = trainer.train(resume=continued, on_iteration=tell)
    except KeyboardInterrupt:
        raise SystemExit("\ninterrupted; the same command continues from the last checkpoint") from None

    after, _ = draw(pipeline, steps)
    trainer.save_pretrained(folder / "final")
    plot_samples(before, after, folder / "samples.png")
    rows, moved, masked = report_rows(history)
    result = {"rows": rows, "rows_moved": moved, "rows_masked": masked}
    for name, images in (("before", before), ("after", after)):
        scores = mean_rewards(reward, images, asked)
        result[name] = sum(config.advantage.reward_weights.get(key, 1.0) * score for key, score in scores.items())
        parts = ", ".join(f"{key} {score:.3f}" for key, score in scores.items())
        variety = images.unflatten(0, (len(DIGITS), -1)).std(1).mean().item()
        print(f"held-out seeds {name}: reward {result[name]:.3f} ({parts}), variety between seeds {variety:.3f}")
    result["seconds"] = time.perf_counter() - started
    (folder / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    for name in ("metrics.jsonl", "metrics.png", "samples.png", "final"):
        print(folder / name)
    print(f"{result['seconds']:.0f} s")
    return result


if __name__ == "__main__":
    main()
