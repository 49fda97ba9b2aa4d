"""What a rollout is made of: seeds without state, prompts in a fixed order, and the samples of one iteration."""

from __future__ import annotations

import hashlib
import inspect
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .recorder import Trajectory

_COUNT_ARGUMENTS = ("num_images_per_prompt", "num_videos_per_prompt")
# keys of a prompt that go to the reward and not to the pipeline
_REWARD_KEYS = ("text", "metadata")


def derive_seed(*keys: Any) -> int:
    """A 63-bit seed that is a function of ``keys``; what is drawn from it needs no state in a checkpoint."""
    return int.from_bytes(hashlib.blake2b(repr(keys).encode(), digest_size=8).digest(), "little") >> 1


@dataclass
class Rollout:
    """One iteration's samples.

    Attributes:
        trajectories: recorded pipeline calls of this process.
        rows: numbers of each trajectory's rows in the rollout.
        rewards: by name, ``[R]`` each, of all processes.
        advantages: ``[R]``.
    """

    trajectories: list[Trajectory]
    rows: list[range]
    rewards: dict[str, Tensor]
    advantages: Tensor

    def locate(self, rows: range) -> Iterator[tuple[Trajectory, list[int], list[int]]]:
        """Trajectories that hold some of ``rows``, with those rows numbered in the trajectory and in the rollout."""
        for trajectory, own in zip(self.trajectories, self.rows):
            mine = range(max(own.start, rows.start), min(own.stop, rows.stop))
            if mine:
                yield trajectory, [row - own.start for row in mine], list(mine)


class PromptSource:
    """Prompts of a run and how they are given to a pipeline.

    Args:
        prompts: texts, or mappings of arguments of the pipeline's call for one prompt; tensors have no batch dim.
        pipeline: what they are for.
        options: names of further arguments that the call must take.

    Raises:
        ValueError: no prompts, prompts with different keys, or a call that lacks an argument.
    """

    def __init__(self, prompts: Sequence[str | Mapping[str, Any]], pipeline: Any, options: Sequence[str]):
        if isinstance(prompts, str) or not len(prompts):
            raise ValueError(f"prompts: got {prompts!r}, expected a non-empty sequence of texts or mappings")
        self.entries = [{"prompt": prompt} if isinstance(prompt, str) else dict(prompt) for prompt in prompts]
        for position, entry in enumerate(self.entries):
            if set(entry) != set(self.entries[0]):
                raise ValueError(
                    f"prompts: entry {position} has the keys {sorted(entry)}, expected {sorted(self.entries[0])} like "
                    "the first one"
                )
        given = {key: value for key, value in self.entries[0].items() if key not in _REWARD_KEYS}
        known = inspect.signature(pipeline.__call__).parameters
        used = [*given, "num_inference_steps", "generator", "output_type", *options]
        missing = [name for name in used if name not in known]
        if missing and not any(p.kind is p.VAR_KEYWORD for p in known.values()):
            raise ValueError(f"pipeline: {type(pipeline).__name__} takes no argument {', '.join(map(repr, missing))}")
        # pipelines repeat texts they encode themselves, but not always embeddings they are given
        repeats_itself = not any(isinstance(value, Tensor) for value in given.values())
        self._count_argument = next((name for name in _COUNT_ARGUMENTS if repeats_itself and name in known), None)

    def groups(self, iteration: int, count: int, seed: int) -> list[dict[str, Any]]:
        """The ``count`` prompts of an iteration: a shuffled pass over all of them, another shuffle, and so on."""
        total = len(self.entries)
        chosen = []
        for place in range(iteration * count, (iteration + 1) * count):
            order = list(range(total))
            random.Random(derive_seed(seed, "prompts", place // total)).shuffle(order)
            chosen.append(self.entries[order[place % total]])
        return chosen

    def arguments(self, entries: list[dict[str, Any]], group_size: int, device: torch.device) -> dict[str, Any]:
        """Arguments of a call that draws one image per entry; a group's text is encoded once where that is possible."""
        counts: dict[str, Any] = {}
        if self._count_argument is not None:
            count = group_size if len(entries) % group_size == 0 else len(entries)
            counts, entries = {self._count_argument: count}, entries[::count]
        for key in entries[0]:
            if key not in _REWARD_KEYS:
                values = [entry[key] for entry in entries]
                counts[key] = torch.stack(values).to(device) if isinstance(values[0], Tensor) else values
        return counts
