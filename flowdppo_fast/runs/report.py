"""``flowdppo report RUN``: a run on one page, ``report.html``: curves, images by iteration, what stands out, settings.

The page holds everything that it shows and asks no network. A run writes it whenever it draws its plots.
"""

from __future__ import annotations

import argparse
import base64
import html
import io
import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from . import diagnose
from .figures import SERIES
from .logs import CHANGES_FILE, METRICS_FILE, ROWS_FILE, from_json, given, writing
from .reading import RunFolder
from .row_log import LoggedRows

REPORT_FILE = "report.html"
# pages of images of each kind that the report holds, and their longest edge
_SHEETS, _EDGE = 24, 1600
_PAGE = re.compile(r"(?P<kind>.+)-(?P<iteration>\d{6})\.png")
_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 460, 190, 62, 24
# title, whether logarithmic, factor, metrics by the name of their line
_CURVES: tuple[tuple[str, bool, float, dict[str, str]], ...] = (
    ("KL(old || new) [nats per denoising step]", True, 1.0, {"kl_new_old_nats": "mean over rows"}),
    (
        "rows dropped by the bound [%]",
        False,
        100.0,
        {"masked_fraction": "all", "pos_rm_fraction": "advantage > 0", "neg_rm_fraction": "advantage < 0"},
    ),
    ("gradient norm before clipping", True, 1.0, {"grad_norm": "mean over updates"}),
    ("learning rate", False, 1.0, {"learning_rate": "of the last update"}),
    (
        "time of an iteration [s]",
        False,
        1.0,
        {"seconds_sampling": "sampling and rewards", "seconds_updates": "updates"},
    ),
    ("peak memory of the device [GB]", False, 1e-9, {"peak_memory_bytes": "allocated"}),
)


def write_report(path: Path, page: Path | None = None) -> Path:
    """Writes the page of the run in ``path``; replaced at once, so that a reader never sees half of it.

    Raises:
        ValueError: no run is there.
        RuntimeError: the page cannot be written.
    """
    target = page or path / REPORT_FILE
    temporary = target.with_name(f".{target.name}.writing")
    text = report_of(path)
    with writing(target):
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, target)
    return target


def report_of(path: Path) -> str:
    """The page as HTML."""
    metrics = _metrics(path)
    folder = RunFolder.load(path) if (path / ROWS_FILE).is_file() and (path / ROWS_FILE).stat().st_size else None
    changes = _lines(path / CHANGES_FILE)
    parts = [
        _head(path, metrics),
        _section("What stands out", _verdict(folder)),
        _section("Curves", _curves(metrics, folder, [line["iteration"] for line in changes])),
        _section("Images", _sheets(path / "images")),
        _section("Rows dropped by denoising step", _by_step(folder)),
        _section("Changed when the run continued", _changed(changes)),
        _section("Settings", _settings(path)),
    ]
    body = "\n".join(part for part in parts if part)
    name = html.escape(path.resolve().name)
    head = f"<meta charset=utf-8><title>{name}</title>\n<style>{_STYLE}</style>\n<script>{_SCRIPT}</script>"
    return f"<!DOCTYPE html>\n<html lang=en>{head}\n{body}\n</html>\n"


def _metrics(path: Path) -> list[dict[str, Any]]:
    for name in ("config.yaml", METRICS_FILE):
        if not (path / name).is_file():
            raise ValueError(f"{path}: no {name} there, expected a run folder of FlowDPPOTrainer")
    metrics = _lines(path / METRICS_FILE)
    if not metrics:
        raise ValueError(f"{path}: {METRICS_FILE} is empty, expected a run of at least one iteration")
    return metrics


