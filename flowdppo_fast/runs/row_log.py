"""A run's row log ``rows.jsonl``: how it is written, read as arrays, and what clipping and masking make of its rows.

A *row* is one sample at one denoising step in one update: its log-ratio ``L`` and its exact KL ``D`` to the policy
that drew it, here in nats over the whole latent. For noise that is independent of the change of the policy, ``L`` is
normal with the mean ``-D`` and the standard deviation ``sqrt(2*D)``; per element, as trainers log it,
``std(log r) = sqrt(2*D/N)`` (Flow-DPPO, arXiv 2606.11025, Sec. 3.2).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..results import LossOutput
from .logs import to_json

_FIELDS = ("log_ratio", "kl", "kept")


@dataclass(frozen=True)
class RowPart:
    """Rows of one micro-batch.

    Attributes:
        update: number of the optimizer step in its iteration.
        steps: indices in the schedule, S of them.
        first: place of the first one among all steps of its rollout.
        rows: numbers in the rollout, b of them.
        elements: latent elements of each row.
        numbers: ``[3, b, S]`` log-ratio, mean-reduced KL, and 1 where the row was kept; on the device. None where they
            travel apart.
    """

    update: int
    steps: tuple[int, ...]
    first: int
    rows: tuple[int, ...]
    elements: int
    numbers: Tensor | None

    def without_numbers(self) -> RowPart:
        return dataclasses.replace(self, numbers=None)


def row_part(
    out: LossOutput, update: int, steps: Sequence[int], first: int, rows: Sequence[int], elements: int
) -> RowPart:
    """The rows of a loss call on ``[b, S]``; no host sync."""
    numbers = torch.stack([out.rows.log_ratio, out.rows.kl, out.rows.kept.to(out.rows.kl.dtype)])
    return RowPart(update, tuple(steps), first, tuple(rows), elements, numbers.float())


def row_lines(
    iteration: int, parts: Sequence[RowPart], numbers: Sequence[float], advantages: Sequence[Sequence[float]]
) -> Iterator[str]:
    """JSON lines, one per update, set of steps and size: ``iteration``, ``update``, ``steps`` [S], ``elements`` N per
    row, ``rows`` [b], ``advantage`` [b], or [b][S] where steps have their own, and ``log_ratio``, ``kl``
    (mean-reduced), ``kept`` [b][S].

    Args:
        numbers: those of all ``parts`` in order, as they were read from the device.
        advantages: of all images of the rollout, one for all steps or one for each.
    """
    lines: dict[tuple, dict] = {}
    start = 0
    for part in parts:
        key = (part.update, part.steps, part.elements)
        line = lines.setdefault(key, {"rows": [], "advantage": [], **{name: [] for name in _FIELDS}})
        line["rows"] += part.rows
        count, width = len(part.rows), len(part.steps)
        for own in (advantages[row] for row in part.rows):
            line["advantage"].append(own[0] if len(own) == 1 else list(own[part.first : part.first + width]))
        for name in _FIELDS:
            for _ in range(count):
                values = numbers[start : start + width]
                line[name].append([int(x) for x in values] if name == "kept" else list(values))
                start += width
    # processes are gathered one after the other
    for (update, steps, elements), line in sorted(lines.items(), key=lambda item: item[0][0]):
        head = {"iteration": iteration, "update": update, "steps": list(steps), "elements": elements}
        yield to_json({**head, **line})


@dataclass(frozen=True)
class LoggedRows:
    """All rows of a row log as flat arrays of one length.

    Attributes:
        iteration, update, step: integers; ``update`` counts the optimizer steps since the rollout.
        advantage: of the sample, or of its step.
        log_ratio, kl: in nats over the whole latent (the logged means times N).
        kept: False where the bound removed the gradient.
        elements: N, latent elements of the row.
    """

    iteration: np.ndarray
    update: np.ndarray
    step: np.ndarray
    advantage: np.ndarray
    log_ratio: np.ndarray
    kl: np.ndarray
    kept: np.ndarray
    elements: np.ndarray

    def __len__(self) -> int:
        return len(self.kl)

    def where(self, chosen: np.ndarray) -> LoggedRows:
        """The rows at which ``chosen`` is True."""
        return LoggedRows(**{name: getattr(self, name)[chosen] for name in _ARRAYS})

    @property
    def sizes(self) -> list[int]:
        """The different N, smallest first."""
        return np.unique(self.elements).tolist()

    @property
    def moved(self) -> LoggedRows:
        """Rows after the first update of their rollout: before it the policies are one, with nothing to decide."""
        return self.where((self.update > 0) & (self.kl > 0))

    @property
    def standardised(self) -> np.ndarray:
        """``(L + D) / sqrt(2*D)``: standard normal where the noise knows nothing of the change of the policy."""
        return (self.log_ratio + self.kl) / np.sqrt(2 * self.kl)

    @property
    def away(self) -> np.ndarray:
        """Where advantage and log-ratio have one sign: the next step would lead further from the old policy."""
        return self.advantage * self.log_ratio > 0


_ARRAYS = tuple(field.name for field in fields(LoggedRows))


def read_rows(path: Path) -> LoggedRows:
    """The row log at ``path``.

    Raises:
        ValueError: no such file, an empty one, or lines that are no row log.
    """
    if not path.exists():
        raise ValueError(f"{path}: no row log there; a run writes one with run.row_log=true")
    columns: dict[str, list] = {name: [] for name in _ARRAYS}
    for number, text in enumerate(path.read_text().splitlines(), 1):
        try:
            line = json.loads(text)
            elements, steps, samples = int(line["elements"]), line["steps"], len(line["advantage"])
            shape = (samples, len(steps))
            parts = (
                np.full(shape, line["iteration"]),
                np.full(shape, line["update"]),
                np.broadcast_to(steps, shape),
                np.broadcast_to(np.asarray(line["advantage"], float).reshape(samples, -1), shape),
                np.asarray(line["log_ratio"], float).reshape(shape) * elements,
                np.asarray(line["kl"], float).reshape(shape) * elements,
                np.asarray(line["kept"], bool).reshape(shape),
                np.full(shape, elements),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}, line {number}: {error!r}, expected a line of a row log") from None
        for name, part in zip(_ARRAYS, parts):
            columns[name].append(part.reshape(-1))
    if not columns["kl"]:
        raise ValueError(f"{path}: got no rows, expected a run of at least one iteration")
    return LoggedRows(**{name: np.concatenate(columns[name]) for name in _ARRAYS})


def clip_against_mask(rows: LoggedRows, clip: float | np.ndarray) -> dict[str, float] | None:
    """What a clip range (nats over the whole latent) drops, against the mask that drops as many of the same rows.

    A mask has one threshold per element for rows of all sizes. ``clip`` may be one number or one of each row.

    Both rules only drop rows that move away; the clip where the log-ratio is large, the mask where the KL is. None if
    the clip drops nothing.

    Returns:
        ``dropped`` share of rows; ``threshold`` the KL (nats of the smallest rows) with which the mask drops as many;
        ``spurious`` share of the dropped rows that are nearer than that by their exact KL (with equal numbers, as many
        farther rows are missed); ``kl_of_clipped_median`` and ``kl_of_masked_median``.
    """
    away = rows.away
    clipped = away & (np.abs(rows.log_ratio) > clip)
    count = int(clipped.sum())
    if count == 0:
        return None
    smallest = rows.elements.min()
    distance = rows.kl * (smallest / rows.elements)
    threshold = float(np.sort(distance[away])[-count])
    masked = away & (distance >= threshold)
    return {
        "dropped": count / len(rows),
        "threshold": threshold,
        "spurious": float((clipped & ~masked).sum() / count),
        "kl_of_clipped_median": float(np.median(rows.kl[clipped])),
        "kl_of_masked_median": float(np.median(rows.kl[masked])),
    }
