"""The tables of docs/precision.md and its figures, from results alone."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from bench.pages import ROOT, put
from flowdppo_fast.runs import figures

PAGE = ROOT / "docs" / "precision.md"
FIGURES = ROOT / "docs" / "figures"
# what is stored, and how it looks; means of fewer bits have what no other figure uses for a form
STORAGES = {
    "velocities": figures.FORMS["velocity"],
    "velocities, seeded noise": figures.FORMS["seeded"],
    "float32 means": figures.FORMS["means"],
    "float16 means": figures.Look(figures.AMBER, "^"),
    "bfloat16 means": figures.Look(figures.VERMILION, "s"),
}


def load(folder: Path) -> dict[str, Any]:
    """A results file."""
    return json.loads((folder / "results.json").read_text())


def pick(records: Iterable[dict], value: Callable[[list[float]], float], field: str, **where: Any) -> float | None:
    """``value`` of ``field`` over the records that agree with ``where``, None without any."""
    found = [record[field] for record in records if all(record[key] == wanted for key, wanted in where.items())]
    return value(found) if found else None


def backend_table(result: dict[str, Any], model_dtype: str) -> str:
    """Worst relative errors up to a KL of 10, and rows whose mask differs, by method."""
    records = [r for r in result["records"] if r["model_dtype"] == model_dtype and r["nominal_kl"] <= 10]
    lines = [
        "| method | KL | ratio | loss | gradient | rows with another mask |",
        "|---|---|---|---|---|---|",
    ]
    for method in dict.fromkeys(record["method"] for record in records):
        cells = [
            pick(records, max, field, method=method)
            for field in ("kl_error", "ratio_error", "loss_error", "grad_error")
        ]
        wrong = pick(records, sum, "mask_differs", method=method)
        numbers = " | ".join(f"{cell:.1e}" for cell in cells if cell is not None)
        lines.append(f"| {method} | {numbers} | {wrong} |")
    return "\n".join(lines)


def storage_table(result: dict[str, Any], model_dtype: str, elements: int) -> str:
    """KL that is seen over KL that there is (median), by storage and true KL."""
    records = [r for r in result["records"] if r["model_dtype"] == model_dtype and r["elements"] == elements]
    divergences = sorted({record["nominal_kl"] for record in records if record["nominal_kl"] <= 1e-2})
    lines = [
        "| stored | " + " | ".join(f"KL {kl:.0e}" for kl in divergences) + " |",
        "|---" * (len(divergences) + 1) + "|",
    ]
    for method in [f"cpu: {storage}" for storage in STORAGES] + ["peers: float32 means", "peers: bfloat16 means"]:
        cells = [pick(records, statistics.median, "kl_quotient", method=method, nominal_kl=kl) for kl in divergences]
        lines.append(f"| {method} | " + " | ".join("-" if c is None else f"{c:.3g}" for c in cells) + " |")
    return "\n".join(lines)


@figures.style()
def draw(result: dict[str, Any], model_dtype: str, elements: int, path: Path) -> None:
    """KL seen over KL there is, and the error of the log-ratio, against the true KL."""
    records = [r for r in result["records"] if r["model_dtype"] == model_dtype and r["elements"] == elements]
    figure, (left, right) = figures.panels(2, height=4.3)
    nominal = sorted({record["nominal_kl"] for record in records})
    true = [pick(records, statistics.median, "true_kl", nominal_kl=kl) for kl in nominal]

    def line(method: str, field: str) -> list[float | None]:
        return [pick(records, statistics.median, field, method=method, nominal_kl=kl) for kl in nominal]

    for number, (storage, look) in enumerate(STORAGES.items()):
        # where they are the same, the better one is seen
        form = look.kwargs(label=storage, markersize=4.5, zorder=3 - number / 10)
        left.plot(true, line(f"cpu: {storage}", "kl_quotient"), **form)
        right.plot(true, line(f"cpu: {storage}", "log_ratio_error"), **form)
    peers = figures.FORMS["eager"].kwargs(marker="", label="peers: difference of two log-probs")
    right.plot(true, line("peers: float32 means", "log_ratio_error"), **peers)
    size = [(2 * kl / elements) ** 0.5 for kl in nominal]
    right.plot(true, size, color=figures.GREY, linestyle=":", label="size of a log-ratio, sqrt(2 KL / N)")
    for threshold in (1e-5, 1e-6):
        left.axvline(threshold, color=figures.GREY, linestyle=":", linewidth=1.2)
        left.text(threshold * 1.3, 0.99, f"threshold {threshold:g}".replace("e-0", "e-"), rotation=90, va="top",
                  transform=left.get_xaxis_transform(), fontsize=9, color=figures.GREY)  # fmt: skip
    for axis in (left, right):
        figures.log_scale(axis.xaxis)
        figures.log_scale(axis.yaxis)
        axis.set_xlabel("exact KL [nats per element]")
    left.set(title="KL that is seen", ylabel="KL seen / exact KL")
    right.set(title="Error of the log-ratio", ylabel="error [nats per element]")
    figures.legend(figure, (left, right), columns=3)
    figure.suptitle(f"{model_dtype} model, N = {elements:,}")
    figures.save(figure, path)


def write(folder: Path, *, check: bool) -> int:
    """Puts tables between their marks in the page and draws the figures; with ``check`` only compares the tables."""
    result = load(folder)
    where = folder.resolve().relative_to(ROOT)
    blocks = {
        "precision:backends-bfloat16": backend_table(result, "bfloat16"),
        "precision:backends-float32": backend_table(result, "float32"),
        "precision:storage": storage_table(result, "bfloat16", 65536),
        "precision:source": f"`{where}/results.json`, made by `{result['command']}` in {result['seconds']:.0f} s "
        f"(torch {result['environment']['torch']}, {result['environment']['cpu']}).",
    }
    status = put(PAGE, blocks, check=check, program="bench.precision")
    if check or status != 0:
        return status
    draw(result, "bfloat16", 65536, FIGURES / "precision.png")
    return 0
