"""The two tasks: pipelines, prompts trained on and held out, rewards, and what their pages are measured by."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from safetensors.torch import load_file
from torch import Tensor

from examples.digits.judge import Judge
from examples.digits.pipeline import DigitsPipeline
from examples.digits.rewards import BoldReward, SlantReward

from . import shapes
from .judges import FeatureSpace, LinearJudge
from .paths import CHECKPOINTS, EXAMPLE

# reward: (pages [B, C, H, W] in [0, 1], asked classes [B]) -> [B]
PageReward = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Task:
    """What a run needs to know about its world.

    Attributes:
        name: ``"digits"`` or ``"shapes"``.
        elements: N, latent elements per row.
        pipeline: makes the pretrained pipeline anew.
        trained, held_out: prompts that the RL run samples, and those that it never sees.
        asked: class numbers ``[B]`` of prompts, as the judges count them.
        ink: pages to ink maps ``[B, 1, H, W]``.
        rewards: by name.
        features: the space of the quality measures.
        reads: ``[B]`` bool, whether pages show what their prompts ask for, by judges that give no reward.
        real: moments of real pages' features by class.
    """

    name: str
    elements: int
    pipeline: Callable[[], DigitsPipeline]
    trained: tuple[str, ...]
    held_out: tuple[str, ...]
    asked: Callable[[Sequence[str]], Tensor]
    ink: Callable[[Tensor], Tensor]
    rewards: Mapping[str, PageReward]
    features: FeatureSpace
    reads: Callable[[Tensor, Sequence[str]], Tensor]
    real: Mapping[str, Tensor]


class NamedRewards:
    """Some of a task's rewards as the trainer calls them."""

    def __init__(self, task: Task, names: Sequence[str]):
        unknown = [name for name in names if name not in task.rewards]
        if unknown or not names:
            raise ValueError(f"rewards: got {list(names)} for {task.name}, expected some of {list(task.rewards)}")
        self.task, self.names = task, tuple(names)

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: object = None) -> dict[str, Tensor]:
        # the judges stay on the host: they are small, and their numbers then do not depend on the device
        pages, asked = images.float().cpu(), self.task.asked(prompts)
        return {name: self.task.rewards[name](pages, asked) for name in self.names}


@functools.cache
def load_task(name: str) -> Task:
    """The task of that name.

    Raises:
        ValueError: no such task.
    """
    if name not in _TASKS:
        raise ValueError(f"task: got {name!r}, expected one of {', '.join(map(repr, _TASKS))}")
    return _TASKS[name]()


def _scorers(name: str, judge: Judge) -> tuple[LinearJudge, FeatureSpace, dict[str, Tensor]]:
    tensors = load_file(CHECKPOINTS / f"{name}_scorers.safetensors")
    linear = LinearJudge(tensors["linear.weight"], tensors["linear.bias"], float(tensors["linear.unit"]))
    features = FeatureSpace(judge, tensors["features.centre"], tensors["features.directions"])
    return linear, features, {key: value for key, value in tensors.items() if key.startswith("real.")}


def _digits() -> Task:
    judge = Judge.from_pretrained(EXAMPLE / "checkpoint")
    linear, features, real = _scorers("digits", judge)
    bold, slant = BoldReward(), SlantReward()

    def asked(prompts: Sequence[str]) -> Tensor:
        return torch.tensor([int(prompt) for prompt in prompts])

    def pipeline() -> DigitsPipeline:
        return _quiet(DigitsPipeline.from_pretrained(EXAMPLE / "checkpoint"))

    return Task(
        name="digits",
        elements=256,
        pipeline=pipeline,
        trained=("0", "1", "3", "4", "6", "7", "9"),
        held_out=("2", "5", "8"),
        asked=asked,
        ink=lambda pages: pages,
        rewards={
            "judge": linear,
            "bold": lambda pages, _: bold(pages, ()),
            "slant": lambda pages, _: slant(pages, ()),
        },
        features=features,
        reads=lambda pages, prompts: features.reads(pages, asked(prompts)),
        real=real,
    )


def _shapes() -> Task:
    judge = Judge.from_pretrained(CHECKPOINTS / "shapes_judge")
    linear, features, real = _scorers("shapes", judge)
    # real pages have 0.07 to 0.2 of ink, depending on the shape
    big = BoldReward(low=0.05, high=0.35)
    palette = torch.tensor(list(shapes.COLOURS.values()))

    def asked(prompts: Sequence[str]) -> Tensor:
        return shapes.caption_indices(prompts)[0]

    def shade(pages: Tensor) -> Tensor:
        ink = shapes.ink_of(pages)
        return (pages * ink).sum((2, 3)) / ink.sum((2, 3)).clamp_min(1e-3)

    def warm(pages: Tensor, _: Tensor) -> Tensor:
        mean = shade(pages)
        return (mean[:, 0] - mean[:, 2] + 1) / 2

    def reads(pages: Tensor, prompts: Sequence[str]) -> Tensor:
        wanted_shape, wanted_colour = shapes.caption_indices(prompts)
        found = torch.cdist(shade(pages), palette).argmin(1)
        return features.reads(shapes.ink_of(pages), wanted_shape) & (found == wanted_colour)

    def pipeline() -> DigitsPipeline:
        transformer = shapes.ShapesTransformer.from_pretrained(
            CHECKPOINTS / "shapes_transformer", torch_dtype=torch.float32
        )
        return _quiet(shapes.make_pipeline(transformer))

    # each shape and each colour is in two of the held-out captions
    numbers = [divmod(place, len(shapes.COLOURS)) for place in range(len(shapes.CAPTIONS))]
    held_out = [caption for caption, (shape, colour) in zip(shapes.CAPTIONS, numbers) if (shape + colour) % 3 == 0]
    return Task(
        name="shapes",
        elements=3 * shapes.SIZE**2,
        pipeline=pipeline,
        trained=tuple(caption for caption in shapes.CAPTIONS if caption not in held_out),
        held_out=tuple(held_out),
        asked=asked,
        ink=shapes.ink_of,
        rewards={
            "judge": lambda pages, classes: linear(shapes.ink_of(pages), classes),
            "big": lambda pages, _: big(shapes.ink_of(pages), ()),
            "warm": warm,
        },
        features=features,
        reads=reads,
        real=real,
    )


def _quiet(pipeline: DigitsPipeline) -> DigitsPipeline:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


_TASKS = {"digits": _digits, "shapes": _shapes}
