"""One style for every figure of the project: runs, ``flowdppo diagnose``, benchmarks, examples.

Figures are 8 inches wide, so that text of 10 points is read at the 800 pixels that a page gives them, on an opaque
white card with a thin frame, which light and dark pages carry alike. What a thing looks like is decided here, by its
name: the same method or form of a loss has one colour, marker and dash everywhere. The colours are Okabe and Ito's,
which colour-blind readers can tell apart; marker and dash say the same again. The same numbers give the same bytes.

matplotlib is imported when something is drawn.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

WIDTH = 8.0  # inches
# twice the pixels of a page, for screens that have them
_DPI = 200
# colours in a PNG; more than all lines and their edges need, and a third of the bytes
_PNG_COLOURS = 192

BLUE, SKY, GREEN, AMBER = "#0072B2", "#56B4E9", "#009E73", "#E69F00"
VERMILION, PURPLE = "#D55E00", "#CC79A7"
INK, GREY, PALE, PAPER = "#1F2328", "#656D76", "#C4C9CF", "#FFFFFF"
_FRAME, _GRID = "#D0D7DE", "#E6E9ED"


class Look(NamedTuple):
    """Colour, marker and dash of one thing."""

    colour: str
    marker: str
    line: Any = "-"

    def kwargs(self, **more: Any) -> dict[str, Any]:
        """As arguments of ``plot`` and ``errorbar``."""
        return {"color": self.colour, "marker": self.marker, "linestyle": self.line, **more}


METHODS = {
    "unclipped": Look(GREY, "x", ":"),
    "flow_grpo": Look(VERMILION, "s"),
    "flow_cps": Look(AMBER, "D", "--"),
    "grpo_guard": Look(PURPLE, "P", "-."),
    "flow_dppo": Look(BLUE, "o"),
    "flow_dppo_cps": Look(SKY, "^", "--"),
    "symmetric": Look(GREEN, "v", "-."),
}
# forms of this library's losses by what they start from, and what trainers run without it
FORMS = {
    "velocity": Look(BLUE, "o"),
    "seeded": Look(SKY, "v"),
    "single-pass": Look(GREEN, "D"),
    "means": Look(PURPLE, "P"),
    "step, then means": Look(AMBER, "X"),
    "eager": Look(INK, "s", "--"),
    "compiled": Look(VERMILION, "^", "-."),
}
# things without a look of their own, in the order in which they are drawn
SERIES = (
    Look(BLUE, "o", "-"),
    Look(GREEN, "^", "--"),
    Look(PURPLE, "s", ":"),
    Look(VERMILION, "D", "-."),
    Look(AMBER, "P", (0, (6, 1.5))),
    Look(SKY, "v", (0, (1, 1))),
)

_STYLE = {
    "figure.facecolor": PAPER,
    "savefig.facecolor": PAPER,
    "figure.constrained_layout.h_pad": 0.09,
    "figure.constrained_layout.w_pad": 0.09,
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.titlepad": 8,
    "axes.labelsize": 10,
    "xtick.labelsize": 9.5,
    "ytick.labelsize": 9.5,
    "legend.fontsize": 9.5,
    "legend.frameon": False,
    "legend.borderaxespad": 0.2,
    "figure.titlesize": 11,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.edgecolor": GREY,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "grid.color": _GRID,
    "grid.linewidth": 0.8,
    "lines.linewidth": 1.8,
    "lines.markersize": 5.5,
    "hatch.linewidth": 1.0,
}


@contextmanager
def style() -> Iterator[None]:
    """Draw inside it, or decorate what draws: the project's style, nothing of the caller's, which comes back after."""
    from matplotlib.style import context

    with context(["default", _STYLE]):
        yield


def panels(count: int, *, columns: int = 2, height: float = 3.2, **options: Any) -> tuple[Figure, list[Axes]]:
    """A figure with ``count`` plots of ``height`` inches, ``columns`` to a row; ``options`` as for ``subplots``."""
    from matplotlib.figure import Figure

    columns = min(columns, count)
    rows = -(-count // columns)
    # no pyplot: it would change what the caller draws with
    figure = Figure(figsize=(WIDTH, height * rows), dpi=_DPI, layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False, **options).flat)
    for axis in axes[count:]:
        axis.set_axis_off()
    return figure, axes[:count]


def legend(figure: Figure, axes: Iterable[Axes], columns: int = 4) -> None:
    """One legend of all ``axes`` beneath the plots, where it hides nothing."""
    named: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels()):
            named.setdefault(label, handle)
    if named:
        figure.legend(list(named.values()), list(named), loc="outside lower center", ncols=min(columns, len(named)))


def legend_beside(axis: Axes) -> None:
    """The legend of one plot to the right of it."""
    axis.legend(loc="upper left", bbox_to_anchor=(1.01, 1.03), borderaxespad=0.0)


def log_scale(axis: Axis) -> None:
    """Makes ``ax.xaxis`` or ``ax.yaxis`` logarithmic, with ticks that are read without counting. Call it when all is
    drawn: an axis of fewer than two decades gets the steps 1, 2, 5."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    getattr(axis.axes, f"set_{axis.axis_name}scale")("log")  # type: ignore[attr-defined]
    low, high = axis.get_view_interval()
    steps = (1.0,) if high > 100 * low else (1.0, 2.0, 5.0)
    axis.set_major_locator(LogLocator(subs=steps, numticks=8))
    axis.set_minor_locator(LogLocator(subs="auto", numticks=100))
    axis.set_major_formatter(FuncFormatter(lambda value, _: _log_text(value, *axis.get_view_interval())))
    axis.set_minor_formatter(NullFormatter())


def _log_text(value: float, low: float, high: float) -> str:
    """``0.01`` or ``10,000`` on an axis that stays near 1, else a power of ten."""
    if value <= 0:
        return ""
    if low > 3e-4 and high < 3e5:
        return f"{value:,.10g}"
    power = math.floor(math.log10(value) + 1e-9)
    digits = f"{value / 10.0**power:.4g}"
    return f"$10^{{{power}}}$" if digits == "1" else f"${digits}\\times10^{{{power}}}$"


def save(figure: Figure, path: Path) -> Path:
    """Writes a PNG, replaced at once so that a reader never sees half of it; no date or version is in it."""
    from PIL import Image

    figure.patch.set(edgecolor=_FRAME, linewidth=1.5)
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn, temporary = io.BytesIO(), path.with_name(f".{path.name}.writing")
    figure.savefig(drawn, format="png", dpi="figure", edgecolor=_FRAME)
    drawn.seek(0)
    with Image.open(drawn) as image:
        small = image.convert("RGB").quantize(_PNG_COLOURS, dither=Image.Dither.NONE)
    small.save(temporary, format="png", optimize=True)
    os.replace(temporary, path)
    return path
