"""Logs of a run: a JSON line per iteration or update, on the disk when it is written, cut back when a run continues."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

METRICS_FILE, ROWS_FILE = "metrics.jsonl", "rows.jsonl"
ADVICE = "the last checkpoint is as it was; mend this and continue with resume=True"


def append_lines(path: Path, lines: Iterable[str]) -> None:
    """Appends ``lines`` to a log of the run; they are on the disk when this returns.

    Raises:
        RuntimeError: they cannot be written.
    """
    with writing(path), open(path, "a") as log:
        log.writelines(line + "\n" for line in lines)
        log.flush()
        os.fsync(log.fileno())


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Around writing a file of the run: what the system refuses is a RuntimeError that says what to do."""
    try:
        yield
    except OSError as cause:
        raise RuntimeError(f"run.output_dir: {path} could not be written ({cause}); {ADVICE}") from cause


def drop_later_lines(path: Path, iteration: int) -> None:
    """Cuts lines of iterations after ``iteration``, and one that was torn by a kill, off a log such as ``rows.jsonl``.

    Iterations are written in order, so what stays is a beginning of the file.
    """
    if not path.exists():
        return
    end = 0
    with open(path, "rb") as log:
        for line in log:
            try:
                later = not line.endswith(b"\n") or json.loads(line)["iteration"] > iteration
            except ValueError:
                later = True
            if later:
                break
            end += len(line)
    os.truncate(path, end)
