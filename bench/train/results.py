"""Result folders of the end-to-end benchmark: ``results.json``, and what tables and plots read out of it."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from bench.ops.results import FILE, write

from .names import OURS, THEIRS

SCHEMA = 1
KIND = "bench.train"
SPEEDUP_GOAL, BYTES_GOAL = 1.25, 0.5
MET, MISSED, NOT_MEASURED = "met", "missed", "not yet measured"

__all__ = ["FILE", "KIND", "SCHEMA", "Goal", "Spread", "goals", "load", "ratios", "rounds", "timed", "write"]


class Spread(NamedTuple):
    """Median and quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, samples: list[float]) -> Spread:
        if len(samples) == 1:
            return cls(samples[0], samples[0], samples[0])
        low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
        return cls(median, low, high)

    def show(self, digits: int) -> str:
        return f"{self.median:.{digits}f} [{self.low:.{digits}f}, {self.high:.{digits}f}]"


class Goal(NamedTuple):
    """A goal, what was measured, and ``met``, ``missed`` or ``not yet measured``."""

    text: str
    measured: str
    verdict: str


def load(folder: Path) -> dict[str, Any]:
    """Reads a result folder.

    Raises:
        ValueError: no result there, or one of something else.
    """
    path = folder / FILE
    if not path.exists():
        raise ValueError(f"{folder}: no {FILE} there; `python -m bench.train run --output DIR` writes one")
    result = json.loads(path.read_text())
    if result.get("kind") != KIND or result.get("schema") != SCHEMA:
        got = f"kind {result.get('kind')!r}, schema {result.get('schema')!r}"
        raise ValueError(f"{folder}: got {got}, expected kind {KIND!r}, schema {SCHEMA}")
    return result


def timed(workload: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The contenders of a workload that were right and have samples."""
    return (entry for entry in workload["contenders"] if entry["status"] == "ok" and entry["rounds"])


def rounds(entry: Mapping[str, Any], name: str) -> list[float]:
    """One number per measured iteration."""
    return [sample[name] for sample in entry["rounds"]]


def ratios(workload: Mapping[str, Any], name: str, clock: str = "seconds") -> Spread | None:
    """Iteration time of contender ``name`` over this library's, round by round; None where either is missing.

    Args:
        clock: ``"seconds"`` of wall time, or ``"cpu_seconds"`` of the process.
    """
    found = {entry["name"]: entry for entry in timed(workload)}
    if name not in found or OURS not in found:
        return None
    pairs = zip(rounds(found[name], clock), rounds(found[OURS], clock))
    return Spread.of([theirs / ours for theirs, ours in pairs])


def goals(result: Mapping[str, Any]) -> list[Goal]:
    """The two goals of each workload."""
    judged = []
    for workload in result["workloads"]:
        found = {entry["name"]: entry for entry in timed(workload)}
        speed, size = (
            f">= {SPEEDUP_GOAL:g}x the samples/s of all habits",
            "<= half of the trajectory bytes of all habits",
        )
        note = ", quick run" if result["quick"] else ""
        speedup = ratios(workload, THEIRS)
        if speedup is None:
            judged += [Goal(f"{workload['name']}: {text}", "-", NOT_MEASURED) for text in (speed, size)]
            continue
        judged.append(
            Goal(
                f"{workload['name']}: {speed}",
                f"{speedup.show(2)}x{note}",
                MET if speedup.median >= SPEEDUP_GOAL else MISSED,
            )
        )
        share = found[OURS]["trajectory_bytes"] / found[THEIRS]["trajectory_bytes"]
        judged.append(
            Goal(f"{workload['name']}: {size}", f"{100 * share:.0f} %{note}", MET if share <= BYTES_GOAL else MISSED)
        )
    return judged
