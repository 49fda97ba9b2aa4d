"""Results of runs: a folder of new ones, one JSON file each, beside a compressed table of those that were folded in.

``results/NAME.json`` is what a run leaves, and ``results.jsonl.gz`` has one line for each older one, in the order of
their names. A run is in either place; everything here takes the folder and reads both.
"""

from __future__ import annotations

import contextlib
import fcntl
import gzip
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from .requests import Cell
from .runs import SCHEMA


@dataclass(frozen=True)
class Run:
    """A loaded run."""

    result: Mapping[str, Any]

    @cached_property
    def cell(self) -> Cell:
        return Cell(**self.result["request"]["cell"])

    @property
    def failed(self) -> bool:
        """The run lost its numbers and was stopped; it is counted, and no analysis averages over it."""
        return self.result.get("failed") is not None

    @property
    def before(self) -> Mapping[str, Any]:
        return self.result["evaluations"][0]

    @property
    def after(self) -> Mapping[str, Any]:
        return self.result["evaluations"][-1]

    @property
    def history(self) -> Mapping[str, list[float]]:
        return self.result["history"]

    def reward(self, place: int = -1, prompts: str = "trained") -> float:
        """Mean of the optimised rewards at an evaluation."""
        scores = self.result["evaluations"][place][prompts]["rewards"]
        return sum(scores.values()) / len(scores)

    def gains(self) -> dict[str, float]:
        """Gain of each optimised reward on trained prompts, in standard deviations of the pretrained model's pages."""
        before, after = self.before["trained"], self.after["trained"]
        return {
            name: (after["rewards"][name] - before["rewards"][name]) / before["reward_std"][name]
            for name in before["rewards"]
        }

    @property
    def drift(self) -> float:
        """KL of the sampling path from the pretrained model's, nats."""
        return self.after["drift_nats"]


def table_of(folder: Path) -> Path:
    """Where the runs are that were folded in."""
    return folder.with_name(f"{folder.name}.jsonl.gz")


def file_of(name: str, folder: Path) -> Path:
    """Where a new run called ``name`` is."""
    return folder / f"{name}.json"


def write(result: Mapping[str, Any], path: Path) -> None:
    """Writes a run file in one piece, with lists on one line each."""
    text = json.dumps(result, indent=1, allow_nan=False)
    text = re.sub(r"\[[^\[\]{}]*\]", lambda found: re.sub(r"\s+", " ", found.group(0)), text)
    # entries of the decision tables on one line each
    text = re.sub(r"\{[^\[\]{}]*\}", lambda found: re.sub(r"\s+", " ", found.group(0)), text)
    path.parent.mkdir(parents=True, exist_ok=True)
    _replace(path, (text + "\n").encode())


def load_file(path: Path) -> Run:
    """One run file.

    Raises:
        ValueError: another kind of file, or another version's.
    """
    return _checked(json.loads(path.read_text()), str(path))


def load(folder: Path) -> list[Run]:
    """All runs of a folder and of its table, in the order of their names.

    Raises:
        ValueError: something that is no run, or one name twice with different results.
    """
    new = []
    for path in sorted(folder.glob("*.json")):
        # one that is folded in at this moment is in the table, which is read later for that reason
        with contextlib.suppress(FileNotFoundError):
            new.append((path, load_file(path)))
    found = dict(_table(table_of(folder)))
    for path, run in new:
        # a fold that was killed between its two halves leaves the same run in both
        if run.result != found.setdefault(run.cell.name, run).result:
            raise ValueError(f"{path}: {run.cell.name} is there already, with other results")
    return [found[name] for name in sorted(found, key=_order)]


def find(folder: Path, name: str) -> Run:
    """The run called ``name``.

    Raises:
        ValueError: there is none.
    """
    for run in load(folder):
        if run.cell.name == name:
            return run
    raise ValueError(f"{name}: no such run in {folder} or {table_of(folder).name}")


def exists(name: str, folder: Path) -> bool:
    """Whether a run called ``name`` is there; right also while another process folds runs in."""
    # in this order: a file is removed only when the table has its run
    return file_of(name, folder).exists() or name in _table(table_of(folder))


def fold(folder: Path) -> int:
    """Moves the files of a folder into its table; returns how many. Runs may end and be folded in meanwhile.

    Raises:
        ValueError: see :func:`load`.
    """
    table = table_of(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".fold.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        # before they are read: what ends later stays
        paths = sorted(folder.glob("*.json"))
        if paths:
            runs = load(folder)
            lines = [json.dumps(run.result, separators=(",", ":"), allow_nan=False) for run in runs]
            # without a time, so that equal runs make equal files
            _replace(table, gzip.compress(("\n".join(lines) + "\n").encode(), 9, mtime=0))
        for path in paths:
            path.unlink()
    return len(paths)


def _order(name: str) -> str:
    return f"{name}.json"


def _checked(result: Any, where: str) -> Run:
    if result.get("kind") != "bench.learning" or result.get("schema") != SCHEMA:
        got = f"kind {result.get('kind')!r}, schema {result.get('schema')!r}"
        raise ValueError(f"{where}: got {got}, expected kind 'bench.learning', schema {SCHEMA}")
    return Run(result)


def _table(path: Path) -> Mapping[str, Run]:
    """Runs of a table by name; none if there is no table. Read again when it has changed."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return {}
    return _read(path, (found.st_ino, found.st_mtime_ns, found.st_size))


@lru_cache(maxsize=4)
def _read(path: Path, version: tuple[int, ...]) -> Mapping[str, Run]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        runs = [_checked(json.loads(line), f"{path}, line {number}") for number, line in enumerate(lines, 1)]
    return {run.cell.name: run for run in runs}


def _replace(path: Path, content: bytes) -> None:
    partial = path.with_name(f"{path.name}.partial{os.getpid()}")
    partial.write_bytes(content)
    partial.replace(path)
