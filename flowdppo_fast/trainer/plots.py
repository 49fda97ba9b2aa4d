"""Plots of a run: reward, KL, masked fraction, gradient norm and seconds over the iterations."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# Okabe and Ito's palette, which colour-blind readers can tell apart; lines differ in their dashes too
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_DASHES = ("-", "--", ":", "-.", (0, (5, 1)), (0, (1, 1)))
_EVALUATION, _LAST_EVALUATION = "eval/", "eval_final/"
# panel: label of its axis, logarithmic, factor, metrics with the name of their line
_PANELS: tuple[tuple[str, bool, float, dict[str, str]], ...] = (
    ("KL(old || new)\n[nats per denoising step]", True, 1.0, {"kl_new_old_nats": "mean over rows"}),
    (
        "rows dropped by the bound\n[% of rows]",
        False,
        100.0,
        {"masked_fraction": "all", "pos_rm_fraction": "advantage > 0", "neg_rm_fraction": "advantage < 0"},
    ),
    ("gradient norm\nbefore clipping [1]", True, 1.0, {"grad_norm": "mean over updates"}),
    (
        "time of an iteration\n[s]",
        False,
        1.0,
        {"seconds_sampling": "sampling and rewards", "seconds_updates": "updates"},
    ),
)


def plot_run(history: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draws the metrics of a run as one PNG; what a run does not log has no line, what is not finite is a gap.

    Args:
        history: metrics by iteration, each with ``iteration``.
        path: the PNG, replaced at once so that a reader never sees half of it.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rewards = {"reward": "weighted sum"} if "reward" in history[0] else {}
    names = dict.fromkeys(name for metrics in history for name in metrics)
    rewards |= {name: name.partition("/")[2] for name in names if name.startswith("reward/")}
    rewards |= {
        name: f"{name.removeprefix(_EVALUATION)} (evaluation)" for name in names if name.startswith(_EVALUATION)
    }
    panels = [("reward\n[as the rewards define it]", False, 1.0, rewards), *_PANELS]
    # no pyplot: it would change what the caller draws with
    figure = Figure(figsize=(9, 12), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(panels), 1, sharex=True)
    for axis, (label, logarithmic, factor, lines) in zip(axes, panels):
        drawn = 0
        for name, text in lines.items():
            points = _points(history, name, factor)
            if points:
                style = drawn % len(_COLOURS)
                # a line of one point would not be seen
                marker = "o" if len(points) < 3 or len(points) < len(history) else ""
                axis.plot(*zip(*points), color=_COLOURS[style], linestyle=_DASHES[style], marker=marker, label=text)
                drawn += 1
        # zeros (no update yet) have no place on a logarithmic axis
        if logarithmic and any(value > 0 for line in axis.lines for value in line.get_ydata()):
            axis.set_yscale("log")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
        if drawn:
            axis.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False)
    axes[-1].set_xlabel("iteration [rollouts]")
    temporary = path.with_name(f".{path.name}.writing")
    figure.savefig(temporary, dpi=110, format="png")
    os.replace(temporary, path)


def _points(history: Sequence[Mapping[str, Any]], name: str, factor: float) -> list[tuple[int, float]]:
    found = [(m["iteration"], m[name]) for m in history if name in m]
    if name.startswith(_EVALUATION):
        # an iteration begins with its evaluation; the last one of a run ends with another
        final = name.replace(_EVALUATION, _LAST_EVALUATION)
        found = [(iteration - 1, value) for iteration, value in found]
        found += [(m["iteration"], m[final]) for m in history if final in m]
    return [(iteration, value * factor if math.isfinite(value) else math.nan) for iteration, value in found]
