"""Where the benchmark's files are."""

from __future__ import annotations

from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
EXAMPLE = ROOT / "examples" / "digits"
CHECKPOINTS = HERE / "checkpoints"
RESULTS = HERE / "results"
ROWS = HERE / "rows.json"
SETTINGS = HERE / "settings.json"
TUNING = HERE / "tuning"
FIGURES = ROOT / "docs" / "figures" / "learning"
PAGE = ROOT / "docs" / "learning.md"
