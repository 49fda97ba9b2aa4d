"""``pytest -p ptx.tally``: what ran and how it ended, into the file that ``FLOWDPPO_PTX_TALLY`` names."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

# what other plugins have to say of the run
FACTS: dict[str, Any] = {}
_outcomes: Counter[str] = Counter()
_wrong: list[str] = []


def pytest_runtest_logreport(report):
    # a test counts once: as it ran, or as what kept it from running or came after it
    if report.when == "call":
        _outcomes[report.outcome] += 1
    elif report.skipped:
        _outcomes["skipped"] += 1
    elif report.failed:
        _outcomes["error"] += 1
    if report.failed:
        _wrong.append(report.nodeid)


def pytest_collectreport(report):
    if report.failed:
        _outcomes["error"] += 1
        _wrong.append(report.nodeid)


def pytest_unconfigure(config):
    if path := os.environ.get("FLOWDPPO_PTX_TALLY"):
        Path(path).write_text(json.dumps({"outcomes": dict(_outcomes), "wrong": _wrong, **FACTS}, indent=1) + "\n")
