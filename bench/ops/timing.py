"""Interleaved timing over rotated input sets.

Every round times every contender once, in an order drawn anew, each on the next input set: drift of the machine and the
caches meet all of them alike, and no call finds its inputs in a cache that its predecessor filled.
"""

from __future__ import annotations

import gc
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .contenders import Contender
from .devices import Device
from .inputs import Inputs

MIN_SAMPLES = 30
_MAX_SAMPLES = 200
_LIGHT_CALLS_NS = 1.5e9
# a graph of few short calls would be timed with the resolution of the events around it
_MIN_GRAPH_SETS = 8
_MAX_SETS = 128
# one tensor of the copy; far larger than any cache
_COPY_BYTES = {"cpu": 1 << 28, "cuda": 1 << 30, "rehearsal": 1 << 22}


@dataclass
class Samples:
    """Raw nanoseconds of one contender. Empty where a figure does not exist for it.

    ``wall_*`` is until the results are there. Where calls are asynchronous, ``host_*`` is until the call returns and
    ``device_*`` the device's own time from graph replay.
    """

    host_forward: list[int] = field(default_factory=list)
    host_total: list[int] = field(default_factory=list)
    wall_forward: list[int] = field(default_factory=list)
    wall_total: list[int] = field(default_factory=list)
    device_forward: list[int] = field(default_factory=list)
    device_total: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Runner:
    """A contender with its call made for one rollout."""

    contender: Contender
    call: Callable[[Inputs], Any]

    def total(self, inputs: Inputs) -> tuple[Any, Tensor]:
        """Forward and backward; returns what a trainer would hold afterwards."""
        output = self.call(inputs)
        return output, self.contender.gradient(output, inputs)


@dataclass(frozen=True)
class Rotation:
    """Input sets; ``cold`` is False when memory did not allow enough of them to outgrow the cache three times."""

    sets: list[Inputs]
    cold: bool


def rotate(first: Inputs, smallest_bytes: int, device: Device) -> Rotation:
    """Clones of ``first``, so many that even a contender reading ``smallest_bytes`` per call finds none in the cache.

    At most a fifth of the free memory is taken for them.
    """
    wanted = max(2, math.ceil(3 * device.cache_bytes() / smallest_bytes) + 1)
    if device.graphs:
        wanted = max(wanted, _MIN_GRAPH_SETS if smallest_bytes < 3 * device.cache_bytes() else 2)
    affordable = max(1, int(device.free_bytes() / 5 // first.nbytes))
    count = min(wanted, affordable, _MAX_SETS)
    cold = count * smallest_bytes >= 3 * device.cache_bytes()
    return Rotation([first] + [first.clone() for _ in range(count - 1)], cold)


@contextmanager
def _no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


class _Rounds:
    """Who comes next on which input set."""

    def __init__(self, names: Sequence[str], sets: Sequence[Inputs], seed: int) -> None:
        self._names, self._sets = list(names), sets
        self._random = random.Random(seed)
        self._position = 0

    def __iter__(self) -> Iterator[tuple[str, Inputs]]:
        order = list(self._names)
        self._random.shuffle(order)
        for name in order:
            yield name, self._sets[self._position % len(self._sets)]
            self._position += 1


def sample_count(round_ns: float, quick: bool) -> int:
    """Samples for contenders that together take ``round_ns``: 30, more where they are light; 10 when quick."""
    if quick:
        return 10
    return max(MIN_SAMPLES, min(_MAX_SAMPLES, int(_LIGHT_CALLS_NS / max(round_ns, 1.0))))


def _timed(runner: Runner, inputs: Inputs, device: Device, total: bool) -> tuple[int, int, int]:
    """Nanoseconds until the forward returned, until everything returned, and until the results were there."""
    clock = time.perf_counter_ns
    device.synchronize()
    begin = clock()
    output = runner.call(inputs)
    forward = clock()
    if total:
        grad = runner.contender.gradient(output, inputs)
        returned = clock()
        device.synchronize()
        done = clock()
        del grad
        return forward - begin, returned - begin, done - begin
    device.synchronize()
    return forward - begin, forward - begin, clock() - begin


def wall_times(
    runners: Mapping[str, Runner], rotation: Rotation, device: Device, *, quick: bool, seed: int = 0
) -> dict[str, Samples]:
    """Wall and host time of eager calls, interleaved. On a CPU one call gives the forward and the total figure."""
    results = {name: Samples() for name in runners}
    rounds = _Rounds(list(runners), rotation.sets, seed)
    costs = []
    for name, inputs in rounds:
        costs.append(_timed(runners[name], inputs, device, total=True)[2])
    samples = sample_count(sum(costs) * (2 if device.graphs else 1), quick)
    with _no_collector():
        for _ in range(samples):
            for name, inputs in rounds:
                runner, into = runners[name], results[name]
                forward, returned, done = _timed(runner, inputs, device, total=True)
                into.wall_total.append(done)
                if device.graphs:
                    into.host_total.append(returned)
                elif not runner.contender.single_pass:
                    into.wall_forward.append(forward)
            if not device.graphs:
                continue
            for name, inputs in rounds:
                runner, into = runners[name], results[name]
                if not runner.contender.single_pass:
                    forward, _, done = _timed(runner, inputs, device, total=False)
                    into.host_forward.append(forward)
                    into.wall_forward.append(done)
    return results


def device_times(
    runners: Mapping[str, Runner],
    rotation: Rotation,
    device: Device,
    results: dict[str, Samples],
    *,
    quick: bool,
    seed: int = 0,
) -> dict[str, str]:
    """Device time per call from graph replays over all input sets, written into ``results``.

    Returns:
        Why a contender has no device time, by name.
    """
    graphs: dict[tuple[str, bool], Callable[[], float]] = {}
    without: dict[str, str] = {}
    for name, runner in runners.items():
        if runner.contender.syncs:
            without[name] = "it reads numbers back to the host, which no graph can hold"
            continue
        for total in (False, True):
            if runner.contender.single_pass and not total:
                continue
            graphs[name, total] = device.capture(_over_all(runner, rotation.sets, total))
    cost = sum(replay() for replay in graphs.values())
    samples = sample_count(cost, quick)
    order = list(graphs)
    shuffler = random.Random(seed)
    with _no_collector():
        for _ in range(samples):
            shuffler.shuffle(order)
            for name, total in order:
                elapsed = round(graphs[name, total]() / len(rotation.sets))
                (results[name].device_total if total else results[name].device_forward).append(elapsed)
    return without


def _over_all(runner: Runner, sets: Sequence[Inputs], total: bool) -> Callable[[], None]:
    def run() -> None:
        for inputs in sets:
            if total:
                runner.total(inputs)
            else:
                runner.call(inputs)

    return run


def copy_bandwidth(device: Device, *, quick: bool) -> tuple[int, list[int]]:
    """Bytes moved by one device copy (read and written) and the nanoseconds of each sample."""
    size = _COPY_BYTES[device.kind]
    source = torch.ones(size // 4, dtype=torch.float32, device=device.torch_device)
    target = torch.zeros_like(source)
    samples = []
    copy: Callable[[], float]
    if device.graphs:
        copy = device.capture(lambda: target.copy_(source))
    else:

        def copy() -> float:
            begin = time.perf_counter_ns()
            target.copy_(source)
            return float(time.perf_counter_ns() - begin)

    copy()
    for _ in range(10 if quick else MIN_SAMPLES):
        samples.append(round(copy()))
    return 2 * source.nbytes, samples
