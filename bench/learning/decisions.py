"""What a run's row log says about clipping and masking: the noise of the log-ratio, and who would have dropped what.

Everything is in nats over the whole latent: ``D`` the exact KL of a row, ``L`` its log-ratio. For noise that is
independent of the change of the policy, ``L`` has the mean ``-D`` and the standard deviation ``sqrt(2 D)``, so
``z = (L + D) / sqrt(2 D)`` is standard normal; per element (mean-reduced, as trainers log it) that reads
``std(log r) = sqrt(2 D / N)``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

# edges of the KL bins, nats; four to a decade
BIN_EDGES = tuple(float(f"{10 ** (place / 4):.4g}") for place in range(-24, 9))


def read_rows(path: Path) -> dict[str, np.ndarray]:
    """Flat arrays over all rows of a ``rows.jsonl``: ``iteration, update, step, advantage, L, D`` (nats), ``kept``."""
    columns: dict[str, list] = {name: [] for name in ("iteration", "update", "step", "advantage", "L", "D", "kept")}
    for text in path.read_text().splitlines():
        line = json.loads(text)
        elements, steps, rows = line["elements"], line["steps"], len(line["advantage"])
        columns["iteration"].append(np.full(rows * len(steps), line["iteration"]))
        columns["update"].append(np.full(rows * len(steps), line["update"]))
        columns["step"].append(np.tile(steps, rows))
        columns["advantage"].append(np.repeat(np.asarray(line["advantage"], float), len(steps)))
        columns["L"].append(np.asarray(line["log_ratio"], float).reshape(-1) * elements)
        columns["D"].append(np.asarray(line["kl"], float).reshape(-1) * elements)
        columns["kept"].append(np.asarray(line["kept"], bool).reshape(-1))
    return {name: np.concatenate(parts) if parts else np.zeros(0) for name, parts in columns.items()}


def moved(rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Rows after the first update of their rollout: before it the two policies are one and nothing can be decided."""
    later = (rows["update"] > 0) & (rows["D"] > 0)
    return {name: values[later] for name, values in rows.items()}


def noise_table(rows: dict[str, np.ndarray]) -> list[dict[str, float]]:
    """Per KL bin: rows, mean KL, mean and standard deviation of the log-ratio, mean and deviation of ``z``."""
    table = []
    place = np.digitize(rows["D"], BIN_EDGES)
    for number in range(1, len(BIN_EDGES)):
        inside = place == number
        if inside.sum() < 30:
            continue
        kl, log_ratio = rows["D"][inside], rows["L"][inside]
        z = (log_ratio + kl) / np.sqrt(2 * kl)
        table.append(
            {
                "rows": int(inside.sum()),
                "kl": _short(kl.mean()),
                "log_ratio_mean": _short(log_ratio.mean()),
                "log_ratio_std": _short(log_ratio.std()),
                "z_mean": _short(z.mean()),
                "z_std": _short(z.std()),
            }
        )
    return table


def decision_table(rows: dict[str, np.ndarray], clips: Sequence[float]) -> list[dict[str, float]]:
    """For each clip range (nats): what it drops, against the mask that drops the same share of the same rows.

    Both rules only drop rows that move away (advantage and log-ratio of one sign); the clip where the log-ratio is
    large, the mask where the KL is. ``threshold`` is the KL that makes the mask drop as many rows as the clip.
    ``spurious`` is the share of dropped rows on which the clip alone acts: near the old policy by the exact KL, but
    with a large noise. With equal numbers dropped as many far rows are missed.
    """
    table = []
    away = rows["advantage"] * rows["L"] > 0
    for clip in clips:
        clipped = away & (np.abs(rows["L"]) > clip)
        count = int(clipped.sum())
        if count == 0:
            continue
        order = np.sort(rows["D"][away])
        threshold = order[-count]
        masked = away & (rows["D"] >= threshold)
        table.append(
            {
                "clip": clip,
                "dropped": _short(count / len(away)),
                "threshold": _short(threshold),
                "spurious": _short((clipped & ~masked).sum() / count),
                "kl_of_clipped_median": _short(np.median(rows["D"][clipped])),
                "kl_of_masked_median": _short(np.median(rows["D"][masked])),
            }
        )
    return table


def summary(rows: dict[str, np.ndarray], clips: Sequence[float]) -> dict[str, Any]:
    """What a run file keeps of a row log."""
    later = moved(rows)
    if not len(later["D"]):
        return {"rows": len(rows["D"]), "moved_rows": 0, "noise": [], "decisions": []}
    by_update = {}
    for update in np.unique(rows["update"]):
        here = rows["update"] == update
        by_update[int(update)] = {
            "kl_median": _short(np.median(rows["D"][here])),
            "kl_90": _short(np.quantile(rows["D"][here], 0.9)),
            "dropped": _short(1 - rows["kept"][here].mean()),
        }
    z = (later["L"] + later["D"]) / np.sqrt(2 * later["D"])
    return {
        "rows": len(rows["D"]),
        "moved_rows": len(later["D"]),
        "z_mean": _short(z.mean()),
        "z_std": _short(z.std()),
        "z_mean_positive_advantage": _short(z[later["advantage"] > 0].mean()),
        "z_mean_negative_advantage": _short(z[later["advantage"] < 0].mean()),
        "updates": by_update,
        "noise": noise_table(later),
        "decisions": decision_table(later, clips),
    }


def _short(value: float) -> float:
    return float(f"{float(value):.4g}")
