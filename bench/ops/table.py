"""Markdown from results: the full table, the short one for the README, the goals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from . import goals
from .results import FORWARD, TOTAL, Record, Stat, best_backend, by_name, compiled_peer, failures
from .workloads import WORKLOADS

_HEADER = (
    "contender", "forward ms", "fwd+bwd ms", "x eager", "x compiled", "% copy fwd", "% copy f+b",
    "launches f / f+b", "syncs", "extra MB", "loss err", "KL err", "log-ratio err", "grad err",
)  # fmt: skip
_TRAINER_HEADER = (
    "trainer, objective", "latents", "", "fwd+bwd ms", "faster", "launches over latents / all", "syncs", "extra MB",
    "loss err", "grad err",
)  # fmt: skip
# where calls are asynchronous, what the caller sees stands beside the device's own time
_CALL_HEADER = ("call fwd ms", "call fwd+bwd ms", "host fwd us", "host fwd+bwd us")


def full(result: Mapping[str, Any]) -> str:
    """One table per case, then what was not timed and why, then the goals."""
    parts = [_heading(result)]
    for case in result["cases"]:
        parts.append(_case(result, case))
    steps = trainers_table(result)
    if steps is not None:
        parts.append("## Trainers, before and after\n\n" + steps)
    for item in result["left_out"]:
        parts.append(f"left out: {item['workload']} {item['dtype']}: {item['reason']}")
    parts.append("## Goals\n\n" + goals_table([result], device=result["device"]))
    wrong = failures(result)
    if wrong:
        parts.append("## Wrong or failed\n\n" + "\n".join(f"- {line}" for line in wrong))
    return "\n\n".join(parts) + "\n"


def _heading(result: Mapping[str, Any]) -> str:
    lines = [f"# Op benchmark, {describe(result)}", "", f"`{result['command']}`", ""]
    lines += _warnings(result)
    for copy in result["copy"]:
        rate = Stat.of(copy["samples"]).rate(copy["bytes"]) / 1e9
        threads = "" if copy["threads"] is None else f", {_threads(copy['threads'])}"
        lines.append(f"- copy bandwidth{threads}: {rate:.1f} GB/s, read + written ({len(copy['samples'])} samples)")
    lines.append(
        "- times are medians with quartiles in brackets; "
        + ("device time from graph replays over cold inputs" if result["device"] != "cpu" else "wall time")
        + "; errors are relative to float64 (docs/performance.md)"
    )
    starts: dict[str, list[str]] = {}
    for case in result["cases"][:1]:
        for entry in case["contenders"]:
            if entry["status"] != "missing" and not entry.get("trainer"):
                starts.setdefault(entry["starts_from"], []).append(entry["name"])
    lines += [f"- starting from {start}: {'; '.join(names)}" for start, names in starts.items()]
    return "\n".join(lines)


def _warnings(result: Mapping[str, Any]) -> list[str]:
    found = []
    if result["device"] == "rehearsal":
        found.append("- REHEARSAL of the GPU path on CPU tensors: no figure here means anything")
    if result["quick"]:
        found.append("- QUICK run: 10 samples and few workloads; not for quoting")
    if not result["complete"] and not result["left_out"]:
        found.append("- INCOMPLETE: the run was cut short")
    return found


def describe(result: Mapping[str, Any]) -> str:
    """Machine, versions, date and commit in one line."""
    env = result["environment"]
    if result["device"] == "cuda":
        gpu = env.get("gpu") or {}
        machine = f"{gpu.get('name', 'GPU')}, driver {gpu.get('driver_version', 'unknown')}"
    else:
        machine = f"{env['cpu']}, {env['cpus']} cores"
    sha = env["git_sha"] + (" with uncommitted changes" if env["git_dirty"] else "")
    triton = "" if result["device"] == "cpu" else f", Triton {env['triton']}"
    return f"{machine}, torch {env['torch']}{triton}, {env['date'][:10]}, commit {sha}"


def _case(result: Mapping[str, Any], case: Mapping[str, Any]) -> str:
    named = by_name(result, case)
    rows = [_row(record, named) for record in named.values() if not record.entry.get("trainer")]
    threads = "" if case["threads"] is None else f", {_threads(case['threads'])}"
    title = (
        f"## {case['workload']} {case['dtype']}{threads}\n\n{case['elements_per_row']:,} elements per row, "
        f"{case['input_sets']} input sets" + ("" if case["cold"] else ", NOT larger than 3x the cache")
    )
    groups: dict[str, list[str]] = {}
    for entry in case["contenders"]:
        if entry["status"] != "ok":
            # a backend that is missing is missing in all its forms
            shared = entry["status"] == "missing" or (entry.get("trainer") and entry["status"] == "left out")
            name = f"{entry['name'].split('/')[0]}/*" if shared else entry["name"]
            names = groups.setdefault(f"{entry['status']}: {entry['reason']}", [])
            if name not in names:
                names.append(name)
    notes = [f"- {'; '.join(names)}: {reason}" for reason, names in groups.items()]
    header = (*_HEADER, *_CALL_HEADER) if result["device"] != "cpu" else _HEADER
    return "\n\n".join(filter(None, (title, markdown(header, rows) if rows else "", "\n".join(notes))))


def _row(record: Record, named: Mapping[str, Record]) -> list[str]:
    entry, errors = record.entry, record.entry["errors"]
    eager = named.get("peer-eager, no syncs")
    launches = [entry.get("launches_forward"), entry.get("launches_total")]
    cells = [
        record.name + (" (wall)" if record.graphs and "no_device_time" in entry else ""),
        _milliseconds(record.time(FORWARD)),
        _milliseconds(record.time(TOTAL)),
        _ratio(eager, record),
        _ratio(compiled_peer(named, TOTAL), record),
        _percent(record.bandwidth_fraction(FORWARD)),
        _percent(record.bandwidth_fraction(TOTAL)),
        " / ".join(_count(count) for count in launches),
        str(entry.get("syncs", "-")),
        _megabytes(entry.get("extra_bytes_total")),
        *(_error(errors[name]) for name in ("loss", "kl", "log_ratio", "gradient")),
    ]
    if record.graphs:
        cells += [_milliseconds(record.samples("wall", part)) for part in (FORWARD, TOTAL)]
        host = (record.samples("host", part) for part in (FORWARD, TOTAL))
        cells += ["-" if stat is None else f"{stat.median / 1e3:.1f}" for stat in host]
    return cells


def trainers_table(result: Mapping[str, Any]) -> str | None:
    """Each trainer's step as it is today and through its integration, or None where none was timed."""
    rows = []
    for case in result["cases"]:
        named = by_name(result, case)
        for record in named.values():
            if record.entry.get("trainer"):
                rows.append(_trainer_row(record, named))
    if not rows:
        return None
    notes = (
        "The step of one micro-batch from the model's output: replay, loss, gradient, and what the trainer reads then. "
        "Before: the trainer's own convention in eager torch. After: the integration, called as "
        "docs/integrations says. verl-omni, UniRL and Flow-Factory are stood in for by the base classes of the tests."
    )
    return notes + "\n\n" + markdown(_TRAINER_HEADER, rows)


