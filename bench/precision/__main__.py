"""Command line of the precision benchmark; see the package."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch

from bench.ops.devices import open_device
from bench.ops.environment import ROOT, collect, result_folder

from . import measure, page

DIVERGENCES = [10.0**power for power in range(-9, 3)]
SIZES = [64, 4096, 65536, 1048576, 10**7]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.precision", description="Errors against float64.")
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="measure")
    run.add_argument("--quick", action="store_true", help="two sizes and four divergences")
    run.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    run.add_argument("--backends", nargs="+", default=["reference", "cpu"])
    run.add_argument("--output", type=Path, help="another folder for the results")
    write = commands.add_parser("page", help="tables and figures from results")
    write.add_argument("folder", type=Path)
    write.add_argument("--check", action="store_true", help="change nothing, fail if the page is out of date")
    options = parser.parse_args()
    if options.command == "page":
        return page.write(options.folder, check=options.check)
    device = open_device(options.device)
    sizes, divergences = (SIZES[:3], DIVERGENCES[::3]) if options.quick else (SIZES, DIVERGENCES)
    started = time.perf_counter()
    records = list(
        measure.sweep(divergences, sizes, ["bfloat16", "float32"], options.backends, options.device, seeds=3)
    )
    folder = options.output or ROOT / f"{result_folder(device)}-precision"
    folder.mkdir(parents=True, exist_ok=True)
    result = {
        "command": "python -m bench.precision " + " ".join(sys.argv[1:]),
        "environment": collect(device),
        "threads": torch.get_num_threads(),
        "seconds": round(time.perf_counter() - started, 1),
        "records": [{key: _short(value) for key, value in record.items()} for record in records],
    }
    lines = ",\n".join(json.dumps(record) for record in result.pop("records"))
    head = json.dumps(result, indent=1)
    (folder / "results.json").write_text(f'{head[:-2]},\n "records": [\n{lines}\n]\n}}\n')
    print(folder)
    return 0


def _short(value: object) -> object:
    return float(f"{value:.4g}") if isinstance(value, float) else value


if __name__ == "__main__":
    sys.exit(main())
