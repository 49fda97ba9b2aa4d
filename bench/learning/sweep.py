"""Runs the sweep: skips what is there, splits into shards, says what is missing."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .requests import Cell, request
from .results import exists, file_of, write
from .runs import run


def run_all(
    cells: Sequence[Cell],
    settings: Mapping[str, Any],
    folder: Path,
    *,
    shard: int = 0,
    shards: int = 1,
    until: float | None = None,
) -> int:
    """Runs the cells of a shard that are not there yet; returns how many were run.

    Args:
        shard, shards: take every ``shards``-th cell from number ``shard`` (0-based), for machines that share no disk.
            Processes that do share ``folder`` claim runs by lock files and need no shards.
        until: no run is started after this time (seconds since the epoch).
    """
    folder.mkdir(parents=True, exist_ok=True)
    count = 0
    mine = cells[shard::shards]
    for cell in mine:
        path = file_of(cell.name, folder)
        lock = path.with_suffix(".lock")
        if exists(cell.name, folder) or (until is not None and time.time() >= until) or not _claim(lock):
            continue
        try:
            if not exists(cell.name, folder):
                result = run(request(cell, settings))
                write(result, path)
                count += 1
                left = sum(not exists(other.name, folder) for other in mine)
                print(f"{cell.name}  {result['seconds']['wall']:.0f} s, {left} left", flush=True)
        finally:
            lock.unlink()
    return count


def status(named: Mapping[str, Iterable[Cell]], folder: Path) -> str:
    """How many runs of each study are there, and which cells lack most."""
    lines = []
    everything: dict[str, bool] = {}
    for name, cells in named.items():
        present = {cell.name: exists(cell.name, folder) for cell in cells}
        lines.append(f"{name:<22} {sum(present.values()):4d} of {len(present):4d} runs")
        everything |= present
    lines.append(f"{'all, each run once':<22} {sum(everything.values()):4d} of {len(everything):4d} runs")
    return "\n".join(lines)


def _claim(lock: Path) -> bool:
    """True if this process now holds ``lock``; one left by a process that is gone is taken over."""
    for _ in range(2):
        try:
            handle = os.open(lock, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:
            try:
                owner = int(lock.read_text() or 0)
                os.kill(owner, 0)
                return False
            except (ProcessLookupError, ValueError):
                lock.unlink(missing_ok=True)
            except FileNotFoundError:
                pass
            continue
        with os.fdopen(handle, "w") as file:
            file.write(str(os.getpid()))
        return True
    return False
