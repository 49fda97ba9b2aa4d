"""Figures from results alone: time against size, bandwidth fraction, memory, error."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from flowdppo_fast.runs import figures

from .results import TOTAL, Record, best_backend, by_name
from .table import describe

# contenders other than this library's forms, and their looks
_PEERS = {"peer-eager, no syncs": "eager", "peer-compiled": "compiled"}
_FORMS = ("velocity", "seeded", "single-pass", "means", "step, then means")


def draw(result: Mapping[str, Any], folder: Path) -> list[Path]:
    """Writes one PNG per figure into ``folder`` and returns their paths."""
    backend = best_backend(result)
    looks = {name: figures.FORMS[form] for name, form in _PEERS.items()}
    looks |= {f"{backend}/{form}": figures.FORMS[form] for form in _FORMS}
    drawn: tuple[tuple[str, str, Callable[[Record], float | None], bool], ...] = (
        ("time", "forward + backward [ms]", _milliseconds, True),
        ("bandwidth", "bytes that must move per time\n[% of copy bandwidth]", _bandwidth, False),
        ("memory", "peak memory besides\ninputs and gradient [MB]", _megabytes, True),
        ("error", "relative error of the gradient\nagainst float64 [1]", _error, True),
    )
    return [
        _figure(result, looks, label, value, logarithmic, folder / f"{name}.png")
        for name, label, value, logarithmic in drawn
    ]


@figures.style()
def _figure(
    result: Mapping[str, Any],
    looks: Mapping[str, figures.Look],
    label: str,
    value: Callable[[Record], float | None],
    logarithmic: bool,
    path: Path,
) -> Path:
    threads = max((case["threads"] or 0 for case in result["cases"]), default=0)
    dtypes = sorted({case["dtype"] for case in result["cases"]})
    # what rounding decides has another range in every dtype
    shared = value is not _error
    figure, axes = figures.panels(max(1, len(dtypes)), height=3.9, sharey=shared)
    for axis, dtype in zip(axes, dtypes):
        cases = [c for c in result["cases"] if c["dtype"] == dtype and (c["threads"] or 0) == threads]
        _lines(axis, result, cases, looks, value, logarithmic)
        axis.set_title(dtype + (f", {threads} threads" if threads else ""))
        axis.set_xlabel("rows x elements per row")
        figures.log_scale(axis.xaxis)
        if logarithmic:
            figures.log_scale(axis.yaxis)
    axes[0].set_ylabel(label)
    figures.legend(figure, axes)
    warning = "REHEARSAL, " if result["device"] == "rehearsal" else "QUICK RUN, " if result["quick"] else ""
    figure.suptitle(warning + describe(result), fontsize=9, color=figures.GREY)
    return figures.save(figure, path)


def _lines(
    axis: Axes,
    result: Mapping[str, Any],
    cases: list[Mapping[str, Any]],
    looks: Mapping[str, figures.Look],
    value: Callable[[Record], float | None],
    logarithmic: bool,
) -> None:
    for number, (name, look) in enumerate(looks.items()):
        points: dict[int, list[float]] = {}
        for case in cases:
            record = by_name(result, case).get(name)
            y = value(record) if record else None
            if y is not None and (y > 0 or not logarithmic):
                points.setdefault(math.prod(case["rows"]) * case["elements_per_row"], []).append(y)
        if points:
            # shapes of one size: a line through their middle, a mark for each
            sizes = sorted(points)
            form = look.kwargs(linewidth=1.4, markersize=4.5, zorder=3 - number / 10)
            axis.plot(sizes, [statistics.median(points[n]) for n in sizes], **{**form, "marker": ""})
            every = [(n, y) for n in sizes for y in points[n]]
            axis.plot(*zip(*every), **{**form, "linestyle": ""})
            axis.plot([], [], **look.kwargs(label=name))


def _milliseconds(record: Record) -> float | None:
    taken = record.time(TOTAL)
    return taken.median / 1e6 if taken else None


def _bandwidth(record: Record) -> float | None:
    fraction = record.bandwidth_fraction(TOTAL)
    return None if fraction is None else 100 * fraction


def _megabytes(record: Record) -> float | None:
    extra = record.entry.get("extra_bytes_total")
    return None if extra is None else extra / 1e6


def _error(record: Record) -> float | None:
    return record.entry["errors"]["gradient"]
