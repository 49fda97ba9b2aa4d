"""Command line of the end-to-end benchmark; ``python -m bench.train --help``."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from bench.command_line import open_named, recorded
from bench.ops import threads
from bench.pages import put, shown

_PAGE = Path("docs") / "performance.md"


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; 0 when all is well, 1 when a contender was refused, 2 for a call that makes no sense."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = _parser().parse_args(arguments)
    threads.prepare()
    try:
        return options.run(options, arguments)
    except (ValueError, RuntimeError) as error:
        print(f"bench.train: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.train", description="The end-to-end benchmark.")
    commands = parser.add_subparsers(required=True, metavar="command")

    run = commands.add_parser("run", help="measure, and write results.json, table.md and plots into a folder")
    run.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    run.add_argument("--quick", action="store_true", help="2 rounds, on a CPU of a model of no size; not for quoting")
    run.add_argument("--workloads", nargs="+", default=["default"], metavar="NAME")
    run.add_argument("--rounds", type=int, metavar="N", help="measured iterations per contender; default 5, quick 2")
    run.add_argument("--threads", type=int, default=1, metavar="N", help="CPU threads")
    run.add_argument("--budget", type=float, metavar="SECONDS", help="begin no further round after this long")
    run.add_argument(
        "--output", type=Path, metavar="DIR", help="default bench/results/..., quick: runs/bench-train-quick"
    )
    run.set_defaults(run=_run)

    worker = commands.add_parser("worker", help="peak memory of one contender, for `run`")
    worker.add_argument("workload")
    worker.add_argument("contender")
    worker.set_defaults(run=_worker)

    for name, action, text in (("table", _table, "print"), ("plot", _plot, "draw")):
        command = commands.add_parser(name, help=f"{text} a result folder")
        command.add_argument("folder", type=Path, metavar="DIR")
        command.set_defaults(run=action)

    page = commands.add_parser("page", help="write the block bench:train:<device> of a page from a result folder")
    page.add_argument("folder", type=Path, metavar="DIR")
    page.add_argument("--check", action="store_true", help="only fail if the page differs")
    page.add_argument("--page", type=Path, default=_PAGE)
    page.set_defaults(run=_page)

    memory = commands.add_parser("memory", help="write the computed tables of docs/memory.md; some minutes")
    memory.add_argument("--check", action="store_true", help="only fail if the page differs")
    memory.add_argument("--page", type=Path, default=Path("docs") / "memory.md")
    memory.add_argument("--tables", nargs="+", choices=("trajectories", "peak"), default=["trajectories", "peak"])
    memory.set_defaults(run=_memory)
    return parser


def _run(options: argparse.Namespace, arguments: list[str]) -> int:
    import torch

    from bench.ops import environment

    from . import plots, results, table
    from .run import execute
    from .workloads import TINY, select

    device = open_named(options.device)
    if device.kind == "cpu":
        torch.set_num_threads(options.threads)
    tiny = options.quick and device.kind == "cpu" and options.workloads == ["default"]
    chosen = [TINY] if tiny else select(options.workloads, device.kind)
    folder = options.output
    if folder is None:
        named = environment.result_folder(device)
        folder = (
            Path("runs") / "bench-train-quick" / device.kind
            if options.quick
            else named.with_name(named.name + "-train")
        )
    result = execute(
        chosen,
        device,
        folder,
        lambda line: print(line, flush=True),
        quick=options.quick,
        command=recorded("bench.train", arguments),
        count=options.rounds,
        budget=options.budget,
    )
    text = table.full(result)
    (folder / "table.md").write_text(text)
    print("\n" + text)
    written = [folder / results.FILE, folder / "table.md", *plots.draw(result, folder / "plots")]
    print(f"written: {', '.join(map(str, written))}")
    refused = [e["name"] for w in result["workloads"] for e in w["contenders"] if e["status"] != "ok"]
    return 1 if refused else 0


def _worker(options: argparse.Namespace, arguments: list[str]) -> int:
    import torch

    from .run import worker
    from .workloads import select

    torch.set_num_threads(1)
    print(json.dumps(worker(select([options.workload], "cpu")[0], options.contender)))
    return 0


def _table(options: argparse.Namespace, arguments: list[str]) -> int:
    from . import results, table

    print(table.full(results.load(options.folder)), end="")
    return 0


def _plot(options: argparse.Namespace, arguments: list[str]) -> int:
    from . import plots, results

    for path in plots.draw(results.load(options.folder), options.folder / "plots"):
        print(path)
    return 0


def _memory(options: argparse.Namespace, arguments: list[str]) -> int:
    from . import published

    blocks = {}
    for name in options.tables:
        if name == "trajectories":
            content = published.trajectories_table()
        else:
            content = published.peak_table(say=lambda line: print(line, file=sys.stderr, flush=True))
        blocks[f"bench:memory:{name}"] = content
    return put(options.page, blocks, check=options.check, program="bench.train")


def _page(options: argparse.Namespace, arguments: list[str]) -> int:
    from . import results, table

    result = results.load(options.folder)
    if result["quick"]:
        raise ValueError(f"{options.folder}: a quick run is nothing to put into a page")
    content = table.page(result, shown(options.folder))
    return put(options.page, {f"bench:train:{result['device']}": content}, check=options.check, program="bench.train")


if __name__ == "__main__":
    sys.exit(main())
