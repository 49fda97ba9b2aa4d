"""One figure from results alone: time, stored bytes and peak memory of every contender."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.ops.table import describe
from flowdppo_fast.runs import figures

from .names import OURS, THEIRS
from .results import Spread, ratios, timed
from .table import peak_bytes

_COLOURS = {OURS: figures.FORMS["velocity"].colour, THEIRS: figures.FORMS["eager"].colour}


def draw(result: Mapping[str, Any], folder: Path) -> list[Path]:
    """Writes a PNG per workload into ``folder`` and returns their paths."""
    paths = []
    for workload in result["workloads"]:
        entries = list(timed(workload))
        if entries:
            paths.append(folder / f"{workload['name']}.png")
            _figure(result, workload, entries, paths[-1])
    return paths


@figures.style()
def _figure(result: Mapping[str, Any], workload: Mapping[str, Any], entries: list, path: Path) -> None:
    names = [entry["name"] for entry in entries]
    spreads = [ratios(workload, name) or Spread(1.0, 1.0, 1.0) for name in names]
    errors = [[s.median - s.low for s in spreads], [s.high - s.median for s in spreads]]
    panels = (
        ("iteration time\n[x this library's]", [s.median for s in spreads], errors),
        ("trajectory\n[MB per sample]", [entry["trajectory_bytes"] / 1e6 for entry in entries], None),
        ("peak memory\n[MB]", [(peak_bytes(entry) or 0) / 1e6 for entry in entries], None),
    )
    figure, axes = figures.panels(len(panels), columns=len(panels), height=3.4, sharey=True)
    for axis, (label, values, spread) in zip(axes, panels):
        colours = [_COLOURS.get(name, figures.PALE) for name in names]
        bars = axis.barh(names, values, xerr=spread, color=colours, ecolor=figures.VERMILION)
        axis.bar_label(bars, fmt="%.3g", padding=4)
        axis.set_xlabel(label)
        axis.margins(x=0.24)
        axis.grid(False, axis="y")
    axes[0].invert_yaxis()
    warning = "QUICK RUN, " if result["quick"] else ""
    figure.suptitle(f"{warning}{workload['name']}: {describe(result)}", fontsize=9, color=figures.GREY)
    figures.save(figure, path)
