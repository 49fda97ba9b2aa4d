"""What a process holds, looked at now and then, and whether it grew."""

from __future__ import annotations

import array
import ctypes
import gc
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

PARTS = 10
# the first two parts warm up: caches of shapes, lazily made tables, pools of threads
WARM = 2


class _Mallinfo(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
        )
    ]  # fmt: skip


def heap_bytes() -> int:
    """Bytes of the C heap in use, torch's tensors on the CPU among them; exact, unlike the resident set.

    Python's own small objects lie elsewhere: :attr:`Held.blocks` counts them.
    """
    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = _Mallinfo
    info = mallinfo()
    return info.uordblks + info.hblkhd


def resident_bytes() -> int:
    """The resident set of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def tensors() -> Iterator[torch.Tensor]:
    """Live tensors that python knows of."""
    # not isinstance: it would ask lazy modules and proxies what they are
    return (x for x in gc.get_objects() if issubclass(type(x), torch.Tensor))


@dataclass(frozen=True)
class Held:
    """What the process holds after a full garbage collection: bytes, tensors and their bytes, objects that the
    collector knows (those and tensors since it was frozen), all of python's blocks of memory (numbers and texts too),
    open files, python's threads.
    """

    resident: int
    heap: int
    tensors: int
    tensor_bytes: int
    objects: int
    blocks: int
    handles: int
    threads: int

    @classmethod
    def now(cls) -> Held:
        gc.collect()
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors()}
        return cls(
            resident_bytes(), heap_bytes(), sum(1 for _ in tensors()), sum(storages.values()), len(gc.get_objects()),
            sys.getallocatedblocks(), len(os.listdir("/proc/self/fd")), threading.active_count(),
        )  # fmt: skip


@dataclass(frozen=True)
class Limits:
    """What may be added from the end of the warm-up to the end: ``per_call`` times calls and a fixed ``slack``."""

    resident: float = 0.0
    resident_slack: int = 8 << 20
    heap: float = 0.0
    heap_slack: int = 64 << 10
    objects: float = 0.0
    objects_slack: int = 100
    blocks: float = 0.0
    blocks_slack: int = 500
    # median CPU time of a call in the last part over that in the second one
    slower: float = 1.5


@dataclass
class Record:
    """What was held at the end of every part, and how long calls took."""

    calls: int
    held: list[Held] = field(default_factory=list)
    milliseconds: list[float] = field(default_factory=list)

    def growth(self) -> dict[str, int]:
        """What was added after the warm-up."""
        first, last = asdict(self.held[WARM - 1]), asdict(self.held[-1])
        return {name: last[name] - first[name] for name in first}

    def faults(self, limits: Limits) -> list[str]:
        """What grew beyond the limits, in words."""
        added, counted = self.growth(), self.calls * (PARTS - WARM) // PARTS
        allowed = {
            "resident": limits.resident * counted + limits.resident_slack,
            "heap": limits.heap * counted + limits.heap_slack,
            "objects": limits.objects * counted + limits.objects_slack,
            "blocks": limits.blocks * counted + limits.blocks_slack,
            "tensors": 0,
            "tensor_bytes": 0,
            "handles": 0,
            "threads": 0,
        }
        found = [
            f"{name}: {added[name]:+d} in {counted} calls, at most {most:.0f} expected"
            for name, most in allowed.items()
            if added[name] > most
        ]
        slower = self.milliseconds[-1] / self.milliseconds[1]
        if slower > limits.slower:
            found.append(f"time: {slower:.2f} times that of the second tenth, at most {limits.slower} expected")
        return found

    def as_dict(self) -> dict[str, Any]:
        return {
            "calls": self.calls,
            "growth": self.growth(),
            "slower": round(self.milliseconds[-1] / self.milliseconds[1], 3),
            "median_cpu_ms": [round(x, 4) for x in self.milliseconds],
            "held": [asdict(held) for held in self.held],
        }


class Watch:
    """To be told of every call; looks at the process at the end of each tenth of them."""

    def __init__(self, calls: int, say: Callable[[str], None] = lambda text: None):
        self.record, self._say = Record(calls), say
        # what is there already is not looked at again: it would take longer than the calls
        gc.collect()
        gc.freeze()
        # of its full size from the start, so that looking leaves nothing
        self._times, self._done = array.array("d", bytes(8 * calls)), 0
        self._last = time.process_time()

    def called(self) -> None:
        """After a call; those beyond the promised ones are not looked at."""
        if self._done == self.record.calls:
            return
        now = time.process_time()
        self._times[self._done] = now - self._last
        self._done += 1
        record = self.record
        width = record.calls // PARTS
        if self._done % width == 0:
            part = self._times[self._done - width : self._done]
            record.milliseconds.append(1e3 * statistics.median(part))
            record.held.append(Held.now())
            self._say(f"{self._done} of {record.calls}: {record.milliseconds[-1]:.3f} ms, {record.held[-1]}")
            if len(record.held) == PARTS:
                gc.unfreeze()
        self._last = time.process_time()


def watched(call: Callable[[int], object], calls: int, say: Callable[[str], None] = lambda text: None) -> Record:
    """Makes the calls ``call(0)``, ``call(1)``, ... and says what they left."""
    watch = Watch(calls, say)
    for number in range(calls):
        call(number)
        watch.called()
    return watch.record
