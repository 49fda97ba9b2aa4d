"""Figures from run files alone. Colours are Okabe and Ito's, and the marker says the same again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

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
    figure, axes = plt.subplots(1, count, figsize=(width * count, height), squeeze=False, layout="constrained")
    for axis in axes[0]:
        axis.grid(alpha=0.3)
    return figure, axes[0]


def along_training(
    runs: Sequence[Run],
    tasks: Iterable[str],
    measures: tuple[Callable[[Mapping], float], Callable[[Mapping], float]],
    labels: tuple[str, str],
    path: Path,
    chosen: Mapping[str, Mapping],
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
                grid = np.array([[(x(e), y(e)) for e in run.result["evaluations"]] for run in members])
                middle = np.median(grid, axis=0)
                axis.plot(grid[:, 1:, 0].T, grid[:, 1:, 1].T, color=colour, alpha=0.15, linewidth=0.7)
                label = f"{METHODS[method].label} (n={len(members)})"
                axis.plot(*middle.T, color=colour, marker=marker, linestyle=line, label=label)
        axis.set(xlabel=labels[0], ylabel=labels[1], title=task)
    axes[-1].legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)
    return save(figure, path)


def against(
    groups: Mapping[str, Mapping[float, Sequence[float]]], axis: Axes, label: str, *, logarithmic: bool = False
) -> None:
    """Median and 95 % interval against a setting, one line per method."""
    for method, points in groups.items():
        colour, marker, line = STYLES[method]
        xs = sorted(points)
        found = [estimate(points[x]) for x in xs]
        middle = np.array([e.median for e in found])
        low = np.array([e.median - e.low if e.low == e.low else 0 for e in found])
        high = np.array([e.high - e.median if e.high == e.high else 0 for e in found])
        axis.errorbar(
            xs, middle, yerr=[low, high], color=colour, marker=marker, linestyle=line, capsize=3,
            label=METHODS[method].label,
        )  # fmt: skip
    if logarithmic:
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
                    label=name if number == 0 else None,
                )  # fmt: skip
    axis.set_xticks(range(len(values)), [METHODS[method].label for method in values], rotation=35, ha="right")
    axis.set_ylabel(label)
    axis.legend(fontsize=8, frameon=False)
