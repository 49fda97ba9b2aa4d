"""The long form: thousands of calls in one process, and what it held after each tenth of them.

    python -m tests.endurance losses --calls 10000 --output FILE.json
    python -m tests.endurance trainer --calls 1000 --output FILE.json

Exit code 1 if something grew.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch

from bench.ops.devices import open_device
from bench.ops.environment import collect

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from endurance.loads import (  # noqa: E402
    LOSS_LIMITS,
    PLOT_LIMITS,
    TRAINER_LIMITS,
    run_losses,
    run_trainer,
    unexpected_files,
)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.endurance", description=__doc__.splitlines()[0])
    parser.add_argument("load", choices=("losses", "trainer", "plotting-trainer"))
    parser.add_argument("--calls", type=int, required=True, help="loss calls or iterations, a multiple of 10")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    environment = collect(open_device("cpu"))
    if args.load == "losses":
        record = run_losses(args.calls, say=say)
        faults = record.faults(LOSS_LIMITS)
    else:
        with tempfile.TemporaryDirectory() as folder:
            run, plots = Path(folder) / "run", args.load == "plotting-trainer"
            record = run_trainer(args.calls, run, plots, say)
            faults = record.faults(PLOT_LIMITS if plots else TRAINER_LIMITS)
            faults += [f"files: {name}" for name in unexpected_files(run, args.calls, plots)]
    result = {
        "command": f"python -m tests.endurance {args.load} --calls {args.calls}",
        "environment": environment,
        "faults": faults,
        **record.as_dict(),
    }
    held = result.pop("held")
    lines = ",\n".join(f"  {json.dumps(line)}" for line in held)
    text = f'{json.dumps(result, indent=1)[:-2]},\n "held": [\n{lines}\n ]\n}}\n'
    print(text)
    if args.output is not None:
        args.output.write_text(text)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
