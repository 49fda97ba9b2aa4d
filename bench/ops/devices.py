"""The only place that talks to a device: clocks, graphs, caches, memory counters.

``CpuDevice`` and ``CudaDevice`` measure. ``RehearsalDevice`` walks the GPU path on CPU tensors, so that everything but
the device calls themselves can be tried on a machine without a GPU; its figures mean nothing and say so.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Protocol

import torch

_MIB = 1 << 20


class Device(Protocol):
    """What the harness asks of a device.

    Attributes:
        kind: ``"cpu"``, ``"cuda"`` or ``"rehearsal"``, as it stands in results.
        torch_device: where tensors live.
        graphs: True where calls are asynchronous and device time is taken from graph replays.
    """

    kind: str
    torch_device: torch.device
    graphs: bool

    def synchronize(self) -> None: ...

    def cache_bytes(self) -> int:
        """Size of the last-level cache."""

    def free_bytes(self) -> int:
        """Memory that can be taken without pushing anybody else out."""

    def capture(self, run: Callable[[], object]) -> Callable[[], float]:
        """Records ``run`` into a graph; returns a call that replays it and gives the elapsed nanoseconds."""

    def extra_bytes(self, call: Callable[[], object]) -> int:
        """Peak memory during ``call`` beyond what was held before."""


class CpuDevice:
    """Synchronous: the wall clock is the device clock."""

    kind = "cpu"
    torch_device = torch.device("cpu")
    graphs = False

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def cache_bytes(self) -> int:
        size = os.sysconf("SC_LEVEL3_CACHE_SIZE") if "SC_LEVEL3_CACHE_SIZE" in os.sysconf_names else 0
        return size if size > 0 else 32 * _MIB

    def free_bytes(self) -> int:
        with open("/proc/meminfo") as lines:
            fields = dict(line.split(":", 1) for line in lines)
        return int(fields["MemAvailable"].split()[0]) * 1024

    def capture(self, run: Callable[[], object]) -> Callable[[], float]:
        raise NotImplementedError("a CPU has no graphs; its calls are timed by the wall clock")

    def extra_bytes(self, call: Callable[[], object]) -> int:
        raise NotImplementedError("on a CPU the profiler's allocation events give this figure")


class CudaDevice:
    """One NVIDIA (or ROCm) GPU, through torch."""

    kind = "cuda"
    graphs = True

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise RuntimeError(
                f"device 'cuda': torch {torch.__version__} sees no GPU here; --device cpu, or --device rehearsal to "
                "walk the GPU path without one"
            )
        self.torch_device = torch.device("cuda", torch.cuda.current_device())
        # graphs are replayed one at a time and nobody reads what they leave, so they may share their memory
        self._pool = torch.cuda.graph_pool_handle()

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def cache_bytes(self) -> int:
        return torch.cuda.get_device_properties(self.torch_device).L2_cache_size

    def free_bytes(self) -> int:
        return torch.cuda.mem_get_info()[0]

    def capture(self, run: Callable[[], object]) -> Callable[[], float]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            run()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

        def replay() -> float:
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            return begin.elapsed_time(end) * 1e6

        return replay

    def extra_bytes(self, call: Callable[[], object]) -> int:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated()
        del result
        return peak - before


class RehearsalDevice:
    """The GPU path on CPU tensors: a "graph" is the call itself, its clock the wall clock."""

    kind = "rehearsal"
    torch_device = torch.device("cpu")
    graphs = True

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def cache_bytes(self) -> int:
        # small, so that few input sets outgrow it
        return _MIB // 16

    def free_bytes(self) -> int:
        return 1024 * _MIB

    def capture(self, run: Callable[[], object]) -> Callable[[], float]:
        run()

        def replay() -> float:
            begin = time.perf_counter_ns()
            run()
            return float(time.perf_counter_ns() - begin)

        return replay

    def extra_bytes(self, call: Callable[[], object]) -> int:
        call()
        return 0


def open_device(kind: str) -> Device:
    """The device called ``kind``.

    Raises:
        ValueError: unknown kind. RuntimeError: ``"cuda"`` without a GPU.
    """
    kinds: dict[str, Callable[[], Device]] = {"cpu": CpuDevice, "cuda": CudaDevice, "rehearsal": RehearsalDevice}
    if kind not in kinds:
        raise ValueError(f"device: got {kind!r}, expected one of {', '.join(map(repr, kinds))}")
    return kinds[kind]()
