"""One figure from results alone: time, stored bytes and peak memory of every contender."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from bench.ops.table import describe

from .names import OURS, THEIRS
from .results import Spread, ratios, timed
from .table import peak_bytes

_COLORS = {OURS: "#009E73", THEIRS: "#D55E00"}


def draw(result: Mapping[str, Any], folder: Path) -> list[Path]:
    """Writes a PNG per workload into ``folder`` and returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for workload in result["workloads"]:
        entries = list(timed(workload))
        if entries:
            paths.append(folder / f"{workload['name']}.png")
            _figure(result, workload, entries, paths[-1])
    return paths


def _figure(result: Mapping[str, Any], workload: Mapping[str, Any], entries: list, path: Path) -> None:
    names = [entry["name"] for entry in entries]
    spreads = [ratios(workload, name) or Spread(1.0, 1.0, 1.0) for name in names]
    errors = [[s.median - s.low for s in spreads], [s.high - s.median for s in spreads]]
    panels = (
        ("iteration time over this library's", [s.median for s in spreads], errors),
        ("trajectory MB per sample", [entry["trajectory_bytes"] / 1e6 for entry in entries], None),
        ("peak memory, MB", [(peak_bytes(entry) or 0) / 1e6 for entry in entries], None),
    )
    figure, axes = plt.subplots(1, len(panels), figsize=(13, 3.6), sharey=True)
    for axis, (label, values, spread) in zip(axes, panels):
        bars = axis.barh(names, values, xerr=spread, color=[_COLORS.get(name, "#56B4E9") for name in names])
        axis.bar_label(bars, fmt="%.3g", padding=3, fontsize=8)
        axis.set_xlabel(label)
        axis.margins(x=0.15)
        axis.grid(True, axis="x", alpha=0.3)
    axes[0].invert_yaxis()
    warning = "QUICK RUN, " if result["quick"] else ""
    figure.suptitle(f"{warning}{workload['name']}: {describe(result)}", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
