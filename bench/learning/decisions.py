"""What a run file keeps of a row log: the noise of the log-ratio by KL, and what clip ranges drop against a mask.

LoggedRows, their units (nats over the whole latent) and the decisions are those of :mod:`flowdppo_fast.runs.row_log`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from flowdppo_fast.runs.row_log import LoggedRows, clip_against_mask

# edges of the KL bins, nats; four to a decade
BIN_EDGES = tuple(float(f"{10 ** (place / 4):.4g}") for place in range(-24, 9))


def noise_table(rows: LoggedRows) -> list[dict[str, float]]:
    """Per KL bin: rows, mean KL, mean and standard deviation of the log-ratio, mean and deviation of ``z``."""
    table = []
    place = np.digitize(rows.kl, BIN_EDGES)
    for number in range(1, len(BIN_EDGES)):
        inside = place == number
        if inside.sum() < 30:
            continue
        here = rows.where(inside)
        kl, log_ratio, z = here.kl, here.log_ratio, here.standardised
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


def decision_table(rows: LoggedRows, clips: Sequence[float]) -> list[dict[str, float]]:
    """:func:`~flowdppo_fast.runs.row_log.clip_against_mask` for each clip range that drops anything."""
    found = ((clip, clip_against_mask(rows, clip)) for clip in clips)
    return [{"clip": clip, **{key: _short(x) for key, x in entry.items()}} for clip, entry in found if entry]


def summary(rows: LoggedRows, clips: Sequence[float]) -> dict[str, Any]:
    """What a run file keeps of a row log."""
    later = rows.moved
    if not len(later):
        return {"rows": len(rows), "moved_rows": 0, "noise": [], "decisions": []}
    by_update = {}
    for update in np.unique(rows.update):
        here = rows.where(rows.update == update)
        by_update[int(update)] = {
            "kl_median": _short(np.median(here.kl)),
            "kl_90": _short(np.quantile(here.kl, 0.9)),
            "dropped": _short(1 - here.kept.mean()),
        }
    z = later.standardised
    return {
        "rows": len(rows),
        "moved_rows": len(later),
        "z_mean": _short(z.mean()),
        "z_std": _short(z.std()),
        "z_mean_positive_advantage": _short(z[later.advantage > 0].mean()),
        "z_mean_negative_advantage": _short(z[later.advantage < 0].mean()),
        "updates": by_update,
        "noise": noise_table(later),
        "decisions": decision_table(later, clips),
    }


def _short(value: float) -> float | None:
    """Four digits; None for what is not finite, which JSON cannot say."""
    return float(f"{float(value):.4g}") if np.isfinite(value) else None
