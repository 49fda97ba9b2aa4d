"""Measures iterations: every contender checked against this library's gradient, then all of them in turn."""

from __future__ import annotations

import gc
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.ops import environment
from bench.ops.devices import Device

from . import results
from .habits import HabitTrainer
from .names import CONTENDERS
from .workloads import Workload

ROUNDS, QUICK_ROUNDS = 5, 2
_ROOT = Path(__file__).resolve().parents[2]
# large blocks are given back at once, so that the high-water mark is what was in use
_RETURNING_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_TRIM_THRESHOLD_": "262144"}


def execute(
    workloads: Sequence[Workload],
    device: Device,
    folder: Path,
    say: Callable[[str], None],
    *,
    quick: bool,
    command: str,
    count: int | None = None,
    budget: float | None = None,
) -> dict[str, Any]:
    """Runs ``workloads``; writes ``results.json`` after each of them.

    Args:
        count: measured iterations per contender; default 5, quick 2.
        budget: seconds after which no further round is begun.

    Returns:
        The result, as written.
    """
    begin = time.monotonic()
    result: dict[str, Any] = {
        "schema": results.SCHEMA,
        "kind": results.KIND,
        "device": device.kind,
        "command": command,
        "quick": quick,
        "threads": torch.get_num_threads() if device.kind == "cpu" else None,
        "environment": environment.collect(device),
        "workloads": [],
        "left_out": [],
    }
    for workload in workloads:
        reason = _unfit(workload, device)
        if reason is None and budget is not None and time.monotonic() - begin > budget:
            reason = f"the time budget of {budget:g} s was spent"
        if reason is not None:
            result["left_out"].append({"workload": workload.name, "reason": reason})
            say(f"{workload.name}: left out, {reason}")
            continue
        until = None if budget is None else begin + budget
        rounds = count or (QUICK_ROUNDS if quick else ROUNDS)
        measured = measure(workload, device, say, rounds=rounds, until=until)
        if device.kind == "cpu" and not quick:
            for entry in measured["contenders"]:
                if entry["status"] == "ok":
                    entry.update(resident_peak(workload, entry["name"]))
        result["workloads"].append(measured)
        result["environment"]["load_average_end"] = environment.load_average()
        results.write(result, folder)
        gc.collect()
        if device.kind == "cuda":
            torch.cuda.empty_cache()
    results.write(result, folder)
    return result


def make_trainer(workload: Workload, device: torch.device, output: str) -> HabitTrainer:
    """The trainer of a workload, on its device."""

    def reward(latents: Tensor, prompts: Sequence[Any], metadata: Sequence[dict]) -> Tensor:
        return latents.float().flatten(1).square().mean(1)

    return HabitTrainer(workload.build_pipeline(device), reward, workload.prompt_list(), workload.config(output))


def measure(
    workload: Workload, device: Device, say: Callable[[str], None], *, rounds: int, until: float | None = None
) -> dict[str, Any]:
    """All contenders on one workload: a first iteration that is checked, then ``rounds`` in an order drawn anew.

    Entries have a ``status``: ``ok``, or ``refused`` where the gradient of the first update is not this library's.
    """
    with tempfile.TemporaryDirectory() as output:
        trainer = make_trainer(workload, device.torch_device, output)
        trainer.pipeline.set_progress_bar_config(disable=True)
        entries: dict[str, dict[str, Any]] = {}
        expected: Tensor | None = None
        tolerance = torch.finfo(workload.dtype).eps ** 0.5
        for name, habits in CONTENDERS.items():
            trainer.begin(habits)
            gradient = first_gradient(trainer)
            expected = gradient if expected is None else expected
            error = float((gradient - expected).norm() / expected.norm())
            entry = {"name": name, "habits": sorted(habits), "status": "ok", "gradient_error": error, "rounds": []}
            entries[name] = entry
            if not error <= tolerance:
                entry["status"] = "refused"
                say(f"{workload.name} {name}: refused, gradient off by {error:.1e}, expected {tolerance:.1e}")
        fit = [name for name, entry in entries.items() if entry["status"] == "ok"]
        order = random.Random(0)
        for number in range(rounds):
            if until is not None and time.monotonic() > until and number >= QUICK_ROUNDS:
                say(f"{workload.name}: stopped after {number} of {rounds} rounds, the time is up")
                break
            order.shuffle(fit)
            for name in fit:
                entries[name]["rounds"].append(iterate(trainer, CONTENDERS[name], device, entries[name]))
            seconds = {name: entries[name]["rounds"][-1]["seconds"] for name in CONTENDERS if name in fit}
            say(f"{workload.name} round {number + 1}: " + ", ".join(f"{n} {s:.2f} s" for n, s in seconds.items()))
        check = trainer.replay_check
        assert check is not None
        parameters = sum(p.numel() for p in trainer.pipeline.transformer.parameters())
        trained = sum(p.numel() for p in trainer.weights.parameters)
        return {
            **workload.describe(),
            "parameters": parameters - trained,
            "trained_parameters": trained,
            "replay_kl": check.batched_kl,
            "gradient_tolerance": tolerance,
            "contenders": list(entries.values()),
        }


