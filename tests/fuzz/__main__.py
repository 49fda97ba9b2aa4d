"""The long form: many random calls of one backend, and a tally of them.

    python -m tests.fuzz --backend cpu --cases 100000 --seed 0 --output FILE.json

Stops at the first call that is wrong, with the seed that repeats it (``--cases 1 --seed N``).
"""

from __future__ import annotations

import argparse
import collections
import json
import platform
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from support.compare import check_backend  # noqa: E402

from fuzz.draws import decidable, draw_call, in_range, seeded  # noqa: E402


def git_sha() -> str:
    result = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return result.stdout.strip() or "unknown"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("--backend", choices=("reference", "cpu", "triton"), default="cpu")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    tally: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    started = time.perf_counter()
    for seed in range(args.seed, args.seed + args.cases):
        call, words = draw_call(seeded(seed), args.device, float64=args.backend != "triton")
        if not in_range(call):
            tally["left out"]["ratio beyond float32"] += 1
            continue
        if not decidable(call):
            tally["left out"]["too close to a bound for float32"] += 1
            continue
        try:
            outcome = check_backend(call, args.backend)
        except Exception:
            print(f"seed {seed}: {words}", file=sys.stderr)
            raise
        form, objective, sampler = words.split()[:3]
        tally["form"][form] += 1
        tally["objective"][objective] += 1
        tally["sampler"][sampler] += 1
        tally["first dtype"][str(call.first.dtype).removeprefix("torch.")] += 1
        tally["noise"]["seeded" if "noise=" in words else "stored"] += 1
        tally["rows"]["kept"] += int(outcome.rows["kept"].sum())
        tally["rows"]["dropped"] += int((~outcome.rows["kept"]).sum())
    result = {
        "command": f"python -m tests.fuzz --backend {args.backend} --cases {args.cases} --seed {args.seed}",
        "sha": git_sha(),
        "machine": platform.machine(),
        "torch": torch.__version__,
        "backend": args.backend,
        "cases": args.cases,
        "wrong": 0,
        "seconds": round(time.perf_counter() - started, 1),
        "tally": {name: dict(sorted(counter.items())) for name, counter in tally.items()},
    }
    print(json.dumps(result, indent=1))
    if args.output is not None:
        args.output.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
