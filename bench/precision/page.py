"""The tables of docs/precision.md and its figures, from results alone."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "precision.md"
FIGURES = ROOT / "docs" / "figures"
STORAGES = ("velocities", "velocities, seeded noise", "float32 means", "float16 means", "bfloat16 means")
# Okabe-Ito, and a marker that says the same
STYLES = (("#009E73", "o"), ("#56B4E9", "v"), ("#0072B2", "s"), ("#E69F00", "^"), ("#D55E00", "X"))


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


def draw(result: dict[str, Any], model_dtype: str, elements: int) -> plt.Figure:
    """KL seen over KL there is, and the error of the log-ratio, against the true KL."""
    records = [r for r in result["records"] if r["model_dtype"] == model_dtype and r["elements"] == elements]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    nominal = sorted({record["nominal_kl"] for record in records})
    true = [pick(records, statistics.median, "true_kl", nominal_kl=kl) for kl in nominal]

    def line(method: str, field: str) -> list[float | None]:
        return [pick(records, statistics.median, field, method=method, nominal_kl=kl) for kl in nominal]

    for storage, (colour, marker) in zip(STORAGES, STYLES):
        style = {"color": colour, "marker": marker, "markersize": 4, "label": storage}
        left.plot(true, line(f"cpu: {storage}", "kl_quotient"), **style)
        right.plot(true, line(f"cpu: {storage}", "log_ratio_error"), **style)
    peers = line("peers: float32 means", "log_ratio_error")
    right.plot(true, peers, color="#000000", linestyle="--", label="peers: difference of two log-probs")
    size = [(2 * kl / elements) ** 0.5 for kl in nominal]
    right.plot(true, size, color="#888888", linestyle=":", label="size of a log-ratio, sqrt(2 KL / N)")
    for threshold in (1e-5, 1e-6):
        left.axvline(threshold, color="#888888", linestyle=":", linewidth=1)
        left.text(threshold * 1.15, 0.97, f"threshold {threshold:.0e}", transform=left.get_xaxis_transform(),
                  rotation=90, va="top", fontsize=8, color="#555555")  # fmt: skip
    for axes in (left, right):
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("exact KL (mean over latent elements)")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    left.set_ylabel("KL seen / exact KL")
    right.set_ylabel("error of the log-ratio (absolute)")
    figure.suptitle(f"{model_dtype} model, N = {elements:,}")
    return figure


def write(folder: Path, *, check: bool) -> int:
    """Puts tables between their marks in the page and draws the figures; with ``check`` only compares the tables."""
    result = load(folder)
    where = folder.resolve().relative_to(ROOT)
    blocks = {
        "backends-bfloat16": backend_table(result, "bfloat16"),
        "backends-float32": backend_table(result, "float32"),
        "storage": storage_table(result, "bfloat16", 65536),
        "source": f"`{where}/results.json`, made by `{result['command']}` in {result['seconds']:.0f} s "
        f"(torch {result['environment']['torch']}, {result['environment']['cpu']}).",
    }
    text = PAGE.read_text()
    for name, block in blocks.items():
        mark = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        if not mark.search(text):
            raise ValueError(f"docs/precision.md: no place for {name!r}")
        text = mark.sub(lambda found, block=block: f"{found[1]}{block}\n{found[2]}", text)
    if check:
        return int(text != PAGE.read_text())
    PAGE.write_text(text)
    FIGURES.mkdir(exist_ok=True)
    figure = draw(result, "bfloat16", 65536)
    figure.savefig(FIGURES / "precision.png", dpi=110, metadata={"Software": ""})
    plt.close(figure)
    return 0
