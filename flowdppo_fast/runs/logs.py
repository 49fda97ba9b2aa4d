"""Logs of a run: a JSON line per iteration or update, on the disk when it is written, cut back when a run continues."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

METRICS_FILE, ROWS_FILE = "metrics.jsonl", "rows.jsonl"
# what was changed when a run continued
CHANGES_FILE = "changes.jsonl"
ADVICE = "the last checkpoint is as it was; mend this and continue with resume=True"


def given(path: str) -> Path:
    """A path of the command line; shells leave the ``~`` of ``--output=~/x`` to the program."""
    return Path(path).expanduser()


def append_lines(path: Path, lines: Iterable[str]) -> None:
    """Appends ``lines`` to a log of the run; they are on the disk when this returns.

    Raises:
        RuntimeError: they cannot be written.
    """
    with writing(path), open(path, "a") as log:
        log.writelines(line + "\n" for line in lines)
        log.flush()
        os.fsync(log.fileno())


_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def to_json(values: Any) -> str:
    """One line of strict JSON: numbers that are not finite are the texts ``"NaN"``, ``"Infinity"``, ``"-Infinity"``."""
    try:
        return json.dumps(values, allow_nan=False)
    except ValueError:
        return json.dumps(_strict(values), allow_nan=False)


def from_json(text: str | bytes) -> Any:
    """The inverse of :func:`to_json`."""
    values = json.loads(text)
    return {key: _NOT_FINITE.get(v, v) if isinstance(v, str) else v for key, v in values.items()}


def _strict(values: Any) -> Any:
    if isinstance(values, Mapping):
        return {key: _strict(value) for key, value in values.items()}
    if isinstance(values, (list, tuple)):
        return [_strict(value) for value in values]
    if isinstance(values, float) and not math.isfinite(values):
        return "NaN" if math.isnan(values) else "Infinity" if values > 0 else "-Infinity"
    return values


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
