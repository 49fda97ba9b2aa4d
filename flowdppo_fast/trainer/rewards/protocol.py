"""The reward protocol: a callable on images, prompts and metadata that returns one tensor or several by name."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor


class Reward(Protocol):
    """``(images, prompts, metadata) -> [B]`` or a mapping of names to ``[B]``: tensors, numpy arrays or lists.

    ``images`` is what the pipeline returned: for ``output_type="pt"`` a tensor in [0, 1], ``[B, C, H, W]`` or a video
    ``[B, F, C, H, W]``; ``"np"`` and ``"pil"`` as diffusers makes them (:func:`~.images.to_pixels` reads them all).
    ``prompts`` has one text per image and ``metadata`` one dictionary per image.

    A reward must not change the images, and must not draw from the global random states of torch, numpy or python:
    it may run in a thread beside the sampler (:class:`~.background.BackgroundScorer`), whose numbers would then
    depend on who comes first. One that needs random numbers keeps a generator of its own.

    A reward with a method ``to(device)`` can be moved (:func:`move_reward`).

    A reward may abstain from an image that it cannot judge: ``None`` in a list. Such an image has no reward; it has
    the advantage 0 and does not enter the baseline of its group. In tensors and arrays NaN says so, but only of a
    reward whose attribute ``may_abstain`` is true, or names it where it returns several; any other NaN is an error.
    """

    def __call__(self, images: Any, prompts: Sequence[Any], metadata: Sequence[dict]) -> Any: ...


def score(
    reward: Reward, images: Any, prompts: Sequence[Any], metadata: Sequence[dict], device: torch.device
) -> dict[str, Tensor]:
    """Rewards by name, float32 ``[B]`` on ``device``, NaN for abstentions; one without names is called ``reward``.

    Reading whether all of them are finite waits for the device once.

    Args:
        reward: what is called, without gradients.
        images, prompts, metadata: as :class:`Reward` takes them, B of each.
        device: of the results.

    Raises:
        TypeError: no numbers, or no mapping of them.
        ValueError: not one number per image, or one that is not finite in float32 and no abstention; it is named with
            its sample.
    """
    with torch.no_grad():
        result = reward(images, prompts, metadata)
    named = dict(result) if isinstance(result, Mapping) else {"reward": result}
    if not named:
        raise ValueError("reward: got no rewards, expected at least one")
    allowed: bool | Collection[str] = getattr(reward, "may_abstain", False)
    wrong = []
    for name, value in named.items():
        numbers, abstained = _numbers(name, value)
        if numbers.shape != (len(prompts),):
            raise ValueError(f"reward: got shape {list(numbers.shape)} for {name!r}, expected [{len(prompts)}]")
        numbers = numbers.detach().to(device=device, dtype=torch.float32)
        may = allowed is True or (not isinstance(allowed, bool) and name in allowed)
        # an infinity is never an abstention
        excused = numbers.isnan() if may else abstained.to(device)
        wrong.append(~(torch.isfinite(numbers) | excused))
        named[name] = numbers
    if torch.stack(wrong).any():
        raise ValueError(_describe_nonfinite(named, wrong, prompts))
    return named


def _numbers(name: str, value: Any) -> tuple[Tensor, Tensor]:
    """What a reward returned as a tensor, and which of it was ``None``."""
    if isinstance(value, np.ndarray) and value.dtype != object:
        value = torch.from_numpy(np.ascontiguousarray(value))
    if isinstance(value, Tensor) and not value.is_complex():
        return value, torch.zeros(value.shape, dtype=torch.bool)
    if isinstance(value, (list, tuple, np.ndarray)):
        try:
            numbers = [math.nan if entry is None else float(entry) for entry in value]
        except (TypeError, ValueError):
            pass
        else:
            return torch.tensor(numbers, dtype=torch.float64), torch.tensor([entry is None for entry in value])
    kind = f"a {value.dtype} tensor" if isinstance(value, Tensor) else type(value).__name__
    raise TypeError(f"reward: got {kind} for {name!r}, expected one number per image in a tensor, an array or a list")


def move_reward(reward: Reward, device: torch.device | str) -> None:
    """Moves a reward that has a method ``to(device)``; others stay as they are.

    A reward that is scored in the background is moved before the first submit or after the last result.
    """
    move = getattr(reward, "to", None)
    if callable(move):
        move(device)


def _describe_nonfinite(named: Mapping[str, Tensor], marked: Sequence[Tensor], prompts: Sequence[Any]) -> str:
    name, values, marks = next((name, v.cpu(), m.cpu()) for (name, v), m in zip(named.items(), marked) if m.any())
    wrong = torch.nonzero(marks).flatten().tolist()
    prompt = repr(prompts[wrong[0]])
    prompt = prompt if len(prompt) <= 80 else f"{prompt[:77]}..."
    others = f" and {len(wrong) - 1} others" if len(wrong) > 1 else ""
    return (
        f"reward: got {values[wrong[0]].item()} for {name!r} of sample {wrong[0]}{others} out of {len(values)} "
        f"(prompt {prompt}), expected finite numbers"
    )
