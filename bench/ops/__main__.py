"""Command line of the op benchmark; ``python -m bench.ops --help``."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from bench.command_line import open_named, recorded
from bench.pages import put, shown

from . import threads

_README = "README.md"
_PAGE = Path("docs") / "performance.md"
_DEVICES = ("auto", "cpu", "cuda", "rehearsal")
_DTYPES = ("bfloat16", "float32")


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; 0 when all is well, 1 when something checked was wrong, 2 for a call that makes no sense."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = _parser().parse_args(arguments)
    threads.prepare()
    try:
        return options.run(options, arguments)
    except (ValueError, RuntimeError) as error:
        print(f"bench.ops: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.ops", description="The op benchmark.")
    commands = parser.add_subparsers(required=True, metavar="command")

    run = commands.add_parser("run", help="measure, and write results.json and table.md into a folder")
    run.add_argument("--quick", action="store_true", help="10 samples and few workloads; marked as such in the result")
    run.add_argument("--workloads", nargs="+", default=["default"], metavar="NAME", help="names, 'default' or 'all'")
    run.add_argument("--contenders", nargs="+", default=["all"], metavar="NAME", help="names, backends or 'all'")
    run.add_argument("--dtypes", nargs="+", default=list(_DTYPES), choices=_DTYPES)
    run.add_argument("--threads", nargs="+", type=int, metavar="N", help="CPU threads; default 1 and 2, quick: 2")
    run.add_argument("--device", choices=_DEVICES, default="auto")
    run.add_argument("--budget", type=float, metavar="SECONDS", help="begin no further case after this long")
    run.add_argument("--output", type=Path, metavar="DIR", help="default bench/results/..., quick: runs/bench-quick")
    run.set_defaults(run=_run)

    smoke = commands.add_parser("smoke", help="every form of this library once on tiny latents, checked, not timed")
    smoke.add_argument("--device", choices=_DEVICES, default="auto")
    smoke.add_argument("--contenders", nargs="+", default=["all"], metavar="NAME")
    smoke.add_argument("--dtypes", nargs="+", default=list(_DTYPES), choices=_DTYPES)
    smoke.set_defaults(run=_smoke)

    environment = commands.add_parser("environment", help="describe this machine in DIR/environment.json")
    environment.add_argument("folder", type=Path, metavar="DIR")
    environment.add_argument("--device", choices=_DEVICES, default="auto")
    environment.set_defaults(run=_environment)

    folder = commands.add_parser("folder", help="print the result folder a full run would write")
    folder.add_argument("--device", choices=_DEVICES, default="auto")
    folder.set_defaults(run=_folder)

    table = commands.add_parser("table", help="print a result folder as Markdown")
    table.add_argument("folder", type=Path, metavar="DIR")
    table.set_defaults(run=_table)

    plot = commands.add_parser("plot", help="draw a result folder into DIR/plots")
    plot.add_argument("folder", type=Path, metavar="DIR")
    plot.set_defaults(run=_plot)

    compare = commands.add_parser("compare", help="B against A: ratios with noise bands")
    compare.add_argument("a", type=Path, metavar="DIR_A")
    compare.add_argument("b", type=Path, metavar="DIR_B")
    compare.add_argument("--all", action="store_true", dest="everything", help="also what is within noise")
    compare.set_defaults(run=_compare)

    host = commands.add_parser("host", help="the host's share of a call, Triton's launches dropped; no GPU is needed")
    host.add_argument("--rounds", type=int, default=40, metavar="N")
    host.add_argument("--output", type=Path, metavar="DIR", help="default bench/results/host/<date>-<git sha>")
    host.add_argument("--table", type=Path, metavar="DIR", help="measure nothing; put this folder's table on the page")
    host.add_argument("--check", action="store_true", help="with --table: only fail if the page differs")
    host.add_argument("--page", type=Path, default=_PAGE)
    host.set_defaults(run=_host)

    readme = commands.add_parser("readme", help="write the README's table from result folders, one per machine")
    readme.add_argument("folders", type=Path, nargs="+", metavar="DIR")
    readme.add_argument("--check", action="store_true", help="only fail if the README differs")
    readme.add_argument("--page", type=Path, default=Path(_README))
    readme.set_defaults(run=_readme)

    goals = commands.add_parser("goals", help="write the goals table of docs/performance.md from result folders")
    goals.add_argument("folders", type=Path, nargs="*", metavar="DIR")
    goals.add_argument("--check", action="store_true", help="only fail if the page differs")
    goals.add_argument("--page", type=Path, default=_PAGE)
    goals.set_defaults(run=_goals)

    evidence = commands.add_parser(
        "evidence", help="write what `auto` takes for CUDA tensors, from runs of bench/gpu.sh"
    )
    evidence.add_argument("folders", type=Path, nargs="*", metavar="DIR")
    evidence.add_argument("--check", action="store_true", help="only fail if the module differs")
    evidence.add_argument("--page", type=Path, default=Path("flowdppo_fast") / "evidence.py")
    evidence.set_defaults(run=_evidence)
    return parser


def _run(options: argparse.Namespace, arguments: list[str]) -> int:
    from . import contenders, environment, results, table, workloads
    from .run import Plan, execute

    device = open_named(options.device)
    kind = device.kind
    counts: tuple[int | None, ...] = (None,)
    if kind == "cpu":
        counts = tuple(options.threads or ((2,) if options.quick else (1, 2)))
    elif options.threads:
        raise ValueError(f"threads: got {options.threads} with device {kind!r}, expected none; they are of CPU runs")
    chosen = workloads.select(options.workloads, kind, options.quick)
    plan = Plan(
        workloads=chosen,
        contenders=contenders.select(contenders.registry(device.torch_device.type), options.contenders),
        dtypes=options.dtypes,
        threads=counts,
        quick=options.quick,
        command=recorded("bench.ops", arguments),
        budget=options.budget,
    )
    folder = options.output
    if folder is None:
        folder = Path("runs") / "bench-quick" / kind if options.quick else environment.result_folder(device)
    result = execute(plan, device, folder, lambda line: print(line, flush=True))
    text = table.full(result)
    (folder / "table.md").write_text(text)
    print("\n" + text)
    print(f"written: {folder / results.FILE}, {folder / 'table.md'}")
    wrong = results.failures(result)
    for line in wrong:
        print(f"bench.ops: {line}", file=sys.stderr)
    return 1 if wrong else 0


def _smoke(options: argparse.Namespace, arguments: list[str]) -> int:
    from . import contenders
    from .run import smoke

    device = open_named(options.device)
    chosen = contenders.select(contenders.registry(device.torch_device.type), options.contenders)
    return 0 if smoke(chosen, options.dtypes, device, print) else 1


def _environment(options: argparse.Namespace, arguments: list[str]) -> int:
    from . import environment

    options.folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(environment.collect(open_named(options.device)), indent=1)
    (options.folder / "environment.json").write_text(text + "\n")
    print(text)
    return 0


def _folder(options: argparse.Namespace, arguments: list[str]) -> int:
    from . import environment

    print(environment.result_folder(open_named(options.device)).as_posix())
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


def _compare(options: argparse.Namespace, arguments: list[str]) -> int:
    from . import compare, results

    print(compare.report(results.load(options.a), results.load(options.b), options.everything))
    return 0


def _host(options: argparse.Namespace, arguments: list[str]) -> int:
    from . import environment, host

    if options.table is not None:
        result = json.loads((options.table / host.FILE).read_text())
        content = f"Result folder: `{shown(options.table)}`.\n\n{host.table(result)}"
        return put(options.page, {"bench:host": content}, check=options.check, program="bench.ops")
    folder = options.output
    if folder is None:
        folder = Path("bench") / "results" / "host" / environment.result_folder(open_named("cpu")).name
    print(host.run(folder, options.rounds))
    print(f"written: {folder / host.FILE}, {folder / 'table.md'}")
    return 0


def _readme(options: argparse.Namespace, arguments: list[str]) -> int:
    from . import results, table

    found = [(results.load(folder), shown(folder)) for folder in options.folders]
    for result, source in found:
        if result["device"] == "rehearsal" or result["quick"]:
            raise ValueError(f"{source}: a quick run or a rehearsal is nothing to put into a README")
    (kind, *others) = {result["device"] for result, _ in found}
    if others:
        raise ValueError(f"folders: got results of {kind} and {', '.join(others)}, expected one kind of device")
    return put(options.page, {f"bench:ops:{kind}": table.short(found)}, check=options.check, program="bench.ops")


def _goals(options: argparse.Namespace, arguments: list[str]) -> int:
    from . import results, table

    found = [results.load(folder) for folder in options.folders]
    sources = ", ".join(f"`{shown(folder)}`" for folder in options.folders) or "none yet"
    content = f"Result folders: {sources}.\n\n{table.goals_table(found)}"
    return put(options.page, {"bench:goals": content}, check=options.check, program="bench.ops")


def _evidence(options: argparse.Namespace, arguments: list[str]) -> int:
    from . import evidence

    differs = evidence.write(options.page, options.folders, options.check)
    state = ("differs" if options.check else "written") if differs else "is up to date"
    print(f"{options.page}: {state}")
    return 1 if differs and options.check else 0


if __name__ == "__main__":
    sys.exit(main())