def _trainer_row(record: Record, named: Mapping[str, Record]) -> list[str]:
    entry, case = record.entry, record.case
    trainer, when = entry["name"].split("/")
    threads = "" if case["threads"] is None else f", {_threads(case['threads'])}"
    return [
        f"{trainer}, {entry['objective']}",
        f"{case['workload']} {case['dtype']}{threads}",
        when,
        _milliseconds(record.time(TOTAL)),
        _ratio(named.get(f"{trainer}/before"), record) if when == "after" else "",
        f"{_count(entry.get('launches_latents'))} / {_count(entry['launches_total'])}",
        str(entry["syncs"]),
        _megabytes(entry["extra_bytes_total"]),
        _error(entry["errors"]["loss"]),
        _error(entry["errors"]["gradient"]),
    ]


def short(found: Sequence[tuple[Mapping[str, Any], str]]) -> str:
    """The README's table: the core workloads, forward plus backward, a group of columns per machine.

    Args:
        found: results of one kind of device, each with the folder that it is from.
    """
    header, columns, sources = ["latents", "dtype"], [], []
    for result, source in found:
        header += [f"{_machine(result)}: this library ms", "x eager", "x compiled"]
        columns.append(_short_cases(result))
        threads = max((case["threads"] or 0 for case in result["cases"]), default=0)
        sources.append(f"- {describe(result)}{f', {_threads(threads)}' if threads else ''}: `{source}`.")
    rows = [
        [f"{name} [{shape}]", dtype, *(cell for one in columns for cell in one.get((name, shape, dtype), ["-"] * 3))]
        for name, shape, dtype in dict.fromkeys(key for one in columns for key in one)
    ]
    lines = [
        "Loss, metrics and gradient of one micro-batch, forward plus backward, medians. Eager and compiled are what "
        "trainers run today: sampler step, log-prob, KL and masked loss from the model's output.",
        "",
        markdown(header, rows),
        "",
        *sources,
    ]
    return "\n".join([*(line for result, _ in found for line in _warnings(result)), *lines])


