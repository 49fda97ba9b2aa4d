"""What two readers make of drawn words: exact reads, edit similarity, and what may get worse meanwhile.

    python examples/words/evaluate.py [--checkpoint FOLDER] [--words held_out|tuning|withheld] [--guidance 4]

prints one line and, with ``--json FILE``, writes every image's numbers. Same seeds, so two runs can be paired.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from pipeline import WordsPipeline, parse, prompt
from readers import FIRST_NAME, SECOND_NAME, first_reader, second_reader
from vocabulary import HELD_OUT, TUNING, WITHHELD, prompts_of

HERE = Path(__file__).parent
SPLITS = {
    "held_out": prompts_of(HELD_OUT),
    "tuning": prompts_of(TUNING),
    "withheld": [prompt(word, face) for word, face in WITHHELD.items()],
}
# rows that no drawn word reaches
_PAPER_ROWS = 3


def draw(
    pipeline: WordsPipeline, prompts: list[str], seeds: int, num_steps: int = 10, guidance_scale: float = 1.0
) -> torch.Tensor:
    """Each prompt with each of ``seeds`` by the ODE, ``[prompts * seeds, 1, H, W]``."""
    pipeline.set_progress_bar_config(disable=True)
    asked = [text for text in prompts for _ in range(seeds)]
    # one seed for each image; rollouts draw 63-bit hashes
    generators = [torch.Generator().manual_seed(number) for number in range(len(asked))]
    parts = [
        pipeline(
            asked[k : k + 90], num_steps, guidance_scale, generator=generators[k : k + 90], output_type="pt"
        ).images
        for k in range(0, len(asked), 90)
    ]
    return torch.cat(parts)


def measure(images: torch.Tensor, prompts: list[str], seeds: int) -> dict[str, list]:
    """Numbers of each image: what both readers make of it, paper and variety."""
    words = [parse(text)[0] for text in prompts for _ in range(seeds)]
    numbers: dict[str, list] = {"asked": words}
    metadata = [{"text": word} for word in words]
    for name, reader in ((FIRST_NAME, first_reader()), (SECOND_NAME, second_reader())):
        scores = reader(images, [""] * len(words), metadata)
        numbers[f"{name} exact"] = [float(score == 1) for score in scores["edit"].tolist()]
        numbers |= {f"{name} {kind}": scores[kind].tolist() for kind in ("edit", "likelihood")}
        if name == SECOND_NAME:
            numbers[f"{name} read"] = reader.read(images)
    # grey levels of 255 that clean paper is darker than white
    numbers["paper noise"] = (255 * (1 - images[:, :, :_PAPER_ROWS])).mean(dim=(1, 2, 3)).tolist()
    grouped = images.unflatten(0, (-1, seeds))
    numbers["variety"] = grouped.std(1, correction=0).mean(dim=(1, 2, 3)).repeat_interleave(seeds).tolist()
    return numbers


def means(numbers: dict[str, list]) -> dict[str, float]:
    """Means over all images."""
    return {name: float(np.mean(values)) for name, values in numbers.items() if not isinstance(values[0], str)}


def paired(before: list[float], after: list[float], seeds: int, draws: int = 4000) -> tuple[float, float, float]:
    """Mean difference of the same images and its 95 % interval, by a bootstrap over prompts."""
    change = (np.array(after) - np.array(before)).reshape(-1, seeds).mean(1)
    chosen = np.random.default_rng(0).integers(0, len(change), (draws, len(change)))
    low, high = np.quantile(change[chosen].mean(1), [0.025, 0.975])
    return float(change.mean()), float(low), float(high)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", type=Path, default=HERE / "checkpoint")
    parser.add_argument("--words", choices=SPLITS, default="held_out")
    parser.add_argument("--seeds", type=int, default=2, help="images of each prompt")
    parser.add_argument("--guidance", type=float, default=1.0, help="scale of guidance (default: none)")
    parser.add_argument("--json", type=Path, help="where every image's numbers go")
    args = parser.parse_args()
    torch.set_num_threads(1)
    prompts = SPLITS[args.words]
    pipeline = WordsPipeline.from_pretrained(args.checkpoint)
    numbers = measure(draw(pipeline, prompts, args.seeds, guidance_scale=args.guidance), prompts, args.seeds)
    shown = ", ".join(f"{name} {value:.3f}" for name, value in means(numbers).items())
    print(f"{args.words}, {len(prompts) * args.seeds} images: {shown}")
    if args.json:
        args.json.write_text(json.dumps(numbers) + "\n")


if __name__ == "__main__":
    main()
