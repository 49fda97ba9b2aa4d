"""Figures from run files alone. Colours are Okabe and Ito's, and the marker says the same again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from . import analyses
from .methods import METHODS
from .results import Run
from .statistics import estimate

STYLES = {
    "unclipped": ("#595959", "x", ":"),
    "flow_grpo": ("#D55E00", "s", "-"),
    "flow_cps": ("#E69F00", "D", "--"),
    "grpo_guard": ("#CC79A7", "P", "-."),
    "flow_dppo": ("#0072B2", "o", "-"),
    "flow_dppo_cps": ("#56B4E9", "^", "--"),
    "symmetric": ("#009E73", "v", "-."),
}
DRIFT = "drift from the pretrained model [nats per image]"


def save(figure: Figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def panels(count: int, width: float = 5.2, height: float = 4.2) -> tuple[Figure, Sequence[Axes]]:
    """A figure with ``count`` plots, two to a row."""
    columns = min(count, 2)
    rows = -(-count // columns)
    size = (width * columns, height * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat[:count]:
        axis.grid(alpha=0.3)
    for axis in axes.flat[count:]:
        axis.set_axis_off()
    return figure, axes.flat[:count]


def legend_beside(figure: Figure, axes: Iterable[Axes]) -> None:
    """One legend of all ``axes`` to the right of the plots."""
    named: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels()):
            named.setdefault(label, handle)
    figure.legend(list(named.values()), list(named), fontsize=9, loc="outside right upper", frameon=False)


def along_training(
    runs: Sequence[Run],
    tasks: Iterable[str],
    measures: tuple[Callable[[Mapping], float], Callable[[Mapping], float]],
    labels: tuple[str, str],
    path: Path,
    chosen: Mapping[str, Mapping],
    evaluations: Callable[[Run], Sequence[Mapping]],
) -> Path | None:
    """Medians of two measures (x, y) over the tuned runs' evaluations; a line per method, a panel per task."""
    x, y = measures
    tasks = [task for task in tasks if analyses.plain(runs, task)]
    if not tasks:
        return None
    figure, axes = panels(len(tasks))
    for axis, task in zip(axes, tasks):
        for method, (colour, marker, line) in STYLES.items():
            members = analyses.tuned(analyses.plain(runs, task), method, chosen)
            if members:
                grid = np.array([[(x(e), y(e)) for e in evaluations(run)] for run in members])
                middle = np.median(grid, axis=0)
                axis.plot(grid[:, :, 0].T, grid[:, :, 1].T, color=colour, alpha=0.15, linewidth=0.7)
                label = METHODS[method].label
                axis.plot(*middle.T, color=colour, marker=marker, linestyle=line, label=label)
        axis.set(xlabel=labels[0], ylabel=labels[1], title=task)
    legend_beside(figure, axes)
    return save(figure, path)


def against(groups: Mapping[str, Mapping[float, Sequence[float]]], axis: Axes, label: str) -> None:
    """Median and 95 % interval against a setting on a logarithmic axis, one line per method."""
    for number, (method, points) in enumerate(groups.items()):
        colour, marker, line = STYLES[method]
        xs = sorted(points)
        found = [estimate(points[x]) for x in xs]
        middle = np.array([e.median for e in found])
        low = np.array([e.median - e.low if e.low == e.low else 0 for e in found])
        high = np.array([e.high - e.median if e.high == e.high else 0 for e in found])
        # a little beside each other, or the intervals would hide one another
        places = [x * 1.04 ** (number - len(groups) / 2) for x in xs]
        axis.errorbar(
            places, middle, yerr=[low, high], color=colour, marker=marker, linestyle=line, capsize=3,
            label=METHODS[method].label,
        )  # fmt: skip
    axis.set_xscale("log")
    axis.set_xlabel(label)


def bars(values: Mapping[str, Mapping[str, Sequence[float]]], axis: Axes, label: str) -> None:
    """Median and interval per method, grouped by the inner keys (rewards)."""
    names = list(dict.fromkeys(name for entries in values.values() for name in entries))
    hatches = ("", "//", "..", "xx")
    width = 0.8 / max(len(names), 1)
    for place, name in enumerate(names):
        for number, (method, entries) in enumerate(values.items()):
            if name in entries:
                found = estimate(entries[name])
                error = None if found.low != found.low else [[found.median - found.low], [found.high - found.median]]
                axis.bar(
                    number + (place - (len(names) - 1) / 2) * width, found.median, width, yerr=error, capsize=2,
                    color=STYLES[method][0], hatch=hatches[place % 4], edgecolor="white",
                )  # fmt: skip
    axis.set_xticks(range(len(values)), [METHODS[method].label for method in values], rotation=35, ha="right")
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set_ylabel(label)
    shown = [
        Patch(facecolor="#595959", edgecolor="white", hatch=hatch, label=name) for hatch, name in zip(hatches, names)
    ]
    axis.legend(
        handles=shown, fontsize=8, ncols=len(names), loc="upper center", bbox_to_anchor=(0.5, -0.28), frameon=False
    )