def _lines(path: Path) -> list[dict[str, Any]]:
    """Lines of a log; one that is being written is left out."""
    if not path.is_file():
        return []
    return [from_json(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def _section(title: str, content: str) -> str:
    return f"<section><h2>{title}</h2>\n{content}\n</section>" if content else ""


def _head(path: Path, metrics: Sequence[Mapping[str, Any]]) -> str:
    last = metrics[-1]
    seconds = [line.get("seconds_sampling", 0.0) + line.get("seconds_updates", 0.0) for line in metrics]
    facts = [f"iteration {last['iteration']}", f"{sum(seconds) / 3600:.2f} hours"]
    facts += [f"{name} {last[name]:.4g}" for name in ("reward", "eval/reward", "eval_final/reward") if name in last]
    return f"<h1>{html.escape(path.resolve().name)}</h1>\n<p>{html.escape(', '.join(facts))}</p>"


def _verdict(folder: RunFolder | None) -> str:
    if folder is None:
        return "<p>The run has no row log (run.row_log), from which troubles are named.</p>"
    found = diagnose.troubles(folder)
    if not found:
        return "<p class=good>Nothing stands out.</p>"
    items = (f"<li><b>{html.escape(one.name)}</b>: {html.escape(one.text)}</li>" for one in found)
    return f"<ul class=bad>{''.join(items)}</ul>"


def _curves(metrics: Sequence[Mapping[str, Any]], folder: RunFolder | None, changed: Sequence[int]) -> str:
    names = dict.fromkeys(name for line in metrics for name in line)
    rewards = {name: name for name in names if name == "reward" or name.startswith(("reward/", "eval/", "eval_final/"))}
    bounds: list[float] = []
    if folder is not None and folder.threshold:
        bounds = [folder.threshold * n for n in folder.rows.sizes]
    curves = [("reward", False, 1.0, rewards), *_CURVES]
    return "".join(
        _curve(metrics, *curve, bounds=bounds if "kl_new_old_nats" in curve[3] else [], changed=changed)
        for curve in curves
        if any(name in names for name in curve[3])
    )


def _curve(
    metrics: Sequence[Mapping[str, Any]], title: str, logarithmic: bool, factor: float, lines: Mapping[str, str], *,
    bounds: Sequence[float], changed: Sequence[int],
) -> str:  # fmt: skip
    """One panel as SVG; what is not finite, or not positive on a logarithmic axis, is a gap."""
    drawn = {
        text: points
        for name, text in lines.items()
        if (points := [(m["iteration"], m[name] * factor) for m in metrics if _drawable(m.get(name), logarithmic)])
    }
    values = [value for points in drawn.values() for _, value in points] + list(bounds)
    if not values:
        return ""
    scale = math.log10 if logarithmic else float
    low, high = scale(min(values)), scale(max(values))
    room = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    low, high = low - room, high + room
    first, last = metrics[0]["iteration"], max(metrics[-1]["iteration"], metrics[0]["iteration"] + 1)

    def place(iteration: float, value: float) -> str:
        across = _LEFT + (iteration - first) / (last - first) * (_WIDTH - _LEFT - 8)
        down = 8 + (high - scale(value)) / (high - low) * (_HEIGHT - _BOTTOM - 8)
        return f"{across:.1f},{down:.1f}"

    shapes, legend = [], []
    for number, (text, points) in enumerate(drawn.items()):
        colour = SERIES[number % len(SERIES)].colour
        shapes.append(f'<polyline points="{" ".join(place(*p) for p in points)}" stroke="{colour}"/>')
        shapes += [f'<circle cx="{p.split(",")[0]}" cy="{p.split(",")[1]}" r="2.5" fill="{colour}"/>'
                   for p in (place(*point) for point in points) if len(points) < 40]  # fmt: skip
        legend.append(f'<span style="color:{colour}">{html.escape(text)}</span>')
    for bound in bounds:
        (x1, y), (x2, _) = (place(at, bound).split(",") for at in (first, last))
        shapes.append(f'<line class=bound x1="{x1}" x2="{x2}" y1="{y}" y2="{y}"/>')
    if bounds:
        legend.append("<span>dotted: the bound</span>")
    for iteration in changed:
        x = place(max(iteration, first), values[0]).split(",")[0]
        shapes.append(f'<line class=change x1="{x}" x2="{x}" y1="8" y2="{_HEIGHT - _BOTTOM}"/>')
    marks = []
    for share in (0.0, 0.5, 1.0):
        value = low + (high - low) * share
        text = f"{10**value if logarithmic else value:.3g}"
        down = 8 + (1 - share) * (_HEIGHT - _BOTTOM - 8)
        marks.append(f'<text x="{_LEFT - 6}" y="{down + 4:.0f}" text-anchor="end">{text}</text>')
    for at, anchor in ((first, "start"), (last, "end")):
        x = place(at, values[0]).split(",")[0]
        marks.append(f'<text x="{x}" y="{_HEIGHT - 8}" text-anchor="{anchor}">{at}</text>')
    frame = f'<rect x="{_LEFT}" y="8" width="{_WIDTH - _LEFT - 8}" height="{_HEIGHT - _BOTTOM - 8}"/>'
    svg = f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">{frame}{"".join(shapes)}{"".join(marks)}</svg>'
    return f"<figure><figcaption>{html.escape(title)}</figcaption>{svg}<div>{' '.join(legend)}</div></figure>"


def _drawable(value: Any, logarithmic: bool) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value) and (value > 0 or not logarithmic)


def _sheets(folder: Path) -> str:
    """A slider over the iterations of each kind of page."""
    kinds: dict[str, list[tuple[int, Path]]] = {}
    for path in sorted(folder.glob("*.png")) if folder.is_dir() else ():
        found = _PAGE.fullmatch(path.name)
        if found:
            kinds.setdefault(found["kind"], []).append((int(found["iteration"]), path))
    return "".join(_slider(kind, _spread(pages)) for kind, pages in kinds.items())


def _spread(pages: list[tuple[int, Path]]) -> list[tuple[int, Path]]:
    """At most so many, the first and the last among them."""
    if len(pages) <= _SHEETS:
        return pages
    return [pages[round(i * (len(pages) - 1) / (_SHEETS - 1))] for i in range(_SHEETS)]


def _slider(kind: str, pages: Sequence[tuple[int, Path]]) -> str:
    images = "".join(
        f'<img data-iteration="{iteration}" alt="{html.escape(kind)} {iteration}" src="{_inline(path)}"'
        f"{'' if number == len(pages) - 1 else ' hidden'}>"
        for number, (iteration, path) in enumerate(pages)
    )
    last = len(pages) - 1
    return (
        f"<div class=sheets><label>{html.escape(kind)}, iteration <output>{pages[-1][0]}</output> "
        f'<input type=range min=0 max={last} value={last} oninput="show(this)"></label>{images}</div>'
    )


def _inline(path: Path) -> str:
    with Image.open(path) as page:
        page.thumbnail((_EDGE, _EDGE))
        stream = io.BytesIO()
        page.convert("RGB").save(stream, format="JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"


def _by_step(folder: RunFolder | None) -> str:
    moved: LoggedRows | None = None if folder is None else folder.rows.moved
    if folder is None or moved is None or not len(moved):
        return ""
    head = ("step", "rows", "median KL [nats]", "dropped, advantage > 0", "dropped, advantage < 0")
    rows = [
        (step, entry["rows"], f"{entry['kl_median_nats']:.3g}", *map(_share, (
            entry["dropped_positive_advantage"], entry["dropped_negative_advantage"])))
        for step, entry in diagnose.numbers(folder)["steps"].items()
    ]  # fmt: skip
    return _table(head, rows)


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _changed(changes: Iterable[Mapping[str, Any]]) -> str:
    rows = [
        (f"after {line['iteration']}", name, json.dumps(before), json.dumps(now))
        for line in changes
        for name, (before, now) in line["changed"].items()
    ]
    return _table(("iteration", "setting", "before", "now"), rows) if rows else ""


def _settings(path: Path) -> str:
    import yaml

    own = next(name for name in ("recipe.yaml", "config.yaml") if (path / name).is_file())
    sections = yaml.safe_load((path / own).read_text())
    rows = [
        (f"{section}.{key}", json.dumps(value, ensure_ascii=False))
        for section, entries in sections.items()
        for key, value in (entries.items() if isinstance(entries, dict) else [("", entries)])
    ]
    return f"<details><summary>{len(rows)} settings</summary>{_table(('setting', 'value'), rows)}</details>"


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    def line(cells: Iterable[Any], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in cells) + "</tr>"

    return f"<table>{line(head, 'th')}{''.join(line(row, 'td') for row in rows)}</table>"


_STYLE = """
body, html { font: 15px/1.45 system-ui, sans-serif; color: #222; background: #fff; max-width: 1000px; margin: auto }
html { padding: 0 1em 3em } h2 { border-bottom: 1px solid #ccc; font-size: 1.15em }
figure { display: inline-block; width: 480px; max-width: 100%; margin: 0 8px 12px 0; vertical-align: top }
figcaption { font-weight: 600 } figure div span { margin-right: 1em; font-size: 0.85em }
svg { width: 100% } svg text { font-size: 11px; fill: #555 } svg rect { fill: none; stroke: #ccc }
polyline { fill: none; stroke-width: 1.6 } .bound { stroke: #222; stroke-dasharray: 2 3 }
.change { stroke: #999; stroke-dasharray: 5 4 } .bad b { color: #a40000 } .good { color: #15692a }
.sheets { margin-bottom: 1.5em } .sheets img { max-width: 100%; display: block } .sheets img[hidden] { display: none }
.sheets label { display: block; margin-bottom: 6px } .sheets input { width: 320px; vertical-align: middle }
table { border-collapse: collapse } td, th { text-align: left; padding: 2px 14px 2px 0; border-bottom: 1px solid #eee }
td { overflow-wrap: anywhere }
"""
_SCRIPT = """
function show(range) {
  const box = range.closest(".sheets"), images = box.querySelectorAll("img")
  images.forEach((image, place) => { image.hidden = place != range.value })
  box.querySelector("output").textContent = images[range.value].dataset.iteration
}
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``flowdppo report``."""
    parser.add_argument("run", type=given, help="run folder, of a run that goes on or has ended")
    parser.add_argument("-o", "--output", type=given, help="where the page goes (default: report.html in the folder)")


def run(args: argparse.Namespace) -> int:
    """Writes the page and prints where it is; returns 2 without a run."""
    try:
        page = write_report(args.run, args.output)
    except (ValueError, RuntimeError) as error:
        print(f"flowdppo report: {error}")
        return 2
    print(page)
    return 0
