"""Fine-tune the words model with Flow-DPPO, an OCR reader as reward, until it spells words it never saw better.

    python examples/words/demo.py [--output runs/words] [--resume] [section.key=value ...]

leaves metrics, a curve, the weights, the recipe and a sheet from before and after in one folder. After Ctrl-C a second
start continues from the last checkpoint. Settings are in ``examples/configs/words.yaml``.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from evaluate import SPLITS, draw, means, measure, paired
from pipeline import WordsPipeline
from readers import FIRST_NAME, SECOND_NAME
from tqdm import tqdm
from vocabulary import train_prompts

from flowdppo_fast.runs import figures
from flowdppo_fast.trainer import FlowDPPOTrainer
from flowdppo_fast.trainer.recipe import Recipe
from flowdppo_fast.trainer.rewards import build_rewards

HERE = Path(__file__).parent
SEEDS = 2


@figures.style()
def draw_sheet(
    pages: dict[str, torch.Tensor], numbers: dict[str, dict[str, list]], path: Path, shown: int = 30
) -> None:
    """The first seed of evenly spaced prompts: what was asked, what was drawn, what the second reader read."""
    count = len(next(iter(pages.values())))
    prompts = count // SEEDS
    # one typeface after the other
    chosen = [min(place * prompts // shown + place % 3, prompts - 1) * SEEDS for place in range(min(shown, prompts))]
    figure, axes = figures.panels(2, height=5.4)
    for axis, (title, images) in zip(axes, pages.items()):
        asked, read = numbers[title]["asked"], numbers[title][f"{SECOND_NAME} read"]
        height, width = images.shape[-2:]
        gap = 4
        rows = -(-len(chosen) // 2)
        axis.set_xlim(0, 2 * 2.8 * width)
        axis.set_ylim(rows * (height + gap), -height)
        for place, number in enumerate(chosen):
            left, top = (place // rows) * 2.8 * width, (place % rows) * (height + gap)
            right = read[number] == asked[number]
            axis.text(left, top + height / 2, asked[number], va="center", fontsize=8)
            axis.imshow(
                images[number, 0].numpy(), cmap="gray", vmin=0, vmax=1, aspect="equal",
                extent=(left + 0.75 * width, left + 1.75 * width, top + height, top),
            )  # fmt: skip
            axis.text(
                left + 1.82 * width, top + height / 2, read[number] or "(nothing)", va="center", fontsize=8,
                color=figures.INK if right else figures.METHODS["flow_grpo"][0],
                fontweight="normal" if right else "bold",
            )  # fmt: skip
        for column in range(2):
            for offset, head in ((0, "asked"), (0.75, "drawn"), (1.82, "read")):
                axis.text((2.8 * column + offset) * width, -height / 3, head, fontsize=8, style="italic")
        exact = sum(numbers[title][f"{SECOND_NAME} exact"]) / count
        axis.set_title(f"{title} fine-tuning: {exact:.0%} of {count} read exactly")
        axis.axis("off")
    figure.suptitle(f"Words that were never trained on, read by {SECOND_NAME}, which had no part in training")
    figures.save(figure, path)


def main(arguments: Sequence[str] | None = None) -> dict:
    """Runs the demo; returns what is in ``result.json``."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", help="folder of the run (default: runs/words)")
    parser.add_argument("--resume", action="store_true", help="fail unless there is a run to continue")
    parser.add_argument("--checkpoint", type=Path, default=HERE / "checkpoint", help="the pre-trained pipeline")
    parser.add_argument("--words", choices=SPLITS, default="held_out", help="what is drawn before and after")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings other than the recipe's")
    args = parser.parse_args(arguments)
    started = time.perf_counter()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))

    overrides = [*args.overrides, *([f"run.output_dir={args.output}"] if args.output else [])]
    recipe = Recipe.from_yaml(HERE.parent / "configs" / "words.yaml", overrides)
    reward, weights = build_rewards(list(recipe.rewards))
    config = replace(recipe.config, advantage=replace(recipe.config.advantage, reward_weights=weights))
    folder = Path(config.run.output_dir)
    continued = (folder / "metrics.jsonl").exists()
    if args.resume and not continued:
        parser.error(f"--resume: {folder} holds no run")

    prompts = SPLITS[args.words]
    steps, options = config.sampling.num_steps, config.sampling.pipeline_kwargs
    pipeline = WordsPipeline.from_pretrained(args.checkpoint)
    pages = {"before": draw(pipeline, prompts, SEEDS, steps, **options)}
    numbers = {"before": measure(pages["before"], prompts, SEEDS)}
    trainer = FlowDPPOTrainer(pipeline, reward, train_prompts(), config)

    def tell(metrics: dict[str, float]) -> None:
        tqdm.write(
            f"iteration {metrics['iteration']:3d}  likelihood {metrics['reward']:.3f}  "
            f"edit {metrics['reward/ocr/edit']:.3f}  KL {metrics['kl_new_old_nats']:.3f} nats  "
            f"masked {metrics['masked_fraction']:.1%}"
        )

    try:
        history = trainer.train(resume=continued, on_iteration=tell)
    except KeyboardInterrupt:
        raise SystemExit("\ninterrupted; the same command continues from the last checkpoint") from None

    with trainer.weights.averaged():
        pages["after"] = draw(pipeline, prompts, SEEDS, steps, **options)
    numbers["after"] = measure(pages["after"], prompts, SEEDS)
    trainer.save_pretrained(folder / "final")
    draw_sheet(pages, numbers, folder / "sheet.png")
    rows = sum(m["rows"] for m in history)
    masked = sum(m["rows"] * m["masked_fraction"] for m in history) / max(rows, 1)
    result: dict = {name: means(values) for name, values in numbers.items()}
    result["change"] = {}
    print(f"\n{len(prompts) * SEEDS} images, {args.words} words, before -> after (change, 95 % interval)")
    for name in result["before"]:
        change = paired(numbers["before"][name], numbers["after"][name], SEEDS)
        result["change"][name] = change
        print(
            f"  {name:23s} {result['before'][name]:.3f} -> {result['after'][name]:.3f}  "
            f"({change[0]:+.3f}, {change[1]:+.3f} to {change[2]:+.3f})"
        )
    print(
        f"{FIRST_NAME} was the reward, {SECOND_NAME} had no part in training; {masked:.1%} of {rows} rows were masked"
    )
    result |= {"rows": rows, "masked_fraction": masked, "seconds": time.perf_counter() - started}
    (folder / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    for name in ("sheet.png", "metrics.png", "metrics.jsonl", "config.yaml", "final"):
        print(folder / name)
    print(f"{result['seconds']:.0f} s")
    return result


if __name__ == "__main__":
    main()