def _machine(result: Mapping[str, Any]) -> str:
    env = result["environment"]
    return env["cpu"] if result["device"] != "cuda" else (env.get("gpu") or {}).get("name", "GPU")


def _short_cases(result: Mapping[str, Any]) -> dict[tuple[str, str, str], list[str]]:
    """Of each core workload with the most threads: this library's time, and that of eager and compiled code over it."""
    backend = best_backend(result)
    threads = max((case["threads"] or 0 for case in result["cases"]), default=0)
    core = {workload.key for workload in WORKLOADS if workload.core}
    cells = {}
    for case in result["cases"]:
        named = by_name(result, case)
        ours, compiled = named.get(f"{backend}/velocity"), compiled_peer(named, TOTAL)
        eager = named.get("peer-eager, no syncs")
        if case["workload"] not in core or (case["threads"] or 0) != threads or None in (ours, compiled, eager):
            continue
        shape = f"{'x'.join(map(str, case['rows']))}, {', '.join(map(str, case['latent']))}"
        cells[case["name"], shape, case["dtype"]] = [
            _milliseconds(ours.time(TOTAL), spread=False),
            _ratio(eager, ours),
            _ratio(compiled, ours),
        ]
    return cells


def goals_table(results: Sequence[Mapping[str, Any]], device: str | None = None) -> str:
    """Goal, measured, verdict; only those of ``device`` if given."""
    chosen = [goal.key for goal in goals.GOALS if device in (None, goal.device)]
    rows = [[g.goal, g.measured or "-", g.status] for g in goals.evaluate(results) if g.key in chosen]
    return markdown(("goal", "measured", "verdict"), rows)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table with padded columns, readable as text."""
    table = [list(header), *map(list, rows)]
    widths = [max(len(line[i]) for line in table) for i in range(len(header))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |" for line in table]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def _threads(count: int) -> str:
    return f"{count} thread" if count == 1 else f"{count} threads"


def _milliseconds(stat: Stat | None, spread: bool = True) -> str:
    if stat is None:
        return "-"
    digits = 2 if stat.median >= 1e6 else 4
    text = f"{stat.median / 1e6:.{digits}f}"
    return f"{text} [{stat.low / 1e6:.{digits}f}, {stat.high / 1e6:.{digits}f}]" if spread else text


def _ratio(other: Record | None, record: Record) -> str:
    # the same clock on both sides: a call that syncs has no device time
    for clock in ("device", "wall"):
        theirs, ours = other.samples(clock, TOTAL) if other else None, record.samples(clock, TOTAL)
        if theirs and ours:
            return f"{theirs.median / ours.median:.2f}"
    return "-"


def _percent(fraction: float | None) -> str:
    return "-" if fraction is None else f"{100 * fraction:.0f}"


def _count(value: int | None) -> str:
    return "-" if value is None else str(value)


def _megabytes(nbytes: int | None) -> str:
    return "-" if nbytes is None else f"{nbytes / 1e6:.3g}"


def _error(value: float | str | None) -> str:
    return "-" if value is None else f"{value:.1e}" if isinstance(value, float) else str(value)
