"""Which denoising steps of a rollout draw noise and are trained."""

from __future__ import annotations

import random
from collections.abc import Sequence

STEP_CHOICES = ("random", "window", "random_window")


def choose_steps(
    candidates: Sequence[int], count: int | None, choice: str, *, position: int, seed: int
) -> tuple[int, ...]:
    """``count`` of ``candidates`` (None: all of them), in schedule order.

    Args:
        candidates: indices in the schedule, ascending.
        choice: ``"random"`` takes any of them (DanceGRPO), ``"window"`` neighbours in a window that moves from the
            noisiest on by one at each ``position`` and starts again after the last (MixGRPO, arXiv 2507.21802),
            ``"random_window"`` neighbours anywhere (Flow-GRPO-Fast).
        position: place of the sliding window.
        seed: of the random choices.

    Raises:
        ValueError: an unknown choice.
    """
    if choice not in STEP_CHOICES:
        raise ValueError(f"step_choice: got {choice!r}, expected one of {', '.join(map(repr, STEP_CHOICES))}")
    if count is None:
        return tuple(candidates)
    places = len(candidates) - count + 1
    if choice == "random":
        return tuple(sorted(random.Random(seed).sample(list(candidates), count)))
    start = position % places if choice == "window" else random.Random(seed).randrange(places)
    return tuple(candidates[start : start + count])
