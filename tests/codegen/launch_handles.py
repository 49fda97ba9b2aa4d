"""Launches kernels of the package by kept handles and compares each with what Triton itself would have launched.

No GPU and no compiler: Triton's real binder says how it specialises on arguments, and a compiled kernel only remembers
for which specialisation it stands. ``python tests/codegen/launch_handles.py`` prints an object: launches by name and by
handle, launches by a handle that was made for something else, and calls of Python functions that a loss takes. Run it
without ``TRITON_INTERPRET``.
"""

from __future__ import annotations

import json
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import triton
from launch_path import bind
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel, make_backend

import flowdppo_fast as fast
from flowdppo_fast import backend, kernels
from flowdppo_fast.kernels import gradient, objective, sampler_step, statistics
from flowdppo_fast.kernels.launch import Kind, Launcher, kind_of
from flowdppo_fast.objectives import DPPO, EpilogueOptions

LAUNCHERS = {
    "partials": statistics._launch_partials,
    "statistics": statistics._launch_statistics,
    "gradient": gradient._launch_gradient,
    "epilogue": objective._launch_kernel,
    "step": sampler_step._launch_step,
    "log_prob": sampler_step._launch_log_prob,
}
TARGETS = {"cuda": GPUTarget("cuda", 90, 32), "hip": GPUTarget("hip", "gfx942", 64)}
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
INTS = (None, 0, 1, 2, 15, 16, 17, 48, 65_536, 65_537, 2**31 - 1, 2**31, 2**31 + 16, 2**33, 2**33 + 1, 2**63 - 16)
FLOATS = (0.25, 1.0, 0, 1, 2, None)
_LARGE = torch.empty(2**30 + 64, dtype=torch.bfloat16)


class Driver:
    """One GPU, on which nothing runs."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target
        self.device = 0

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0


class Watch:
    """Counts launches and finds those whose handle stands for another specialisation."""

    def __init__(self, target: str) -> None:
        self.driver = Driver(TARGETS[target])
        self.backend = make_backend(self.driver.target)
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.silent = False
        triton.runtime.driver.set_active(self.driver)

    def specialisation(self, kernel: Any, arguments: tuple) -> str:
        return str((self.driver.device, *bind(kernel, *arguments, backend=self.backend)[1]))

    def launch_by_name(self, launcher: Launcher, kind: Kind, arguments: tuple) -> CompiledKernel:
        self.counts["by name"] += 1
        made_for = self.specialisation(launcher.kernel, arguments), kind.num_warps

        def run(x, y, z, stream, function, metadata, launch_metadata, enter, exit, *given):
            if self.silent:
                return
            self.counts["by handle"] += 1
            asked = self.specialisation(launcher.kernel, given), metadata
            if asked != made_for:
                self.wrong.append(f"{launcher.kernel.__name__}: {asked} by a handle for {made_for}")

        compiled = object.__new__(CompiledKernel)
        compiled._run, compiled.function, compiled.packed_metadata = run, None, kind.num_warps
        return compiled


@contextmanager
def watched(target: str) -> Iterator[Watch]:
    watch, original = Watch(target), Launcher._launch_by_name
    Launcher._launch_by_name = lambda launcher, *given: watch.launch_by_name(launcher, *given)
    try:
        yield watch
    finally:
        Launcher._launch_by_name = original


def operators() -> list[Callable[[], Any]]:
    """Calls that take every kernel."""
    new, old, noise = (torch.randn(4, 1, 300) for _ in range(3))
    source = (new, old, noise, None, None, None, [0.1, 2.0, 0.3], 7, 3, 0)
    options = EpilogueOptions.make(DPPO())
    coefficients = torch.randn(3, 4)
    return [
        lambda: kernels.row_stats(*source, True),
        lambda: kernels.row_grad(*source, coefficients, torch.ones(()), 0.25),
        lambda: kernels.policy_loss(*source, torch.randn(4), None, None, options.ints, options.floats),
        lambda: kernels.sde_step(
            new, old, noise, None, None, None, [0.1, 2.0, 0.3], 7, 3, torch.float32, True, True, False
        ),
    ]


def recorded() -> dict[str, tuple]:
    """The arguments with which each launcher is called."""
    found: dict[str, tuple] = {}
    originals = {}
    for module, name in (
        (statistics, "_launch_partials"), (statistics, "_launch_statistics"), (gradient, "_launch_gradient"),
        (objective, "_launch_kernel"), (sampler_step, "_launch_step"), (sampler_step, "_launch_log_prob"),
    ):  # fmt: skip
        originals[module, name] = launcher = getattr(module, name)
        (which,) = [key for key, value in LAUNCHERS.items() if value is launcher]
        setattr(module, name, lambda *arguments, which=which: found.setdefault(which, arguments))
    for call in operators():
        call()
    for (module, name), launcher in originals.items():
        setattr(module, name, launcher)
    assert found.keys() == LAUNCHERS.keys()
    return found


def another_tensor(draw: random.Random, optional: bool) -> torch.Tensor | None:
    if optional and draw.random() < 0.25:
        return None
    if draw.random() < 0.1:
        return _LARGE[draw.choice((0, 8, 1)) :][:64]
    return torch.empty(128, dtype=draw.choice(DTYPES))[draw.choice((0, 0, 1, 2, 4, 8, 16)) :]


def changed(draw: random.Random, arguments: tuple) -> tuple:
    """The arguments of a launch with a few of them replaced by what Triton may take for another kind."""
    kind, *groups = arguments
    groups = [*map(list, groups), *([] for _ in range(3 - len(groups))), list(kind.ints)]
    for group, values in zip(groups, (None, FLOATS, (0, 1, 16, -5, 2**40), INTS)):
        for i in range(len(group)):
            if draw.random() < 0.2:
                group[i] = draw.choice(values) if values else another_tensor(draw, optional=i > 0)
    *groups, ints = map(tuple, groups)
    constants, num_warps = list(kind.constants), kind.num_warps
    if draw.random() < 0.2:
        i = draw.randrange(len(constants))
        constants[i] = draw.choice((False, True) if isinstance(constants[i], bool) else (0, 1, 2, 4))
    if draw.random() < 0.1:
        num_warps = draw.choice((1, 2, 4, 8))
    return kind_of(kind.programs, num_warps, ints, tuple(constants), kind.overlaps), *groups


def mutations(watch: Watch, arguments: dict[str, tuple], rounds: int) -> None:
    """Launches of every kernel, each of a few kinds again and again with other kinds between."""
    draw = random.Random(0)
    for name, launcher in LAUNCHERS.items():
        kinds = [arguments[name]]
        for _ in range(rounds):
            kinds.append(changed(draw, draw.choice(kinds[-20:])))
            launcher(*kinds[-1])
            watch.driver.device = draw.choice((0, 0, 0, 1))
            launcher(*draw.choice(kinds[-20:]))


def python_calls(function: Callable[[], Any]) -> int:
    """Calls of Python functions that ``function`` takes, its own included."""
    for _ in range(3):
        function()
    found = 0

    def count(frame, event, arg):
        nonlocal found
        found += event == "call"

    sys.setprofile(count)
    try:
        function()
    finally:
        sys.setprofile(None)
    return found


def losses() -> dict[str, Callable[[], Any]]:
    """The public API on Triton's kernels."""
    old, noise = torch.randn(8, 16, 8, 8), torch.randn(8, 16, 8, 8)
    velocity, advantages, one = old.clone().requires_grad_(), torch.randn(8), torch.ones(())
    step = fast.SDEStep.from_sigmas("dance", 0.7, 0.6)

    def forward() -> torch.Tensor:
        return fast.fused_dppo_velocity_loss(velocity, old, noise, step, advantages, backend="triton").loss

    return {"forward": forward, "forward and backward": lambda: torch.autograd.grad(forward(), velocity, one)}


