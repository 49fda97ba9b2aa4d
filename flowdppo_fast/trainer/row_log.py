"""What happened to every row of every update, for ``rows.jsonl`` beside the metrics of a run."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..results import LossOutput

_FIELDS = ("log_ratio", "kl", "kept")


@dataclass(frozen=True)
class RowPart:
    """Rows of one micro-batch.

    Attributes:
        update: number of the optimizer step in its iteration.
        steps: indices in the schedule, S of them.
        rows: numbers in the rollout, b of them.
        numbers: ``[3, b, S]`` log-ratio, mean-reduced KL, and 1 where the row was kept; on the device. None where they
            travel apart.
    """

    update: int
    steps: tuple[int, ...]
    rows: tuple[int, ...]
    numbers: Tensor | None

    def without_numbers(self) -> RowPart:
        return dataclasses.replace(self, numbers=None)


def row_part(out: LossOutput, update: int, steps: Sequence[int], rows: Sequence[int]) -> RowPart:
    """The rows of a loss call on ``[b, S]``; no host sync."""
    numbers = torch.stack([out.rows.log_ratio, out.rows.kl, out.rows.kept.to(out.rows.kl.dtype)])
    return RowPart(update, tuple(steps), tuple(rows), numbers.float())


def row_lines(
    iteration: int, elements: int, parts: Sequence[RowPart], numbers: Sequence[float], advantages: Sequence[float]
) -> Iterator[str]:
    """JSON lines, one per update and set of steps: ``iteration``, ``update``, ``steps`` [S], ``elements`` N per row,
    ``rows`` [b], ``advantage`` [b], and ``log_ratio``, ``kl`` (mean-reduced), ``kept`` [b][S].

    Args:
        numbers: those of all ``parts`` in order, as they were read from the device.
        advantages: of all rows of the rollout.
    """
    lines: dict[tuple, dict] = {}
    start = 0
    for part in parts:
        key = (part.update, part.steps)
        line = lines.setdefault(key, {"rows": [], **{name: [] for name in _FIELDS}})
        line["rows"] += part.rows
        count, width = len(part.rows), len(part.steps)
        for name in _FIELDS:
            for _ in range(count):
                values = numbers[start : start + width]
                line[name].append([int(x) for x in values] if name == "kept" else list(values))
                start += width
    # processes are gathered one after the other
    for (update, steps), line in sorted(lines.items(), key=lambda item: item[0][0]):
        head = {"iteration": iteration, "update": update, "steps": list(steps), "elements": elements}
        yield json.dumps({**head, "advantage": [advantages[row] for row in line["rows"]], **line})


def drop_later_lines(path: Path, iteration: int) -> None:
    """Cuts lines of iterations after ``iteration``, and one that was torn by a kill, off a log such as ``rows.jsonl``.

    Iterations are written in order, so what stays is a beginning of the file.
    """
    if not path.exists():
        return
    end = 0
    with open(path, "rb") as log:
        for line in log:
            try:
                later = not line.endswith(b"\n") or json.loads(line)["iteration"] > iteration
            except ValueError:
                later = True
            if later:
                break
            end += len(line)
    os.truncate(path, end)
