"""Runs the cases: check every contender against float64, then time those that are right."""

from __future__ import annotations

import math
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import environment, goals, results
from .contenders import Contender
from .devices import Device
from .inputs import Rollout, build_rollout, draw_noise
from .oracle import Oracle
from .profiling import CallProfile, compiled_kernels, profile_calls
from .timing import Rotation, Runner, Samples, copy_bandwidth, device_times, rotate, wall_times
from .workloads import SMOKE, Workload

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
# full-size float32 tensors that eager code holds at its peak, inputs not counted; an upper estimate
_EAGER_TENSORS = 12
_WARM_CALLS = 3


@dataclass(frozen=True)
class Plan:
    """What to run.

    Args:
        threads: CPU thread counts; ``(None,)`` leaves them alone (GPU).
        budget: seconds after which no further case is begun, or None.
        command: the command line, for the record.
    """

    workloads: Sequence[Workload]
    contenders: Sequence[Contender]
    dtypes: Sequence[str]
    threads: Sequence[int | None]
    quick: bool
    command: str
    budget: float | None = None


def execute(plan: Plan, device: Device, folder: Path | None, say: Callable[[str], None]) -> dict[str, Any]:
    """Runs ``plan``; writes ``results.json`` into ``folder`` after every case, so that a run cut short leaves what it
    has.

    Returns:
        The result, as written.
    """
    result: dict[str, Any] = {
        "schema": results.SCHEMA,
        "kind": "bench.ops",
        "device": device.kind,
        "command": plan.command,
        "quick": plan.quick,
        "complete": False,
        "environment": environment.collect(device),
        "copy": [],
        "cases": [],
        "left_out": [],
        "goals": [],
    }
    begin = time.monotonic()
    for threads in plan.threads:
        _set_threads(threads)
        nbytes, samples = copy_bandwidth(device, quick=plan.quick)
        result["copy"].append({"threads": threads, "bytes": nbytes, "samples": samples})
        say(f"copy{_on(threads)}: {results.Stat.of(samples).rate(nbytes) / 1e9:.1f} GB/s (read + written)")
    # where time may run out, what matters most comes first
    workloads = sorted(plan.workloads, key=lambda w: not w.core) if plan.budget is not None else plan.workloads
    for workload in workloads:
        noise: Tensor | None = None
        for dtype in plan.dtypes:
            if plan.budget is not None and time.monotonic() - begin > plan.budget:
                reason = f"the time budget of {plan.budget:g} s was spent"
                result["left_out"].append({"workload": workload.key, "dtype": dtype, "reason": reason})
                say(f"{workload.key} {dtype}: left out, {reason}")
                continue
            if noise is None:
                noise = draw_noise(workload, device.torch_device)
            _workload_cases(plan, workload, dtype, noise, device, result, say)
            if folder is not None:
                results.write(result, folder)
    result["complete"] = not result["left_out"]
    result["seconds"] = round(time.monotonic() - begin, 1)
    result["environment"]["load_average_end"] = environment.load_average()
    if device.kind == "cuda":
        result["environment"]["gpu_end"] = environment.gpu_state()
    result["goals"] = [goal._asdict() for goal in goals.evaluate([result])]
    if folder is not None:
        results.write(result, folder)
    return result


def smoke(contenders: Sequence[Contender], dtypes: Sequence[str], device: Device, say: Callable[[str], None]) -> bool:
    """Every form of this library once on tiny ragged latents, checked and not timed; what a memory checker watches.

    Returns:
        Whether all results were right, and there were some.
    """
    checked, wrong = 0, 0
    for workload in SMOKE:
        noise = draw_noise(workload, device.torch_device)
        for dtype in dtypes:
            rollout = build_rollout(workload, DTYPES[dtype], device.torch_device, noise)
            oracle = Oracle(rollout)
            for contender in contenders:
                if contender.backend is None or contender.missing(device.torch_device.type) is not None:
                    continue
                entry: dict[str, Any] = {"status": "ok"}
                _check(Runner(contender, contender.prepare(rollout)), rollout, oracle, entry, {})
                checked += 1
                if entry["status"] != "ok":
                    wrong += 1
                    say(f"{workload.key} {dtype} {contender.name}: {entry['reason']}")
    say(f"{checked} calls checked against float64, {wrong} wrong")
    return checked > 0 and wrong == 0


def _workload_cases(
    plan: Plan,
    workload: Workload,
    dtype: str,
    noise: Tensor,
    device: Device,
    result: dict[str, Any],
    say: Callable[[str], None],
) -> None:
    rollout = build_rollout(workload, DTYPES[dtype], device.torch_device, noise)
    oracle = Oracle(rollout)
    smallest = min(c.input_bytes(rollout.inputs) for c in plan.contenders)
    rotation = rotate(rollout.inputs, smallest, device)
    for threads in plan.threads:
        _set_threads(threads)
        begin = time.monotonic()
        case = run_case(plan.contenders, rollout, oracle, rotation, device, quick=plan.quick)
        case["threads"] = threads
        case["seconds"] = round(time.monotonic() - begin, 1)
        result["cases"].append(case)
        counts: dict[str, int] = {}
        for entry in case["contenders"]:
            counts[entry["status"]] = counts.get(entry["status"], 0) + 1
        summary = ", ".join(f"{count} {status}" for status, count in counts.items())
        say(f"{workload.key} {dtype}{_on(threads)}: {summary}; {case['seconds']:.0f} s")
        for entry in case["contenders"]:
            if entry["status"] in ("refused", "error"):
                say(f"  {entry['status']}: {entry['name']}: {entry['reason']}")


