"""The samples of one iteration."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..runs.grids import caption
from .prompts import text_of
from .record.trajectory import Trajectory


@dataclass
class Rollout:
    """One iteration's samples.

    Attributes:
        trajectories: recorded pipeline calls of this process.
        rows: numbers of each trajectory's rows in the rollout.
        rewards: by name, ``[R]`` each, of all processes.
        advantages: ``[R]``, or ``[R, S]`` where steps have their own.
        page: images to show, with their captions; None in most iterations.
    """

    trajectories: list[Trajectory]
    rows: list[range]
    rewards: dict[str, Tensor]
    advantages: Tensor
    page: tuple[Any, list[str]] | None = None

    def advantages_of(self, places: Tensor, steps: range) -> Tensor:
        """``[b, s]`` of the rows at ``places``, at positions ``steps`` of their trajectories."""
        own = self.advantages[places]
        return own[:, None].expand(-1, len(steps)) if own.ndim == 1 else own[:, steps.start : steps.stop]

    def locate(self, rows: range) -> Iterator[tuple[Trajectory, list[int], list[int]]]:
        """Trajectories that hold some of ``rows``, with those rows numbered in the trajectory and in the rollout."""
        for trajectory, own in zip(self.trajectories, self.rows):
            mine = range(max(own.start, rows.start), min(own.stop, rows.stop))
            if mine:
                yield trajectory, [row - own.start for row in mine], list(mine)


def captions(entries: Sequence[Mapping[str, Any]], rewards: Mapping[str, Tensor]) -> list[str]:
    """A text per image: its prompt, and its rewards ``[B]`` by name; those beyond the last entry are left out."""
    values = {name: value[: len(entries)].tolist() for name, value in rewards.items()}
    return [
        caption(text_of(entry), {name: value[place] for name, value in values.items()})
        for place, entry in enumerate(entries)
    ]
