"""The host's share of a loss call, as a multiple of the smallest operator that PyTorch can differentiate.

Triton's launches are dropped in a stand-in for the driver library (``tests/ptx``): binder, specialiser and launcher
are Triton's own, nothing runs on a device. Times are of this thread, every case between two measurements of the unit:
one ``autograd.Function`` around an operator with a Python implementation that makes one 0-d tensor.
"""

from __future__ import annotations

import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import flowdppo_fast as fast

from . import environment
from .devices import CpuDevice

FILE = "host.json"
# backend, whether with backward -> goal in units
GOALS = {("triton", False): 6.0, ("triton", True): 9.0, ("cuda", False): 3.0}
_CALLS, _WARM = 60, 20
_ROWS, _LATENT = 8, (16, 8, 8)


class _Unit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.ops.flowdppo_bench.unit(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return ctx.saved_tensors[0]


def _define_unit() -> torch.library.Library:
    library = torch.library.Library("flowdppo_bench", "DEF")
    library.define("unit(Tensor a) -> Tensor")
    library.impl("unit", lambda a: a.new_empty(()), "CompositeExplicitAutograd")
    return library


def _cases() -> dict[str, tuple[str, bool, Callable[[], Any]]]:
    """Backend, whether with backward, and the call, by name."""
    generator = torch.Generator().manual_seed(0)
    old, noise = (torch.randn(_ROWS, *_LATENT, generator=generator).bfloat16() for _ in range(2))
    velocity, advantages = old.clone().requires_grad_(), torch.randn(_ROWS, generator=generator)
    seeded, one = fast.PhiloxNoise(1), torch.ones(())
    step = fast.SDEStep.from_sigmas("flow_sde", 0.7, 0.6)
    x = torch.zeros((), requires_grad=True)

    def loss(backend: Any, source: Any = noise, **options: Any) -> fast.LossOutput:
        return fast.fused_dppo_velocity_loss(velocity, old, source, step, advantages, backend=backend, **options)

    def both(backend: Any) -> None:
        torch.autograd.grad(loss(backend).loss, velocity, one)

    return {
        "the unit, forward and backward": ("torch", True, lambda: torch.autograd.grad(_Unit.apply(x), x, one)),
        "Triton, forward": ("triton", False, lambda: loss("triton")),
        "Triton, forward, seeded noise": ("triton", False, lambda: loss("triton", seeded)),
        "Triton, forward and backward": ("triton", True, lambda: both("triton")),
        "Triton, single pass": ("triton", False, lambda: loss("triton", single_pass=True)),
        "C++ operator on a CPU, forward": ("cpu", False, lambda: loss("cpu", single_pass=False)),
        "C++ operator on a CPU, forward and backward": ("cpu", True, lambda: both("cpu")),
    }


def _microseconds(call: Callable[[], Any], calls: int) -> float:
    start = time.thread_time()
    for _ in range(calls):
        call()
    return (time.thread_time() - start) / calls * 1e6


def measure(rounds: int) -> dict[str, Any]:
    """Units of every case: median and quartiles over ``rounds``.

    Raises:
        RuntimeError: Triton is missing or interprets. CalledProcessError: no C compiler for the stand-in.
    """
    sys.path.insert(0, str(environment.ROOT / "tests"))
    from ptx.triton_driver import install

    install(mode="drop")
    library, cases = _define_unit(), _cases()
    x = torch.zeros((), requires_grad=True)

    def unit() -> Tensor:
        return _Unit.apply(x)

    for _, _, call in cases.values():
        _microseconds(call, _WARM)
    found: dict[str, list[float]] = {name: [] for name in cases}
    units = []
    gc.disable()
    try:
        for _ in range(rounds):
            for name, (_, _, call) in cases.items():
                _microseconds(unit, _WARM)
                before = _microseconds(unit, _CALLS)
                _microseconds(call, _WARM)
                own = _microseconds(call, _CALLS)
                _microseconds(unit, _WARM)
                units += [before, _microseconds(unit, _CALLS)]
                found[name].append(2.0 * own / (before + units[-1]))
    finally:
        gc.enable()
        del library
    return {
        "environment": environment.collect(CpuDevice()),
        "rounds": rounds,
        "calls": _CALLS,
        "unit_us": statistics.median(units),
        "cases": {
            name: {
                "backend": cases[name][0],
                "backward": cases[name][1],
                "units": dict(zip(("low", "median", "high"), statistics.quantiles(values, n=4))),
            }
            for name, values in found.items()
        },
    }


def table(result: dict[str, Any]) -> str:
    """Markdown: units, their quartiles, microseconds by the unit of this machine, and the goal."""
    lines = ["| call | units | quartiles | µs here | goal |", "|---|---|---|---|---|"]
    for name, case in result["cases"].items():
        units, goal = case["units"], GOALS.get((case["backend"], case["backward"]))
        if goal is None or "seeded" in name or "single" in name:
            said = ""
        else:
            said = f"{goal:g}, {'met' if units['median'] <= goal else 'missed'}"
        lines.append(
            f"| {name} | {units['median']:.1f} | {units['low']:.1f} to {units['high']:.1f} "
            f"| {units['median'] * result['unit_us']:.0f} | {said} |"
        )
    return "\n".join(lines)


def run(folder: Path, rounds: int) -> str:
    """Measures, writes :data:`FILE` and the table into ``folder``, and returns the table."""
    folder.mkdir(parents=True, exist_ok=True)
    result = measure(rounds)
    (folder / FILE).write_text(json.dumps(result, indent=1) + "\n")
    text = table(result)
    (folder / "table.md").write_text(text + "\n")
    return text
