"""For ``python -m bench.ops evidence``: how the GPU tests of each backend ended, on disk as each of them ends."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

BACKENDS = ("triton", "cuda")
OUTCOMES = ("passed", "failed", "error", "skipped")


def backend_of(nodeid: str) -> str | None:
    """The backend that a test is evidence of: the one that its parameters or its folder name."""
    path, _, name = nodeid.partition("::")
    named = {*re.split(r"[-\[\]]", name), *Path(path).parts[:-1]}
    return next((backend for backend in BACKENDS if backend in named), None)


def outcome_of(report: Any) -> str | None:
    """How a test ended, told from the report of one of its phases; None where that does not tell."""
    if report.skipped:
        # tests of what a backend does not promise (float64) are nobody's
        return None if "makes no promise" in str(report.longrepr) else "skipped"
    if report.when == "call":
        return report.outcome
    return "error" if report.failed else None


class GpuReport:
    """A pytest plugin; what earlier runs have left in the file stays.

    A backend is ``unfinished`` from the start of a run of its tests until that run has come to its end.
    """

    def __init__(self, path: Path, quick: bool, backends: tuple[str, ...]) -> None:
        self.path, self.backends = path, backends
        found = json.loads(path.read_text()) if path.exists() else {"quick": quick, "backends": {}, "unfinished": []}
        found["quick"] |= quick
        found["backends"] |= {name: dict.fromkeys(OUTCOMES, 0) for name in backends}
        found["unfinished"] = sorted({*found["unfinished"], *backends})
        self.found = found
        self._write()

    def pytest_runtest_logreport(self, report):
        backend, outcome = backend_of(report.nodeid), outcome_of(report)
        if "gpu" in report.keywords and backend in self.backends and outcome:
            self.found["backends"][backend][outcome] += 1
            self._write()

    def pytest_sessionfinish(self, exitstatus):
        # 0: all passed, 1: some failed; else it was stopped or could not begin
        if int(exitstatus) in (0, 1):
            self.found["unfinished"] = sorted({*self.found["unfinished"]} - {*self.backends})
            self._write()

    def _write(self) -> None:
        temporary = self.path.with_name(f".{self.path.name}.writing")
        temporary.write_text(json.dumps(self.found, indent=1) + "\n")
        os.replace(temporary, self.path)