def first_gradient(trainer: HabitTrainer) -> Tensor:
    """Runs one iteration; returns the gradient of its first update, float32 on the host."""
    found: list[Tensor] = []
    step = trainer.optimizer.step

    def watched(loss: Tensor, kl: Tensor) -> dict[str, Tensor]:
        if not found:
            found.append(torch.cat([p.grad.flatten() for p in trainer.weights.parameters if p.grad is not None]).cpu())
        return step(loss, kl)

    trainer.optimizer.step = watched  # type: ignore[method-assign]
    try:
        trainer._iterate()
    finally:
        trainer.optimizer.step = step  # type: ignore[method-assign]
    trainer.loss_clock.read()
    return found[0].clone()


def iterate(trainer: HabitTrainer, habits: frozenset[str], device: Device, entry: dict[str, Any]) -> dict[str, float]:
    """One measured iteration; bytes go to ``entry``."""
    trainer.begin(habits)
    gc.collect()
    device.synchronize()
    if device.kind == "cuda":
        torch.cuda.reset_peak_memory_stats()
    begin, busy = time.perf_counter(), time.process_time()
    metrics = trainer._iterate()
    device.synchronize()
    seconds, busy = time.perf_counter() - begin, time.process_time() - busy
    if device.kind == "cuda":
        entry["peak_bytes"] = torch.cuda.max_memory_allocated()
    entry["trajectory_bytes"] = metrics["trajectory_bytes"]
    entry["masked_fraction"] = metrics["masked_fraction"]
    return {
        "seconds": seconds,
        "cpu_seconds": busy,
        "sampling": metrics["seconds_sampling"],
        "updates": metrics["seconds_updates"],
        "loss": trainer.loss_clock.read(),
    }


def resident_peak(workload: Workload, name: str) -> dict[str, int]:
    """High-water mark of resident memory during one iteration in a fresh process, and what was resident before."""
    command = [sys.executable, "-m", "bench.train", "worker", workload.name, name]
    done = subprocess.run(
        command, env={**os.environ, **_RETURNING_ALLOCATOR}, capture_output=True, text=True, check=True, cwd=_ROOT
    )
    return json.loads(done.stdout.splitlines()[-1])


def worker(workload: Workload, name: str) -> dict[str, int]:
    """What :func:`resident_peak` runs: one iteration, without the check of the first replay."""
    with tempfile.TemporaryDirectory() as output:
        trainer = make_trainer(workload, torch.device("cpu"), output)
        trainer.pipeline.set_progress_bar_config(disable=True)
        trainer._verify = lambda rollout: None  # type: ignore[method-assign]
        trainer.begin(CONTENDERS[name])
        gc.collect()
        # sets the high-water mark back to what is resident now
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        trainer._iterate()
        return {"resident_before": before, "resident_peak": _status("VmHWM")}


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def _unfit(workload: Workload, device: Device) -> str | None:
    free = device.free_bytes()
    if free < workload.free_bytes:
        return f"{free / 1e9:.0f} GB of device memory are free, it takes {workload.free_bytes / 1e9:.0f} GB"
    return None
