"""Result folders: ``results.json``, and what tables, plots and goals read out of it."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SCHEMA = 1
FILE = "results.json"
FORWARD, TOTAL = "forward", "total"


@dataclass(frozen=True)
class Stat:
    """Median and quartiles of raw nanoseconds."""

    median: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, samples: list[int]) -> Stat:
        low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
        return cls(statistics.median(samples), low, high, len(samples))

    def rate(self, nbytes: int) -> float:
        """Bytes per second."""
        return nbytes / self.median * 1e9


@dataclass(frozen=True)
class Record:
    """One contender in one case."""

    result: Mapping[str, Any]
    case: Mapping[str, Any]
    entry: Mapping[str, Any]

    @property
    def name(self) -> str:
        return self.entry["name"]

    @property
    def ok(self) -> bool:
        return self.entry["status"] == "ok"

    def samples(self, clock: str, part: str) -> Stat | None:
        """``clock`` is ``host``, ``wall`` or ``device``."""
        found = self.entry.get("samples", {}).get(f"{clock}_{part}")
        return Stat.of(found) if found else None

    def time(self, part: str) -> Stat | None:
        """The figure for speed: device time where there is one, else wall time."""
        return self.samples("device", part) or self.samples("wall", part)

    def bandwidth_fraction(self, part: str) -> float | None:
        """Bytes that must move, over time, as a fraction of the copy bandwidth of the same run."""
        taken, nbytes = self.time(part), self.entry.get(f"bytes_{part}")
        if taken is None or nbytes is None or (self.graphs and self.samples("device", part) is None):
            return None
        return taken.rate(nbytes) / copy_rate(self.result, self.case["threads"])

    @property
    def graphs(self) -> bool:
        return self.result["device"] != "cpu"

    @property
    def input_bytes(self) -> int | None:
        return self.entry.get("bytes_forward")


def write(result: Mapping[str, Any], folder: Path) -> None:
    """Writes ``results.json`` with one line per list of samples."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result, indent=1, allow_nan=False)
    text = re.sub(r"\[[\s\d,.\-e]+\]", lambda found: re.sub(r"\s+", " ", found.group(0)), text)
    (folder / FILE).write_text(text + "\n")


def load(folder: Path) -> dict[str, Any]:
    """Reads a result folder.

    Raises:
        ValueError: no result there, or one that another version of the benchmark wrote.
    """
    path = folder / FILE
    if not path.exists():
        raise ValueError(f"{folder}: no {FILE} there; `python -m bench.ops run --output DIR` writes one")
    result = json.loads(path.read_text())
    if result.get("kind") != "bench.ops" or result.get("schema") != SCHEMA:
        got = f"kind {result.get('kind')!r}, schema {result.get('schema')!r}"
        raise ValueError(f"{folder}: got {got}, expected kind 'bench.ops', schema {SCHEMA}")
    return result


def records(result: Mapping[str, Any]) -> Iterator[Record]:
    """Every contender of every case."""
    for case in result["cases"]:
        for entry in case["contenders"]:
            yield Record(result, case, entry)


def by_name(result: Mapping[str, Any], case: Mapping[str, Any]) -> dict[str, Record]:
    """The contenders of one case that were timed."""
    found = (Record(result, case, entry) for entry in case["contenders"])
    return {record.name: record for record in found if record.ok}


def copy_rate(result: Mapping[str, Any], threads: int | None) -> float:
    """Bytes per second, read and written, of the copy measured in the run."""
    for copy in result["copy"]:
        if copy["threads"] == threads:
            return Stat.of(copy["samples"]).rate(copy["bytes"])
    raise ValueError(f"no copy bandwidth was measured for {threads} threads")


def compiled_peer(named: Mapping[str, Record], part: str, objective: str = "peer") -> Record | None:
    """The fastest compiled version of the trainers' code in a case."""
    found = [r for name, r in named.items() if name.startswith(f"{objective}-compiled") and r.time(part)]
    return min(found, key=lambda r: r.time(part).median, default=None)  # type: ignore[union-attr]


def best_backend(result: Mapping[str, Any]) -> str | None:
    """The backend of this library that a result speaks for: the one ``auto`` takes, else None."""
    timed = {r.entry["backend"] for r in records(result) if r.ok}
    order = ("cpu",) if result["device"] == "cpu" else ("cuda", "triton")
    return next((name for name in order if name in timed), None)


def failures(result: Mapping[str, Any]) -> list[str]:
    """Contenders that were wrong or raised, as sentences."""
    return [
        f"{r.name} on {r.case['workload']} {r.case['dtype']}: {r.entry['status']}: {r.entry['reason']}"
        for r in records(result)
        if r.entry["status"] in ("refused", "error")
    ]
