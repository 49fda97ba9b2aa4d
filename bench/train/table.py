"""Markdown from results of the end-to-end benchmark."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bench.ops.table import describe, markdown

from . import results
from .names import OURS, WHAT
from .results import Spread, ratios, rounds, timed

_HEADER = (
    "contender", "samples/s", "time / this library's", "CPU time / this library's", "rollout s", "updates s",
    "loss, share of the iteration", "trajectory MB per sample", "peak memory MB", "gradient off by",
)  # fmt: skip


def full(result: Mapping[str, Any]) -> str:
    """One table per workload, the contenders in words, what was left out, and the goals."""
    parts = [heading(result)]
    parts += [_workload(result, workload) for workload in result["workloads"]]
    parts += [f"left out: {item['workload']}: {item['reason']}" for item in result["left_out"]]
    parts.append("\n".join(f"- *{name}*: {what}" for name, what in WHAT.items()))
    parts.append("## Goals\n\n" + goals_table(result))
    return "\n\n".join(parts) + "\n"


def page(result: Mapping[str, Any], source: str) -> str:
    """The block of a page: tables and goals, and where they come from."""
    parts = [f"`{result['command']}` on {describe(result)}{_threads(result)}. Raw samples in `{source}`."]
    parts += [f"**{workload['name']}**. {_numbers(result, workload)}" for workload in result["workloads"]]
    parts += [f"Left out: {item['workload']}: {item['reason']}." for item in result["left_out"]]
    parts.append(goals_table(result))
    return "\n\n".join(parts)


def goals_table(result: Mapping[str, Any]) -> str:
    """Goal, measured, verdict."""
    return markdown(("goal", "measured", "verdict"), [list(goal) for goal in results.goals(result)])


def heading(result: Mapping[str, Any]) -> str:
    """What, where, by which command."""
    env = result["environment"]
    lines = [f"# End-to-end benchmark, {describe(result)}{_threads(result)}", "", f"`{result['command']}`", ""]
    if result["quick"]:
        lines.append("- QUICK run: not for quoting")
    load = f"load average {env['load_average']} at the start"
    if "load_average_end" in env:
        load += f", {env['load_average_end']} at the end"
    lines.append(f"- {load} on {env['cpus']} cores; contenders take turns, ratios are taken round by round")
    lines.append("- medians with quartiles in brackets")
    return "\n".join(lines)


def _workload(result: Mapping[str, Any], workload: Mapping[str, Any]) -> str:
    refused = [
        f"- {entry['name']}: {entry['status']}, gradient off by {entry['gradient_error']:.1e}"
        for entry in workload["contenders"]
        if entry["status"] != "ok"
    ]
    return "\n\n".join([f"## {workload['name']}", _numbers(result, workload), *refused])


def _numbers(result: Mapping[str, Any], workload: Mapping[str, Any]) -> str:
    memory = (
        "Peak memory is the allocator's, of an iteration."
        if result["device"] == "cuda"
        else "Peak memory is the high-water mark of a fresh process during an iteration, less what was resident before."
    )
    text = (
        f"{workload['parameters'] / 1e6:.4g} M weights in {workload['dtype']}, LoRA with "
        f"{workload['trained_parameters'] / 1e6:.3g} M. {workload['side']}x{workload['side']} pixels, "
        f"{workload['prompt_tokens']} prompt tokens. {workload['samples']} samples in groups of "
        f"{workload['group_size']}, {workload['num_steps']} steps of which {len(workload['trained_steps'])} trained, "
        f"{workload['updates']} updates, micro-batches of {workload['micro_batch_size']} samples"
        + (", gradient checkpointing" if workload["gradient_checkpointing"] else "")
        + f". {memory}"
    )
    return text + "\n\n" + markdown(_HEADER, [_row(result, workload, entry) for entry in timed(workload)])


def _row(result: Mapping[str, Any], workload: Mapping[str, Any], entry: Mapping[str, Any]) -> list[str]:
    speed = Spread.of([workload["samples"] / seconds for seconds in rounds(entry, "seconds")])
    # the loss is timed by the clock that measures its device
    whole = "seconds" if result["device"] == "cuda" else "cpu_seconds"
    share = Spread.of([100 * s["loss"] / s[whole] for s in entry["rounds"]])
    wall, busy = (ratios(workload, entry["name"], clock) for clock in ("seconds", "cpu_seconds"))
    peak = peak_bytes(entry)
    return [
        entry["name"],
        speed.show(3),
        *("1" if entry["name"] == OURS or ratio is None else ratio.show(3) for ratio in (wall, busy)),
        f"{Spread.of(rounds(entry, 'sampling')).median:.2f}",
        f"{Spread.of(rounds(entry, 'updates')).median:.2f}",
        f"{share.median:.2f} %",
        f"{entry['trajectory_bytes'] / 1e6:.2f}",
        "-" if peak is None else f"{peak / 1e6:.0f}",
        f"{entry['gradient_error']:.1e}",
    ]


def peak_bytes(entry: Mapping[str, Any]) -> int | None:
    """Peak memory of an iteration: all of the GPU's, or beyond what was resident before; None where not measured."""
    if "peak_bytes" in entry:
        return entry["peak_bytes"]
    return entry["resident_peak"] - entry["resident_before"] if "resident_peak" in entry else None


def _threads(result: Mapping[str, Any]) -> str:
    return "" if result["threads"] is None else f", {result['threads']} thread" + "s" * (result["threads"] > 1)
