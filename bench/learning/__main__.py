"""``python -m bench.learning``: make checkpoints, tune, sweep, repeat a run, draw figures, write the page."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from . import paths, plan, results, sweep
from .requests import load_settings


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.learning", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    pretrain = commands.add_parser("pretrain", help="make the checkpoints that runs start from")
    pretrain.add_argument("--output", type=Path, default=paths.CHECKPOINTS)
    pretrain.add_argument("--steps", type=int, default=4000, help="of the shapes transformer")
    pretrain.add_argument("--judge-steps", type=int, default=400)

    for name, text in (("tune", "runs from which each method's bound is chosen"), ("sweep", "the runs of the page")):
        command = commands.add_parser(name, help=text)
        command.add_argument("--results", type=Path, default=paths.TUNING if name == "tune" else paths.RESULTS)
        command.add_argument("--shard", default="1/1", metavar="I/N", help="this process is number I of N")
        command.add_argument("--minutes", type=float, help="start no run after so many minutes")
        command.add_argument(
            "--settings", type=Path, default=paths.SETTINGS, help="sizes, bounds and choices of the runs"
        )
        command.add_argument("--task", choices=("digits", "shapes"), help="only the runs of this task")

    status = commands.add_parser("status", help="what of the sweep is done")
    status.add_argument("--results", type=Path, default=paths.RESULTS)
    status.add_argument("--settings", type=Path, default=paths.SETTINGS)

    choose = commands.add_parser("choose", help="print what the tuning runs choose")
    choose.add_argument("--results", type=Path, default=paths.TUNING)

    fold = commands.add_parser("fold", help="move the files of new runs into the compressed table beside their folder")
    fold.add_argument("--results", type=Path, default=paths.RESULTS)

    repeat = commands.add_parser("repeat", help="run a run's request again and compare")
    rows = commands.add_parser("rows", help="run a run's request again and keep rows for the README's figure")
    for command in (repeat, rows):
        command.add_argument("run", help="its name, or a file")
        command.add_argument("--results", type=Path, default=paths.RESULTS)
    rows.add_argument("--output", type=Path, default=paths.ROWS)

    quick = commands.add_parser("quick", help="one short run of every method; asserts mechanics, not who wins")
    quick.add_argument("--output", type=Path, help="keep the run files there")

    document = commands.add_parser("document", help="figures and the tables of docs/learning.md from run files")
    document.add_argument("--results", type=Path, default=paths.RESULTS)
    document.add_argument("--settings", type=Path, default=paths.SETTINGS)
    document.add_argument("--page", type=Path, default=paths.PAGE)
    document.add_argument("--figures", type=Path, default=paths.FIGURES)
    document.add_argument("--check", action="store_true", help="only say whether the tables are up to date")

    return _COMMANDS[(options := parser.parse_args(arguments)).command](options)


def _pretrain(options: argparse.Namespace) -> int:
    from .pretrain import make

    make(options.output, steps=options.steps, judge_steps=options.judge_steps)
    return 0


def _sweep(options: argparse.Namespace) -> int:
    settings = load_settings(options.settings)
    cells = plan.tuning(settings) if options.command == "tune" else plan.sweep(settings)
    if options.task:
        cells = [cell for cell in cells if cell.task == options.task]
    number, shards = (int(part) for part in options.shard.split("/"))
    if not 1 <= number <= shards:
        raise SystemExit(f"--shard: got {options.shard!r}, expected I/N with 1 <= I <= N")
    until = None if options.minutes is None else time.time() + 60 * options.minutes
    sweep.run_all(cells, settings, options.results, shard=number - 1, shards=shards, until=until)
    return 0


def _status(options: argparse.Namespace) -> int:
    print(sweep.status(plan.by_study(load_settings(options.settings)), options.results))
    return 0


def _choose(options: argparse.Namespace) -> int:
    print(json.dumps(plan.choose(results.load(options.results)), indent=2))
    return 0


def _fold(options: argparse.Namespace) -> int:
    count = results.fold(options.results)
    print(f"{results.table_of(options.results)}: {count} runs were added")
    return 0


def _recorded(options: argparse.Namespace) -> results.Run:
    path = Path(options.run)
    return results.load_file(path) if path.suffix == ".json" else results.find(options.results, options.run)


def _repeat(options: argparse.Namespace) -> int:
    from .runs import differences, run

    recorded = _recorded(options).result
    found = differences(recorded, run(recorded["request"]))
    for line in found:
        print(line)
    made = recorded["environment"]
    print(
        f"{options.run}: {f'{len(found)} numbers differ' if found else 'bit for bit the same'} "
        f"(recorded by {made['git_sha']}, torch {made['torch']}, {made['cpu']})"
    )
    return 1 if found else 0


def _rows(options: argparse.Namespace) -> int:
    from .mask_and_clip import record

    run = _recorded(options)
    results.write(record(run.result, run.cell.name), options.output)
    print(options.output)
    return 0


def _quick(options: argparse.Namespace) -> int:
    from .quick import check

    for line in check(options.output):
        print(line)
    return 0


def _document(options: argparse.Namespace) -> int:
    from .document import update

    settings = load_settings(options.settings)
    return update(options.results, settings, options.page, options.figures, check=options.check)


_COMMANDS = {
    "pretrain": _pretrain,
    "tune": _sweep,
    "sweep": _sweep,
    "status": _status,
    "choose": _choose,
    "fold": _fold,
    "repeat": _repeat,
    "rows": _rows,
    "quick": _quick,
    "document": _document,
}

if __name__ == "__main__":
    sys.exit(main())