def run_case(
    contenders: Sequence[Contender],
    rollout: Rollout,
    oracle: Oracle,
    rotation: Rotation,
    device: Device,
    *,
    quick: bool,
) -> dict[str, Any]:
    """One workload in one dtype: every contender checked, the right ones timed.

    Entries have a ``status``: ``ok``; ``refused`` (wrong against float64: no speed is taken); ``missing`` (cannot run
    here); ``left out`` (could run, ``reason`` says why it was not); ``error`` (raised).
    """
    torch._dynamo.reset()
    entries: dict[str, dict[str, Any]] = {}
    runners: dict[str, Runner] = {}
    generated: dict[str, tuple[int, int]] = {}
    for contender in contenders:
        entry = _entry(contender, rollout, oracle)
        entries[contender.name] = entry
        reason = contender.missing(device.torch_device.type)
        if reason is not None:
            entry.update(status="missing", reason=reason)
            continue
        reason = contender.left_out(rollout.workload) or _too_large(contender, rollout, device)
        if reason is not None:
            entry.update(status="left out", reason=reason)
            continue
        try:
            runner = Runner(contender, contender.prepare(rollout))
            _check(runner, rollout, oracle, entry, generated)
        except Exception as error:
            entry.update(status="error", reason=f"{type(error).__name__}: {_first_line(error)}")
            traceback.print_exc()
            continue
        if entry["status"] == "ok":
            runners[contender.name] = runner
    if runners:
        for name, profile in profile_calls(runners, rollout.inputs, device, generated).items():
            entries[name].update(_profile_entry(profile))
        samples = wall_times(runners, rotation, device, quick=quick)
        without: dict[str, str] = {}
        if device.graphs:
            without = device_times(runners, rotation, device, samples, quick=quick)
        for name, raw in samples.items():
            entries[name]["samples"] = _sample_entry(raw)
            if name in without:
                entries[name]["no_device_time"] = without[name]
    return {
        "workload": rollout.workload.key,
        "name": rollout.workload.name,
        "rows": list(rollout.workload.rows),
        "latent": list(rollout.workload.latent),
        "elements_per_row": rollout.workload.elements_per_row,
        "dtype": str(rollout.dtype).removeprefix("torch."),
        "input_sets": len(rotation.sets),
        "cold": rotation.cold,
        "contenders": list(entries.values()),
    }


def _entry(contender: Contender, rollout: Rollout, oracle: Oracle) -> dict[str, Any]:
    """What is known before anything ran: what it starts from and the bytes that must move.

    Forward reads each input once. Backward cannot begin before a row's decision is known, so it reads the inputs of
    kept rows once more, and writes the gradient once.
    """
    nbytes = contender.input_bytes(rollout.inputs)
    kept = oracle.expected(contender.start, contender.objective).kept.double().mean().item()
    return {
        "name": contender.name,
        "status": "ok",
        "reason": None,
        "starts_from": contender.start.value,
        "objective": contender.objective,
        "backend": contender.backend,
        "trainer": contender.trainer,
        "single_pass": contender.single_pass,
        "bytes_forward": None if contender.single_pass else nbytes,
        "bytes_total": round(nbytes * (1.0 + kept)) + contender.leaf(rollout.inputs).nbytes,
    }


def _check(
    runner: Runner, rollout: Rollout, oracle: Oracle, entry: dict[str, Any], generated: dict[str, tuple[int, int]]
) -> None:
    contender, inputs = runner.contender, rollout.inputs
    if contender.compile_mode is not None:
        # without this cache the backward is compiled when it is first run, and its kernels are counted apart
        with torch._functorch.config.patch(enable_autograd_cache=False):
            generated[contender.name] = compiled_kernels(runner, inputs)
    for _ in range(_WARM_CALLS):
        output = runner.call(inputs)
        grad = contender.gradient(output, inputs)
    rows = contender.read(output)
    errors = oracle.errors(contender.start, contender.objective, output.loss.detach(), rows.kl, rows.log_ratio, grad)
    bounds = oracle.bounds(contender.start)
    entry["errors"] = {name: _number(value) for name, value in asdict(errors).items()}
    entry["bounds"] = {name: value for name, value in asdict(bounds).items() if name != "log_ratio"}
    over = errors.over(bounds)
    if over:
        entry.update(status="refused", reason="wrong against float64: " + "; ".join(over))


def _too_large(contender: Contender, rollout: Rollout, device: Device) -> str | None:
    if contender.backend not in (None, "reference"):
        return None
    needed = _EAGER_TENSORS * 4 * rollout.workload.elements
    free = device.free_bytes()
    if needed <= free:
        return None
    return f"it would need about {needed / 1e9:.0f} GB beside its inputs and {free / 1e9:.0f} GB are free"


def _profile_entry(profile: CallProfile) -> dict[str, Any]:
    return {
        "launches_forward": profile.launches_forward,
        "launches_total": profile.launches_total,
        "launches_latents": profile.launches_latents,
        "syncs": profile.syncs,
        "extra_bytes_forward": profile.extra_forward,
        "extra_bytes_total": profile.extra_total,
    }


def _sample_entry(raw: Samples) -> dict[str, list[int]]:
    return {name: values for name, values in asdict(raw).items() if values}


def _number(value: float | None) -> float | str | None:
    # JSON has no word for NaN and infinity
    return value if value is None or math.isfinite(value) else str(value)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else "no message"


def _set_threads(threads: int | None) -> None:
    if threads is not None:
        torch.set_num_threads(threads)


def _on(threads: int | None) -> str:
    return "" if threads is None else f", {threads} thread{'s' if threads > 1 else ''}"
