"""What a call does besides taking time: launches, host syncs, memory. From torch's profiler, one session per case."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from flowdppo_fast import SDEStep

from .devices import Device
from .inputs import Inputs
from .timing import Runner

# they hand out memory or other views of it and run no loop over elements
_NO_WORK = re.compile(
    r"aten::(alias|as_strided|detach_?|diagonal|empty\w*|expand\w*|flatten|lift_fresh|narrow|new_empty\w*|permute"
    r"|resize_|resolve_\w+|result_type|select|set_|slice|split\w*|squeeze_?|t|transpose|unbind|unflatten|unsqueeze"
    r"|view\w*|_unsafe_view|_reshape_alias|item|_local_scalar_dense)"
)
_HOST_ONLY = "bench host only"
# work only when they had to copy
_MAYBE_COPY = frozenset(f"aten::{name}" for name in ("to", "reshape", "contiguous", "_to_copy", "reshape_as"))


@dataclass(frozen=True)
class CallProfile:
    """Counts of one warm call.

    ``launches_*``: kernels on a GPU; on a CPU outermost operators that do work, for compiled contenders the kernels the
    compiler generated. ``launches_latents``: those of ``launches_total`` that read a whole latent tensor, on a CPU.
    ``syncs``: numbers read back to the host. ``extra_*``: peak bytes beyond the inputs, the
    gradient not counted. None: not known for this contender.
    """

    launches_forward: int | None
    launches_total: int | None
    syncs: int
    extra_forward: int | None
    extra_total: int | None
    launches_latents: int | None = None


def compiled_kernels(runner: Runner, inputs: Inputs) -> tuple[int, int]:
    """Kernels that the compiler generates for forward, and for forward and backward, while compiling both."""
    from torch._inductor import metrics

    metrics.reset()
    output = runner.call(inputs)
    forward = metrics.generated_kernel_count
    runner.contender.gradient(output, inputs)
    return forward, metrics.generated_kernel_count


def profile_calls(
    runners: Mapping[str, Runner],
    inputs: Inputs,
    device: Device,
    generated: Mapping[str, tuple[int, int]],
) -> dict[str, CallProfile]:
    """Profiles one forward and one backward of each contender, warm.

    Args:
        generated: :func:`compiled_kernels` of compiled contenders; used where the profiler cannot see their kernels.
    """
    activities = [ProfilerActivity.CPU]
    if device.kind == "cuda":
        activities.append(ProfilerActivity.CUDA)
    gradients: dict[str, int] = {}
    on_cpu = device.kind != "cuda"
    session = profile(activities=activities, profile_memory=on_cpu, record_shapes=on_cpu)
    with _step_checks_marked(), session:
        for name, runner in runners.items():
            device.synchronize()
            with record_function(f"bench forward {name}"):
                output = runner.call(inputs)
                device.synchronize()
            with record_function(f"bench backward {name}"):
                grad = runner.contender.gradient(output, inputs)
                device.synchronize()
            gradients[name] = grad.untyped_storage().data_ptr()
            # freed only after the marks are closed: what a trainer holds counts
            del output, grad
    results = session.profiler.kineto_results  # type: ignore[union-attr]
    nodes = list(_nodes(results.experimental_event_tree(), inside=False))
    marks = {node.name: (node.start_time_ns, node.end_time_ns) for node, _ in nodes if node.name.startswith("bench ")}
    kernels, reads = _device_events(results) if device.kind == "cuda" else ([], [])
    profiles = {}
    for name, runner in runners.items():
        begin, middle = marks[f"bench forward {name}"]
        _, end = marks[f"bench backward {name}"]
        mine = [(node, inside) for node, inside in nodes if begin <= node.start_time_ns <= end]
        syncs = sum(_reads(node) and not inside for node, inside in mine) - runner.contender.host_reads
        latents = None
        if device.kind == "cuda":
            forward, total = (sum(begin <= start <= until for start in kernels) for until in (middle, end))
            if not kernels:
                # the profiler saw no kernel of anybody: it cannot watch this device
                forward = total = None
            syncs = sum(begin <= start <= end for start in reads)
            extra = _device_memory(runner, inputs, device)
        elif name in generated:
            forward, total = generated[name]
            extra = _peaks(mine, middle, gradients[name])
        else:
            working = [node for node, inside in mine if not inside and _works(node)]
            forward, total = sum(node.start_time_ns <= middle for node in working), len(working)
            latents = sum(_largest(node) >= inputs.velocity.numel() for node in working)
            extra = _peaks(mine, middle, gradients[name])
        if runner.contender.single_pass:
            profiles[name] = CallProfile(None, total, syncs, None, extra[1], latents)
        else:
            profiles[name] = CallProfile(forward, total, syncs, extra[0], extra[1], latents)
    return profiles


@contextmanager
def _step_checks_marked() -> Iterator[None]:
    """Marks what a new :class:`SDEStep` checks: it looks at numbers on the CPU alone, whatever the latents are on."""
    check = SDEStep.__post_init__

    def marked(step: SDEStep) -> None:
        with record_function(_HOST_ONLY):
            check(step)

    with mock.patch.object(SDEStep, "__post_init__", marked):
        yield


def _nodes(events: list[Any], inside: bool) -> Iterator[tuple[Any, bool]]:
    """All nodes of the event tree but those of the CPU alone, each with whether another operator encloses it."""
    for event in events:
        if event.name == _HOST_ONLY:
            continue
        yield event, inside
        yield from _nodes(event.children, inside or _is_operator(event))


def _is_operator(event: Any) -> bool:
    name = event.name
    # namespace::operator; autograd's own frames carry colons too
    return "::" in name and not name.startswith(("autograd::", "torch::")) and " " not in name


def _reads(event: Any) -> bool:
    """Whether it reads numbers back: ``item``, ``bool``, or ``tolist``, which shows as what precedes its copy."""
    return event.name in ("aten::item", "aten::is_nonzero", "aten::resolve_neg")


def _largest(event: Any) -> int:
    """Elements of the largest tensor that an operator reads."""
    sizes = (getattr(one, "sizes", None) for one in event.typed[1].inputs)
    return max((math.prod(size) for size in sizes if size is not None), default=0)


def _works(event: Any) -> bool:
    if not _is_operator(event) or _NO_WORK.fullmatch(event.name):
        return False
    if event.name in _MAYBE_COPY:
        return any(child.name == "aten::copy_" for child, _ in _nodes(event.children, True))
    return True


def _peaks(mine: list[tuple[Any, bool]], middle: int, gradient: int) -> tuple[int, int]:
    """Peak of live bytes until ``middle`` and until the end, from allocation events; the gradient's not counted."""
    changes = sorted(
        (node.start_time_ns, node.extra_fields.ptr, node.extra_fields.alloc_size)
        for node, _ in mine
        if node.name == "[memory]"
    )
    # the gradient is the last thing allocated at its address
    own = next((i for i in reversed(range(len(changes))) if changes[i][1] == gradient and changes[i][2] > 0), None)
    live = forward = total = 0
    for i, (when, _, size) in enumerate(changes):
        live += 0 if i == own else size
        total = max(total, live)
        if when <= middle:
            forward = max(forward, live)
    return forward, total


def _device_events(results: Any) -> tuple[list[int], list[int]]:
    """Start times of kernels and of device-to-host copies."""
    kernels, reads = [], []
    for event in results.events():
        if event.device_type() != torch.autograd.DeviceType.CUDA:
            continue
        if event.name().startswith("Memcpy DtoH"):
            reads.append(event.start_ns())
        elif not event.name().startswith(("Memcpy", "Memset", "bench ")):
            kernels.append(event.start_ns())
    return kernels, reads


def _device_memory(runner: Runner, inputs: Inputs, device: Device) -> tuple[int, int]:
    forward = device.extra_bytes(lambda: runner.call(inputs))
    total = device.extra_bytes(lambda: runner.total(inputs))
    return forward, max(0, total - runner.contender.leaf(inputs).nbytes)
