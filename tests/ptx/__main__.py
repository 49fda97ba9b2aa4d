"""The long form: all tests of the GPU kernels on the emulator, and a tally of them.

    python -m tests.ptx --arch 90 --output FILE.json

A file of tests at a time, each in a process of its own. The tally is written after each, and the same command goes on
where it ended. The exit code is 1 if a test was wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from bench.ops.devices import open_device
from bench.ops.environment import collect, git_sha

ROOT = Path(__file__).parents[2]
# beside the kernels' own tests, those of the public API that take any backend
_API = (
    "tests/api/test_backends_against_reference.py", "tests/api/test_layouts.py", "tests/api/test_outputs.py",
    "tests/api/test_row_statistics.py", "tests/math/test_samplers.py", "tests/math/test_ties_and_extremes.py",
)  # fmt: skip
_OF_TRITON = ("tests/triton/", "tests/api/", "tests/math/")
# a file, on a machine that does other things too
_LIMIT = 3600


def files() -> list[str]:
    """Files of tests, one run each."""
    kernels = sorted(str(path.relative_to(ROOT)) for folder in ("triton", "cuda") for path in
                     (ROOT / "tests" / folder).glob("test_*.py"))  # fmt: skip
    return [name for name in kernels if not name.endswith("test_own_process.py")] + list(_API)


def run(name: str, arch: int) -> dict[str, Any]:
    """The tally of one file."""
    plugins = ["-p", "ptx.tally"]
    env = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST_", "TRITON_INTERPRET"))}
    if name.startswith(_OF_TRITON):
        plugins += ["-p", "ptx.plugin"]
    with tempfile.TemporaryDirectory() as folder:
        tally = Path(folder, "tally.json")
        env |= {"PYTHONPATH": str(ROOT / "tests"), "FLOWDPPO_PTX_ARCH": str(arch), "FLOWDPPO_PTX_TALLY": str(tally)}
        # tests/cuda leaves tests out otherwise
        env["FLOWDPPO_PTX"] = "full"
        command = [sys.executable, "-m", "pytest", "-q", *plugins, "-p", "no:cacheprovider", "-o", "timeout=1200", name]
        start = time.monotonic()
        done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=_LIMIT)
        if not tally.exists():
            raise RuntimeError(f"{name}: pytest left no tally\n{done.stdout[-4000:]}{done.stderr[-4000:]}")
        found = json.loads(tally.read_text()) | {"seconds": round(time.monotonic() - start)}
    if found["wrong"]:
        print(done.stdout, file=sys.stderr)
    return found


def merged(environment: dict[str, Any], arch: int, parts: dict[str, dict[str, Any]]) -> dict[str, Any]:
    counts = {key: Counter() for key in ("outcomes", "launches")}
    for part in parts.values():
        for key, counter in counts.items():
            counter.update(part.get(key, {}))
    return {
        "command": f"python -m tests.ptx --arch {arch}",
        "environment": environment,
        "arch": arch,
        **{key: dict(sorted(counter.items())) for key, counter in counts.items()},
        "wrong": [name for part in parts.values() for name in part["wrong"]],
        "files": parts,
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.ptx", description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, default=90, help="compute capability, 90 for 9.0; of Triton's kernels")
    parser.add_argument("--output", type=Path, help="default: bench/results/ptx/<date>-<sha>.json")
    parser.add_argument("--only", nargs="+", metavar="FILE", help="files of tests; default: all")
    args = parser.parse_args()
    environment = collect(open_device("cpu"))
    default = ROOT / "bench" / "results" / "ptx" / f"{environment['date'][:10]}-{git_sha()}.json"
    output = args.output or default
    parts: dict[str, dict[str, Any]] = {}
    if output.exists():
        saved = json.loads(output.read_text())
        if (saved["environment"]["git_sha"], saved["arch"]) != (git_sha(), args.arch):
            sys.exit(f"{output}: was begun at another commit or for another GPU; remove it to start afresh")
        # as it was when the run began: its own tally is no change
        parts, environment = saved["files"], saved["environment"]
    output.parent.mkdir(parents=True, exist_ok=True)
    for name in args.only or files():
        if name in parts:
            continue
        parts[name] = run(name, args.arch)
        print(f"{name}: {parts[name]['outcomes']}, {parts[name]['seconds']} s", flush=True)
        temporary = output.with_name(f".{output.name}.writing")
        temporary.write_text(json.dumps(merged(environment, args.arch, parts), indent=1) + "\n")
        os.replace(temporary, output)
    return 1 if any(part["wrong"] for part in parts.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
