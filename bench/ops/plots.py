"""Figures from results alone: time against size, bandwidth fraction, memory, error."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from .results import TOTAL, Record, best_backend, by_name
from .table import describe

# Okabe-Ito, distinguishable with any colour vision; the marker says the same again
_STYLES = (
    ("#000000", "o"),
    ("#D55E00", "s"),
    ("#0072B2", "^"),
    ("#56B4E9", "v"),
    ("#009E73", "D"),
    ("#CC79A7", "P"),
    ("#E69F00", "X"),
)


def draw(result: Mapping[str, Any], folder: Path) -> list[Path]:
    """Writes one PNG per figure into ``folder`` and returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    backend = best_backend(result)
    names = ("peer-eager, no syncs", "peer-compiled", *(f"{backend}/{form}" for form in _FORMS))
    styles = dict(zip(names, _STYLES))
    figures: tuple[tuple[str, str, Callable[[Record], float | None], bool], ...] = (
        ("time", "forward + backward, ms", _milliseconds, True),
        ("bandwidth", "bytes that must move / copy bandwidth, forward + backward, %", _bandwidth, False),
        ("memory", "peak memory besides inputs and gradient, MB", _megabytes, True),
        ("error", "relative error of the gradient against float64", _error, True),
    )
    paths = []
    for name, label, value, logarithmic in figures:
        path = folder / f"{name}.png"
        _figure(result, styles, label, value, logarithmic, path)
        paths.append(path)
    return paths


_FORMS = ("velocity", "seeded", "single-pass", "means", "step, then means")


def _figure(
    result: Mapping[str, Any],
    styles: Mapping[str, tuple[str, str]],
    label: str,
    value: Callable[[Record], float | None],
    logarithmic: bool,
    path: Path,
) -> None:
    threads = max((case["threads"] or 0 for case in result["cases"]), default=0)
    dtypes = sorted({case["dtype"] for case in result["cases"]})
    figure, axes = plt.subplots(1, max(1, len(dtypes)), figsize=(6.4 * max(1, len(dtypes)), 4.8), squeeze=False)
    for axis, dtype in zip(axes[0], dtypes):
        cases = [c for c in result["cases"] if c["dtype"] == dtype and (c["threads"] or 0) == threads]
        _lines(axis, result, cases, styles, value, logarithmic)
        axis.set_title(dtype + (f", {threads} threads" if threads else ""))
        axis.set_xlabel("latent elements in the call (rows x elements per row)")
        axis.set_ylabel(label)
        axis.grid(True, which="major", alpha=0.3)
    axes[0][-1].legend(fontsize=8)
    warning = "REHEARSAL, " if result["device"] == "rehearsal" else "QUICK RUN, " if result["quick"] else ""
    figure.suptitle(warning + describe(result), fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _lines(
    axis: Axes,
    result: Mapping[str, Any],
    cases: list[Mapping[str, Any]],
    styles: Mapping[str, tuple[str, str]],
    value: Callable[[Record], float | None],
    logarithmic: bool,
) -> None:
    axis.set_xscale("log")
    if logarithmic:
        axis.set_yscale("log")
    for name, (color, marker) in styles.items():
        points = []
        for case in cases:
            record = by_name(result, case).get(name)
            y = value(record) if record else None
            if y is not None and (y > 0 or not logarithmic):
                rows = 1
                for size in case["rows"]:
                    rows *= size
                points.append((rows * case["elements_per_row"], y))
        if points:
            xs, ys = zip(*sorted(points))
            axis.plot(xs, ys, color=color, marker=marker, label=name, linewidth=1.2, markersize=5)


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
