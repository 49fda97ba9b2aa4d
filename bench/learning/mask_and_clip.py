"""The figure of the README: rows of one Flow-GRPO run under its ratio clip and under a KL mask that drops as many.

``python -m bench.learning rows RUN`` runs a run's request again (seconds), checks that its rows are those of the
summary, and keeps the decisions of all rows and some of the rows in ``rows.json``; ``document`` draws that.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes

from flowdppo_fast.runs import figures as style
from flowdppo_fast.runs.row_log import LoggedRows, read_rows
from flowdppo_fast.trainer import FlowDPPOConfig, FlowDPPOTrainer

from .decisions import decision_table, summary
from .tasks import NamedRewards, load_task

# rows that are kept and drawn: enough to see the cloud, few enough to see the dots
DOTS = 800
_NEAR, _FAR, _RIGHT = style.VERMILION, "#6A3D9A", "#9AA1A9"


def rows_of(request: Mapping[str, Any]) -> LoggedRows:
    """The row log of a request, which is trained again for it."""
    torch.set_num_threads(1)
    task = load_task(request["task"])
    with tempfile.TemporaryDirectory(prefix="bench-learning-") as folder:
        config = FlowDPPOConfig.from_dict(request["trainer"])
        config.run.output_dir, config.run.row_log = folder + "/run", True
        FlowDPPOTrainer(task.pipeline(), NamedRewards(task, request["rewards"]), task.trained, config).train()
        return read_rows(Path(folder) / "run" / "rows.jsonl")


def record(recorded: Mapping[str, Any], name: str) -> dict[str, Any]:
    """What ``rows.json`` holds of a run called ``name``: its decisions, and an even choice of the rows that
    move away.

    Raises:
        ValueError: the run has no ratio clip, or gives other rows here than it did where its file was made.
    """
    request = recorded["request"]
    if request["trainer"]["objective"]["name"] != "ratio_clip":
        raise ValueError(f"{name}: got method {request['method']!r}, expected one that clips the ratio")
    rows = rows_of(request)
    if json.loads(json.dumps(summary(rows, request["evaluation"]["clips"]))) != recorded["rows"]:
        raise ValueError(f"{name}: the rows of this run are not those of its summary")
    away = rows.moved.where(rows.moved.away)
    shown = away.where(np.arange(len(away)) % -(-len(away) // DOTS) == 0)
    return {
        "run": name,
        **decision_table(rows.moved, [request["bound"]])[0],
        "moved_rows": len(rows.moved),
        "away_rows": len(away),
        "kl": [float(f"{value:.4g}") for value in shown.kl],
        "log_ratio": [float(f"{value:.4g}") for value in shown.log_ratio],
    }


@style.style()
def draw(held: Mapping[str, Any], path: Path) -> Path:
    """Two panels of the same rows, from what ``rows.json`` holds."""
    kl, ratio = np.array(held["kl"]), np.abs(held["log_ratio"])
    figure, (left, right) = style.panels(2, height=4.5, sharey=True)
    for axis in (left, right):
        _dots(axis, kl, ratio, held["clip"], held["threshold"])
        axis.set_xlabel("distance to the old policy:\nexact KL of the row [nats]")
        axis.set(xscale="log", yscale="log")
        # rows without a ratio to speak of go far down and say nothing
        axis.set(xlim=(kl.min() / 1.2, kl.max() * 1.2), ylim=(2e-3, 1.3 * ratio.max()))
        style.log_scale(axis.xaxis)
        style.log_scale(axis.yaxis)
    left.set_ylabel("size of the log-ratio of one sample [nats]")
    left.set_title("Ratio clip: a noisy number decides")
    right.set_title("KL mask: the exact distance decides")
    left.axhspan(held["clip"], left.get_ylim()[1], color=style.VERMILION, alpha=0.1, linewidth=0, zorder=0)
    left.axhline(held["clip"], color=style.VERMILION)
    right.axvspan(held["threshold"], right.get_xlim()[1], color=style.BLUE, alpha=0.1, linewidth=0, zorder=0)
    right.axvline(held["threshold"], color=style.BLUE)
    _say(left, 0.03, 0.97, f"near, yet DROPPED:\n{100 * held['spurious']:.0f} % of what it drops", _NEAR)
    _say(left, 0.97, 0.03, "far, yet KEPT:\nas many", _FAR)
    _say(right, 0.03, 0.97, "near: kept", _NEAR)
    _say(right, 0.97, 0.03, "far: dropped", _FAR)
    return style.save(figure, path)


def _dots(axis: Axes, kl: np.ndarray, ratio: np.ndarray, clip: float, threshold: float) -> None:
    near, small = kl < threshold, ratio <= clip
    for chosen, colour, marker, size in (
        (near == small, _RIGHT, "o", 7),
        (near & ~small, _NEAR, "s", 16),
        (~near & small, _FAR, "^", 20),
    ):
        axis.scatter(kl[chosen], ratio[chosen], s=size, color=colour, marker=marker, linewidths=0, zorder=2)


def _say(axis: Axes, x: float, y: float, text: str, colour: str) -> None:
    """Words in a corner of a plot, on paper so that dots beneath do not blur them."""
    axis.text(
        x, y, text, transform=axis.transAxes, color=colour, fontweight="bold", ha="left" if x < 0.5 else "right",
        va="bottom" if y < 0.5 else "top",
        bbox={"facecolor": style.PAPER, "edgecolor": "none", "alpha": 0.85, "pad": 3},
    )  # fmt: skip
