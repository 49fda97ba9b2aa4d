"""What ``auto`` takes for CUDA tensors, decided by result folders of ``bench/gpu.sh``: ``flowdppo_fast/evidence.py``.

A backend has passed a folder if its ``gpu-tests.json`` counts tests of it that passed, and none that failed, ended in
an error or were skipped, in a full run of the committed sources that came to its end. A backend that passed at least
one folder and failed none may be taken. Where several may, the faster comes first: by the geometric mean, over all
cases that both were timed in, of the device time of forward and backward in the main form. ``triton`` is always there:
it needs no build.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.pages import shown

from . import results
from .results import TOTAL, by_name

TESTS = "gpu-tests.json"
BACKENDS = ("cuda", "triton")
_DEFAULT = "triton"


def outcomes(folder: Path) -> dict[str, dict[str, int]]:
    """How many GPU tests of each backend ended how.

    Raises:
        ValueError: no such file in the folder, or a run that is no evidence: quick, or of changed sources.
    """
    path = folder / TESTS
    if not path.exists():
        raise ValueError(f"{folder}: no {TESTS} there; bench/gpu.sh writes one")
    environment = _environment(folder)
    if environment.get("git_dirty"):
        raise ValueError(f"{folder}: the run was of sources with changes that are not committed, which is no evidence")
    found = json.loads(path.read_text())
    if found.get("quick"):
        raise ValueError(
            f"{folder}: a quick run leaves tests out, which is no evidence; run bench/gpu.sh without --quick"
        )
    unfinished = found.get("unfinished", [])
    return {name: {**counts, "unfinished": int(name in unfinished)} for name, counts in found["backends"].items()}


def passed(counts: dict[str, int] | None) -> bool:
    """Whether a backend's tests were all run and all passed."""
    if counts is None:
        return False
    return counts["passed"] > 0 and not any(number for outcome, number in counts.items() if outcome != "passed")


def time_ratio(found: Sequence[dict[str, Any]], backend: str, other: str) -> float | None:
    """Geometric mean of ``backend``'s time over ``other``'s; None where no case timed both."""
    logarithms = []
    for result in found:
        for case in result["cases"]:
            named = by_name(result, case)
            ours, theirs = named.get(f"{backend}/velocity"), named.get(f"{other}/velocity")
            if ours is None or theirs is None:
                continue
            a, b = ours.time(TOTAL), theirs.time(TOTAL)
            if a is not None and b is not None:
                logarithms.append(math.log(a.median / b.median))
    return math.exp(sum(logarithms) / len(logarithms)) if logarithms else None


def decide(folders: Sequence[Path]) -> tuple[dict[str, list[str]], list[str]]:
    """The folders that each backend passed, and the order in which ``auto`` takes backends.

    Raises:
        ValueError: a folder that holds no evidence.
    """
    tests = {folder: outcomes(folder) for folder in folders}
    proven: dict[str, list[str]] = {}
    for backend in BACKENDS:
        took_part = {folder: counts[backend] for folder, counts in tests.items() if backend in counts}
        if took_part and all(passed(counts) for counts in took_part.values()):
            proven[backend] = [shown(folder) for folder in took_part]
    order = [_DEFAULT]
    if "cuda" in proven:
        measured = [results.load(folder) for folder in folders if (folder / results.FILE).exists()]
        ratio = time_ratio(measured, "cuda", _DEFAULT)
        # never measured beside Triton: passing is enough; Triton that failed is behind whatever passed
        faster = ratio is None or ratio <= 1.0 or _DEFAULT not in proven
        order = ["cuda", _DEFAULT] if faster else [_DEFAULT, "cuda"]
    return proven, order


def write(page: Path, folders: Sequence[Path], check: bool) -> bool:
    """Puts the decision into the module; returns whether that changed (or, with ``check``, would change) it."""
    proven, order = decide(folders)
    old = page.read_text()
    head, _, _ = old.partition("PASSED: ")
    table = (
        "{\n" + "".join(f'    "{name}": {_tuple(where)},\n' for name, where in proven.items()) + "}" if proven else "{}"
    )
    names = ", ".join(f'"{name}"' for name in order) + ("," if len(order) == 1 else "")
    new = f"{head}PASSED: dict[str, tuple[str, ...]] = {table}\nORDER: tuple[str, ...] = ({names})\n"
    if new != old and not check:
        page.write_text(new)
    return new != old


def _tuple(names: Sequence[str]) -> str:
    # as the formatter writes it
    if len(names) == 1:
        return f'("{names[0]}",)'
    return "(\n" + "".join(f'        "{name}",\n' for name in names) + "    )"


def _environment(folder: Path) -> dict[str, Any]:
    path = folder / "environment.json"
    return json.loads(path.read_text()) if path.exists() else {}
