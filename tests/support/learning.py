"""Tests of learning: what was gained against a threshold, and the spread over seeds that the threshold was set from.

``FLOWDPPO_LEARNING_SEEDS=8 python -m pytest -m learns tests`` runs each such test with eight seeds and prints mean and
standard deviation of its gain. A threshold stands at least three and a half standard deviations below the mean.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

SEEDS = int(os.environ.get("FLOWDPPO_LEARNING_SEEDS", "1"))


@dataclass(frozen=True)
class Learning:
    """A test's seed, and where it leaves what its run gained.

    Attributes:
        seed: of the run.
        properties: of the test's report.
    """

    seed: int
    properties: list[tuple[str, Any]]

    def check(self, gain: float, least: float, name: str = "") -> None:
        """Asserts that ``gain`` is more than ``least``; ``name`` tells several gains of one test apart."""
        self.properties.append(("gain", (name, gain, least)))
        assert gain > least, f"{name} gained {gain:.4g}, expected more than {least:.4g}"


def gains(reports: Iterable[Any]) -> dict[str, dict[str, Any]]:
    """By test, whatever its seed: ``gains`` of all its runs, and the ``least`` that was asked for."""
    found: dict[str, dict[str, Any]] = {}
    for report in reports:
        for key, value in report.user_properties:
            if key == "gain":
                name, gain, least = value
                test = report.nodeid.replace(f"seed{dict(report.user_properties)['seed']}", "").replace("-]", "]")
                entry = found.setdefault(f"{test.removesuffix('[]')} {name}".rstrip(), {"gains": [], "least": least})
                entry["gains"].append(gain)
    return found


def lines(found: dict[str, dict[str, Any]]) -> list[str]:
    """A line per test: how many seeds, mean and standard deviation of the gain, and the threshold's distance."""
    result = []
    for test, entry in sorted(found.items()):
        values, least = entry["gains"], entry["least"]
        spread = stdev(values) if len(values) > 1 else float("nan")
        away = (mean(values) - least) / spread if spread else float("inf")
        result.append(
            f"{test}: n {len(values)}, mean {mean(values):.4g}, sd {spread:.2g}, lowest {min(values):.4g}, "
            f"threshold {least:g}, {away:.1f} sd below the mean"
        )
    return result