def hooked(watch: Watch) -> dict[str, int]:
    """Launches by name of one loss: with a hook on launches, and once it is gone."""
    forward, seen = losses()["forward"], {}
    hooks = {"enter": knobs.runtime.launch_enter_hook, "exit": knobs.runtime.launch_exit_hook}
    for name, chain in hooks.items():
        forward()
        before = watch.counts["by name"]
        chain.add(print)
        forward()
        chain.remove(print)
        seen[name] = watch.counts["by name"] - before
    before = watch.counts["by name"]
    forward()
    seen["none"] = watch.counts["by name"] - before
    statistics.partials_kernel.pre_run_hooks.append(lambda *args, **options: None)
    before = watch.counts["by name"]
    forward()
    seen["pre-run hook"] = watch.counts["by name"] - before
    statistics.partials_kernel.pre_run_hooks.clear()
    return seen


def main() -> None:
    backend.triton_interpreted = lambda: True
    arguments = recorded()
    report: dict[str, Any] = {"wrong": [], "globals": {}}
    for target in TARGETS:
        with watched(target) as watch:
            mutations(watch, arguments, rounds=400)
            report["wrong"] += watch.wrong[:3]
            report[target] = dict(watch.counts)
    with watched("cuda") as watch:
        watch.silent = True
        report["calls"] = {name: python_calls(call) for name, call in losses().items()}
        watch.silent = False
        report["hooked"] = hooked(watch)
        report["wrong"] += watch.wrong[:3]
    for name, launcher in LAUNCHERS.items():
        launcher.kernel.cache_key  # noqa: B018 - finds what a kernel takes from its module
        report["globals"][name] = [name for name, _ in launcher.kernel.used_global_vals]
    print(json.dumps(report))


if __name__ == "__main__":
    main()
