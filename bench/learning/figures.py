"""Figures from run files alone: methods along training, against a setting, and side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from flowdppo_fast.runs import figures as style

from . import analyses
from .methods import METHODS
from .results import Run
from .statistics import Estimate, estimate

DRIFT = "drift from the pretrained model\n[nats per image]"
# tasks are told apart by what no method has
TASKS = {"digits": style.Look(style.INK, "o"), "shapes": style.Look("#A39A8E", "s", "--")}


def along_training(
    runs: Sequence[Run],
    tasks: Iterable[str],
    measures: tuple[Callable[[Mapping], float], Callable[[Mapping], float]],
    labels: tuple[str, str],
    path: Path,
    chosen: Mapping[str, Mapping],
    evaluations: Callable[[Run], Sequence[Mapping]],
) -> Path | None:
    """Medians of two measures (x, y) over the tuned runs' evaluations, and each run's last of them; a line per method,
    a panel per task."""
    x, y = measures
    tasks = [task for task in tasks if analyses.plain(runs, task)]
    if not tasks:
        return None
    figure, axes = style.panels(len(tasks), height=4.4)
    for axis, task in zip(axes, tasks):
        for method, look in style.METHODS.items():
            members = analyses.tuned(analyses.plain(runs, task), method, chosen)
            if members:
                grid = np.array([[(x(e), y(e)) for e in evaluations(run)] for run in members])
                axis.scatter(*grid[:, -1].T, s=12, color=look.colour, alpha=0.35, linewidths=0)
                axis.plot(*np.median(grid, axis=0).T, **look.kwargs(label=METHODS[method].label))
        axis.set(xlabel=labels[0], title=task)
    axes[0].set_ylabel(labels[1])
    axes[0].scatter([], [], s=12, color=style.GREY, alpha=0.6, linewidths=0, label="last point of each run")
    style.legend(figure, axes)
    return style.save(figure, path)


def against(groups: Mapping[str, Mapping[float, Sequence[float]]], axis: Axes, label: str) -> None:
    """Median and 95 % interval against a setting on a logarithmic axis, one line per method."""
    for number, (method, points) in enumerate(groups.items()):
        xs = sorted(points)
        # a little beside each other, or the intervals would hide one another
        places = [x * 1.06 ** (number - (len(groups) - 1) / 2) for x in xs]
        _intervals(axis, method, places, [estimate(points[x]) for x in xs])
    style.log_scale(axis.xaxis)
    axis.set_xlabel(label)


def side_by_side(values: Mapping[str, Mapping[str, Sequence[float]]], axis: Axes, label: str) -> None:
    """Median and 95 % interval per method within each of the inner keys (rewards)."""
    names = list(dict.fromkeys(name for entries in values.values() for name in entries))
    for number, (method, entries) in enumerate(values.items()):
        shift = 0.7 * (number - (len(values) - 1) / 2) / max(len(values), 1)
        places = [place + shift for place, name in enumerate(names) if name in entries]
        _intervals(axis, method, places, [estimate(entries[name]) for name in names if name in entries], line="")
    for place in range(1, len(names)):
        axis.axvline(place - 0.5, color=style.PALE, linewidth=0.8)
    axis.axhline(0, color=style.INK, linewidth=0.8)
    axis.set_xticks(range(len(names)), names)
    axis.set_xlim(-0.5, len(names) - 0.5)
    axis.grid(False, axis="x")
    axis.set_ylabel(label)


def _intervals(
    axis: Axes, method: str, places: Sequence[float], found: Sequence[Estimate], line: str | None = None
) -> None:
    """Medians with their intervals, which fewer than three seeds do not have."""
    look = style.METHODS[method]
    middle = np.array([e.median for e in found])
    low, high = (np.array([getattr(e, side) for e in found]) for side in ("low", "high"))
    reach = np.nan_to_num([middle - low, high - middle])
    # no cap where there is no interval: it would be taken for a small one
    axis.errorbar(
        places, middle, yerr=np.where(reach > 0, reach, np.nan), elinewidth=1.2, capsize=2.5,
        **look.kwargs(linestyle=look.line if line is None else line, label=METHODS[method].label),
    )  # fmt: skip
