"""Prompts of a run, in a fixed order, as a pipeline and a reward take them."""

from __future__ import annotations

import inspect
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .seeds import derive_seed

_COUNT_ARGUMENTS = ("num_images_per_prompt", "num_videos_per_prompt")
# keys of a prompt that go to the reward and not to the pipeline
REWARD_KEYS = ("text", "metadata")


class PromptSource:
    """Prompts of a run and how they are given to a pipeline.

    A prompt is a text, or a mapping of arguments of the pipeline's call for one image. What a value is decides how the
    prompts of a call are put together:

    - a text: the list of texts;
    - a tensor, without a batch dim (embeddings, an image ``[3, H, W]``): stacked, a row per image;
    - a list (embeddings of any length, a PIL image where the pipeline wants one per row): joined, an entry per image;
    - anything else (a PIL image for the whole call, sizes, scales, None): the same for all images of a call, so prompts
      that differ in it are sampled in different calls.

    Args:
        prompts: texts, or mappings; ``text`` and ``metadata`` in a mapping go to the reward only.
        pipeline: what they are for.
        options: names of further arguments that the call must take.

    Raises:
        ValueError: no prompts, prompts with different keys or kinds of values, or a call that lacks an argument or is
            given one twice.
        TypeError: a prompt that is neither text nor mapping.
    """

    def __init__(self, prompts: Sequence[str | Mapping[str, Any]], pipeline: Any, options: Sequence[str]):
        if isinstance(prompts, (str, Mapping)) or not hasattr(prompts, "__len__") or not len(prompts):
            raise ValueError(f"prompts: got {prompts!r}, expected a non-empty sequence of texts or mappings")
        self.entries = [_entry(position, prompt) for position, prompt in enumerate(prompts)]
        first = self.entries[0]
        for position, entry in enumerate(self.entries):
            if set(entry) != set(first):
                raise ValueError(
                    f"prompts: entry {position} has the keys {sorted(entry)}, expected {sorted(first)} like the first "
                    "one"
                )
            for key in self._given(entry):
                if _kind(entry[key]) != _kind(first[key]):
                    raise ValueError(
                        f"prompts: {key} of entry {position} is {_described(entry[key])}, expected "
                        f"{_described(first[key])} like the first one"
                    )
        given = self._given(first)
        twice = sorted(set(given) & set(options))
        if twice:
            raise ValueError(f"prompts: {', '.join(twice)} is also among the arguments of every call, expected it once")
        known, further = inputs_of(pipeline)
        used = [*given, "num_inference_steps", "generator", "output_type", *options]
        missing = [name for name in used if name not in known]
        if missing and not further:
            raise ValueError(f"pipeline: {type(pipeline).__name__} takes no argument {', '.join(map(repr, missing))}")
        # pipelines repeat texts they encode themselves, but not always what they are given ready-made
        repeats_itself = all(_kind(first[key]) in ("text", "constant") for key in given)
        self._count_argument = next((name for name in _COUNT_ARGUMENTS if repeats_itself and name in known), None)

    def fingerprints(self) -> list[str]:
        """A short text per prompt that another one does not have."""
        return [f"{derive_seed({key: _digest(value) for key, value in entry.items()}):x}" for entry in self.entries]

    def groups(self, iteration: int, count: int, seed: int) -> list[dict[str, Any]]:
        """The ``count`` prompts of an iteration: a shuffled pass over all of them, another shuffle, and so on."""
        total, orders = len(self.entries), {}
        chosen = []
        for place in range(iteration * count, (iteration + 1) * count):
            epoch = place // total
            if epoch not in orders:
                orders[epoch] = list(range(total))
                random.Random(derive_seed(seed, "prompts", epoch)).shuffle(orders[epoch])
            chosen.append(self.entries[orders[epoch][place % total]])
        return chosen

    def calls(self, entries: Sequence[dict[str, Any]], batch_size: int | None = None) -> Iterator[range]:
        """Consecutive rows that one call can draw: at most ``batch_size``, and equal in what a call has once.

        Args:
            entries: one per row, as in ``[prompt for prompt in groups for _ in range(group_size)]``.
        """
        start = 0
        for row in range(1, len(entries) + 1):
            full = batch_size is not None and row - start == batch_size
            if row == len(entries) or full or self._differing(entries[start], entries[row]):
                yield range(start, row)
                start = row

    def arguments(self, entries: Sequence[dict[str, Any]], group_size: int, device: torch.device) -> dict[str, Any]:
        """Arguments of a call that draws one image per entry; a group's text is encoded once where that is possible.

        Raises:
            ValueError: the entries differ in an argument that a call has once (see :meth:`calls`), or tensors of
                different shapes.
        """
        for row, entry in enumerate(entries):
            differing = self._differing(entries[0], entry)
            if differing:
                raise ValueError(
                    f"prompts: {', '.join(differing)} of row {row} is not that of row 0, expected one value per call "
                    "of the pipeline; sample them in different calls"
                )
        given: dict[str, Any] = {}
        if self._count_argument is not None:
            count = group_size if len(entries) % group_size == 0 else len(entries)
            if any(entry is not entries[row - row % count] for row, entry in enumerate(entries)):
                count = 1
            given, entries = {self._count_argument: count}, entries[::count]
        for key in self._given(entries[0]):
            given[key] = _together(key, [entry[key] for entry in entries], device)
        return given

    @staticmethod
    def _given(entry: Mapping[str, Any]) -> list[str]:
        return [key for key in entry if key not in REWARD_KEYS]

    def _differing(self, first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
        if first is second:
            return []
        keys = [key for key in self._given(first) if _kind(first[key]) == "constant"]
        return [key for key in keys if not _equal(first[key], second[key])]


def inputs_of(pipeline: Any) -> tuple[set[str], bool]:
    """Names of the arguments that a pipeline's call takes, and whether it takes any other one as well.

    A modular pipeline takes those of its blocks and leaves out any other with a warning.
    """
    if hasattr(pipeline, "blocks"):
        # its output is taken by name
        return {block.name for block in pipeline.blocks.inputs} | {"return_dict"}, False
    known = inspect.signature(pipeline.__call__).parameters
    return set(known), any(p.kind is p.VAR_KEYWORD for p in known.values())


def text_of(entry: Mapping[str, Any]) -> Any:
    """What the reward and a reader are told of a prompt."""
    return entry.get("text", entry.get("prompt"))


def _digest(value: Any) -> Any:
    """What tells one value of a prompt from another; of arrays their shape and first numbers."""
    if isinstance(value, (Tensor, np.ndarray)):
        return tuple(value.shape), np.asarray(value.flatten()[:64].tolist()).tolist()
    if isinstance(value, Mapping):
        return sorted((str(key), _digest(part)) for key, part in value.items())
    if isinstance(value, (list, tuple)):
        return [_digest(part) for part in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else type(value).__name__


def _entry(position: int, prompt: str | Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(prompt, str):
        return {"prompt": prompt}
    if not isinstance(prompt, Mapping):
        raise TypeError(f"prompts: entry {position} is {type(prompt).__name__}, expected a text or a mapping")
    return dict(prompt)


def _kind(value: Any) -> str:
    """How values of one argument are put together."""
    kinds = {"text": str, "tensor": Tensor, "list": list}
    return next((name for name, type_ in kinds.items() if isinstance(value, type_)), "constant")


def _equal(a: Any, b: Any) -> bool:
    arrays = isinstance(a, np.ndarray) or isinstance(b, np.ndarray)
    return a is b or (bool(np.array_equal(a, b)) if arrays else a == b)


def _described(value: Any) -> str:
    return f"a {type(value).__name__}"


def _together(key: str, values: list[Any], device: torch.device) -> Any:
    kind = _kind(values[0])
    if kind == "tensor":
        shapes = {tuple(value.shape) for value in values}
        if len(shapes) > 1:
            raise ValueError(
                f"prompts: {key} has the shapes {sorted(shapes)}, expected one; pad them, or give each as a list of "
                "one if the pipeline takes a list"
            )
        return torch.stack(values).to(device)
    if kind == "list":
        joined = [entry for value in values for entry in value]
        return [entry.to(device) if isinstance(entry, Tensor) else entry for entry in joined]
    return values if kind == "text" else values[0]
