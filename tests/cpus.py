"""The tests that compare bits or learn, on every x86 processor that this one can play.

    python -m tests.cpus --output FILE.json

A processor is a choice of the instruction sets that torch, oneDNN, MKL and this project's library may use, and a number
of threads; each runs ``pytest -m "bits or learns"`` in a process of its own. Exit code 1 if a test failed on one.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

from bench.ops.devices import open_device
from bench.ops.environment import collect

ROOT = Path(__file__).parents[1]
VARIABLES = (
    "ATEN_CPU_CAPABILITY", "FLOWDPPO_CPU_ISA", "MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS", "OMP_NUM_THREADS",
    "ONEDNN_MAX_CPU_ISA",
)  # fmt: skip
_AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "FLOWDPPO_CPU_ISA": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
CPUS: dict[str, dict[str, str]] = {
    "this one": {},
    "AVX2": {**_AVX2, "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "MKL as on every AVX2 machine": {**_AVX2, "MKL_CBWR": "AVX2"},
    "SSE": {
        "ATEN_CPU_CAPABILITY": "default", "FLOWDPPO_CPU_ISA": "baseline", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
    },
    "MKL as on every x86 machine": {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE"},
}  # fmt: skip
RUNS = [
    ("this one", 2),
    ("AVX2", 1),
    ("MKL as on every AVX2 machine", 2),
    ("SSE", 2),
    ("MKL as on every x86 machine", 1),
]


def read(report: Path) -> dict[str, Any]:
    """What a JUnit file says: counts, the names of failed tests, and the gains of tests that learn."""
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    failed, gains = {}, {}
    for case in ElementTree.parse(report).iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        found = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
        kind = "passed" if found is None else "skipped" if found.tag == "skipped" else "failed"
        counts[kind] += 1
        if found is not None and kind == "failed":
            failed[name] = found.get("message", "")[:300]
        for entry in case.iter("property"):
            if entry.get("name") == "gain":
                gains.setdefault(name, []).append(entry.get("value"))
    return {**counts, "failures": failed, "gains": gains}


def has_such_tests(path: Path) -> bool:
    """Whether a file has such tests, so that all others need not be collected."""
    return any(text in path.read_text() for text in ("mark.bits(", "learning.check("))


def run(cpu: str, threads: int, tests: list[str]) -> dict[str, Any]:
    """One processor's results."""
    environment = {key: value for key, value in os.environ.items() if key not in VARIABLES}
    own = {**CPUS[cpu], "OMP_NUM_THREADS": str(threads)}
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "bits or learns", *tests]
        limits = ["-o", "faulthandler_timeout=330", "-o", "faulthandler_exit_on_timeout=true"]
        command += [f"--junit-xml={report}", *limits]
        variables = {**environment, **own, "FLOWDPPO_REQUIRE_CPU": "1"}
        done = subprocess.run(command, env=variables, cwd=ROOT, capture_output=True, text=True)
        if not report.exists():
            # a crash or a hang: pytest could not say which test, its last lines do
            tail = (done.stdout + done.stderr)[-3000:]
            found: dict[str, Any] = {"passed": 0, "failed": 1, "skipped": 0, "failures": {"the process died": tail}}
        else:
            found = read(report)
    return {"cpu": cpu, "threads": threads, "variables": own, "seconds": round(time.monotonic() - started), **found}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.cpus", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="written after each processor; what it has is not run again")
    parser.add_argument(
        "--only", nargs="+", choices=CPUS, default=list(CPUS), metavar="CPU", help=f"of {', '.join(CPUS)}"
    )
    args = parser.parse_args()
    tests = [str(path) for path in sorted((ROOT / "tests").rglob("test_*.py")) if has_such_tests(path)]
    result: dict[str, Any] = {"command": "python -m tests.cpus", "environment": collect(open_device("cpu")), "runs": []}
    if args.output is not None and args.output.exists():
        result["runs"] = json.loads(args.output.read_text())["runs"]
    for cpu, threads in RUNS:
        if cpu not in args.only or any((done["cpu"], done["threads"]) == (cpu, threads) for done in result["runs"]):
            continue
        found = run(cpu, threads, tests)
        result["runs"].append(found)
        counts = ", ".join(f"{found[kind]} {kind}" for kind in ("passed", "failed", "skipped"))
        print(f"{cpu}, {threads} threads: {counts}", file=sys.stderr, flush=True)
        for name, message in found["failures"].items():
            print(f"  {name}: {message}", file=sys.stderr, flush=True)
        if args.output is not None:
            args.output.parent.mkdir(parents=True, exist_ok=True)
            args.output.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if any(found["failed"] or not found["passed"] for found in result["runs"]) else 0


if __name__ == "__main__":
    sys.exit(main())
