"""Plots of a run: reward, KL, masked fraction, gradient norm and seconds over the iterations."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from . import figures

_EVALUATION, _LAST_EVALUATION = "eval/", "eval_final/"
# panel: label of its axis, logarithmic, factor, metrics with the name of their line
_PANELS: tuple[tuple[str, bool, float, dict[str, str]], ...] = (
    ("KL(old || new)\n[nats per\ndenoising step]", True, 1.0, {"kl_new_old_nats": "mean over rows"}),
    (
        "rows dropped\nby the bound\n[% of rows]",
        False,
        100.0,
        {"masked_fraction": "all", "pos_rm_fraction": "advantage > 0", "neg_rm_fraction": "advantage < 0"},
    ),
    ("gradient norm\nbefore clipping\n[1]", True, 1.0, {"grad_norm": "mean over updates"}),
    (
        "time of an iteration\n[s]",
        False,
        1.0,
        {"seconds_sampling": "sampling and rewards", "seconds_updates": "updates"},
    ),
)


@figures.style()
def plot_run(history: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draws the metrics of a run as one PNG; what a run does not log has no line, what is not finite is a gap.

    Args:
        history: metrics by iteration, each with ``iteration``.
        path: the PNG, replaced at once so that a reader never sees half of it.
    """
    rewards = {"reward": "weighted sum"} if "reward" in history[0] else {}
    names = dict.fromkeys(name for metrics in history for name in metrics)
    rewards |= {name: name.partition("/")[2] for name in names if name.startswith("reward/")}
    rewards |= {
        name: f"{name.removeprefix(_EVALUATION)} (evaluation)" for name in names if name.startswith(_EVALUATION)
    }
    panels = [("reward\n[as the rewards\ndefine it]", False, 1.0, rewards), *_PANELS]
    figure, axes = figures.panels(len(panels), columns=1, height=2.0, sharex=True)
    for axis, (label, logarithmic, factor, lines) in zip(axes, panels):
        drawn, values = 0, []
        for name, text in lines.items():
            points = _points(history, name, factor)
            if points:
                look = figures.SERIES[drawn % len(figures.SERIES)]
                # a line of one point would not be seen
                marker = look.marker if len(points) < 3 or len(points) < len(history) else ""
                axis.plot(*zip(*points), **look.kwargs(marker=marker, label=text))
                drawn += 1
                values += [value for _, value in points]
        # zeros (no update yet) have no place on a logarithmic axis
        if logarithmic and any(value > 0 for value in values):
            figures.log_scale(axis.yaxis)
        axis.set_ylabel(label)
        if drawn:
            figures.legend_beside(axis)
    axes[-1].set_xlabel("iteration [rollouts]")
    figure.align_ylabels()
    figures.save(figure, path)


def _points(history: Sequence[Mapping[str, Any]], name: str, factor: float) -> list[tuple[int, float]]:
    found = [(m["iteration"], m[name]) for m in history if name in m]
    if name.startswith(_EVALUATION):
        # an iteration begins with its evaluation; the last one of a run ends with another
        final = name.replace(_EVALUATION, _LAST_EVALUATION)
        found = [(iteration - 1, value) for iteration, value in found]
        found += [(m["iteration"], m[final]) for m in history if final in m]
    return [(iteration, value * factor if math.isfinite(value) else math.nan) for iteration, value in found]
