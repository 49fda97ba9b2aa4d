"""Global memory (this process's own, inside known allocations) and the shared memory of the blocks that run."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from ptx.parse import Fault

UNSIGNED: dict[int, type[np.unsignedinteger]] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
# generic addresses from here on are shared memory: block << 24 above, offset below
SHARED_WINDOW = 1 << 60
_OFFSET = np.uint64(0xFFFFFF)
Addresses = NDArray[np.uint64]


def check_alignment(addresses: Addresses, size: int) -> None:
    """Raises Fault where an access of ``size`` bytes is not at a multiple of them."""
    wrong = (addresses & np.uint64(size - 1)) != 0
    if wrong.any():
        first = int(addresses[np.argmax(wrong)])
        raise Fault(f"misaligned address {first:#x} for {size} bytes ({int(wrong.sum())} of {len(wrong)} lanes)")


class GlobalMemory:
    """Allocations by address and size; accesses outside of all of them are faults."""

    def __init__(self, allocations: Iterable[tuple[int, int]] = ()) -> None:
        self._sizes: dict[int, int] = {}
        self._starts = np.zeros(0, np.uint64)
        self._ends = np.zeros(0, np.uint64)
        self._bytes: list[NDArray[np.uint8]] = []
        self._stale = True
        self._written: set[int] = set()
        for address, size in allocations:
            self.add(address, size)

    def add(self, address: int, size: int) -> None:
        """Makes ``size`` bytes at ``address`` known; the caller keeps them alive."""
        if address and size > self._sizes.get(address, 0):
            self._sizes[address] = size
            self._stale = True

    def allocations(self) -> list[tuple[int, int]]:
        """Address and size of each; those that overlap are one."""
        if self._stale:
            self._sort()
        return [(int(start), len(data)) for start, data in zip(self._starts, self._bytes)]

    def _sort(self) -> None:
        items: list[tuple[int, int]] = []
        for start, size in sorted(self._sizes.items()):
            if items and start < sum(items[-1]):
                # views of one tensor overlap
                first = items[-1][0]
                items[-1] = (first, max(sum(items[-1]), start + size) - first)
            else:
                items.append((start, size))
        self._starts = np.array([start for start, _ in items], np.uint64)
        self._ends = np.array([start + size for start, size in items], np.uint64)
        self._bytes = [np.frombuffer((ctypes.c_uint8 * n).from_address(start), np.uint8) for start, n in items]
        self._places = np.cumsum([0, *(-(-size // 16) * 16 for _, size in items)])
        self._stale = False

    def holds(self, addresses: Addresses) -> bool:
        """Whether all of them lie within the known allocations' bounds."""
        if self._stale:
            self._sort()
        return bool(len(self._starts) and addresses.min() >= self._starts[0] and addresses.max() < self._ends[-1])

    def _parts(self, addresses: Addresses, size: int) -> list[tuple[int, NDArray[np.bool_] | None]]:
        """Which allocation each address is in: (allocation, its lanes; None for all)."""
        if self._stale:
            self._sort()
        low, high = addresses.min(), addresses.max()
        first = int(np.searchsorted(self._starts, low, "right")) - 1
        if first >= 0 and high + np.uint64(size) <= self._ends[first]:
            return [(first, None)]
        where = np.searchsorted(self._starts, addresses, "right") - 1
        wrong = (where < 0) | (addresses + np.uint64(size) > self._ends[np.maximum(where, 0)])
        if wrong.any():
            lane = int(np.argmax(wrong))
            raise Fault(
                f"global address {int(addresses[lane]):#x} (+{size} bytes) lies in no allocation "
                f"({int(wrong.sum())} of {len(wrong)} lanes)"
            )
        return [(int(one), where == one) for one in np.unique(where)]

    def load(self, addresses: Addresses, width: int, count: int) -> NDArray[np.unsignedinteger]:
        """``[lanes, count]`` numbers of ``width`` bytes that lie side by side."""
        kind = UNSIGNED[width]
        found = np.empty((len(addresses), count), kind)
        for allocation, lanes in self._parts(addresses, width * count):
            part = addresses if lanes is None else addresses[lanes]
            view, index = self._view(allocation, part, width)
            found[slice(None) if lanes is None else lanes] = view[index[:, None] + np.arange(count)]
        return found

    def store(self, addresses: Addresses, values: NDArray[np.unsignedinteger]) -> None:
        """Numbers ``[lanes, count]`` side by side at each address; of equal addresses the last lane wins."""
        width, count = values.dtype.itemsize, values.shape[1]
        for allocation, lanes in self._parts(addresses, width * count):
            part = addresses if lanes is None else addresses[lanes]
            view, index = self._view(allocation, part, width)
            view[index[:, None] + np.arange(count)] = values if lanes is None else values[lanes]
            self._written.add(allocation)

    def written(self) -> list[tuple[int, int]]:
        """Start and end of the allocations that were written to."""
        return [(int(self._starts[i]), int(self._ends[i])) for i in sorted(self._written)]

    @property
    def bytes(self) -> int:
        """Size of all allocations together, each rounded up to whole 16 bytes."""
        if self._stale:
            self._sort()
        return int(self._places[-1])

    def places(self, addresses: Addresses) -> NDArray[np.int64]:
        """Position of each address (inside an allocation) in all allocations side by side."""
        if self._stale:
            self._sort()
        where = np.searchsorted(self._starts, addresses, "right") - 1
        return self._places[where] + (addresses - self._starts[where]).astype(np.int64)

    def _view(self, allocation: int, addresses: Addresses, width: int) -> tuple[NDArray, NDArray[np.int64]]:
        """The allocation as numbers of ``width`` bytes, and the index of each (aligned) address."""
        data, start = self._bytes[allocation], int(self._starts[allocation])
        skip = -start % width
        view = data[skip : skip + (len(data) - skip) // width * width].view(UNSIGNED[width])
        return view, ((addresses - np.uint64(start + skip)) // np.uint64(width)).astype(np.int64)


class SharedMemory:
    """``size`` bytes per block, poisoned; addresses are offsets, or generic ones in the window."""

    def __init__(self, blocks: int, size: int) -> None:
        self.size = size
        self.pitch = -(-size // 16) * 16 + 16
        self.bytes = blocks * self.pitch
        self._bytes = np.full(self.bytes, 0xFF, np.uint8)

    def place(self, addresses: Addresses, blocks: NDArray[np.int64], size: int) -> NDArray[np.int64]:
        """Position in the emulator's bytes of ``size`` bytes at each lane's address."""
        generic = addresses >= np.uint64(SHARED_WINDOW)
        owner = np.where(generic, (addresses - np.uint64(SHARED_WINDOW)) >> np.uint64(24), blocks).astype(np.int64)
        offset = np.where(generic, addresses & _OFFSET, addresses).astype(np.int64)
        beyond = (offset < 0) | (offset + size > self.size)
        if beyond.any():
            first = int(offset[np.argmax(beyond)])
            raise Fault(f"shared address {first:#x} (+{size} bytes) is beyond the {self.size} bytes of the block")
        return owner * self.pitch + offset

    def load(self, places: NDArray[np.int64], width: int, count: int) -> NDArray[np.unsignedinteger]:
        """``[lanes, count]`` numbers of ``width`` bytes that lie side by side."""
        return self._bytes.view(UNSIGNED[width])[places[:, None] // width + np.arange(count)]

    def store(self, places: NDArray[np.int64], values: NDArray[np.unsignedinteger]) -> None:
        """Numbers ``[lanes, count]`` side by side at each place."""
        width, count = values.dtype.itemsize, values.shape[1]
        self._bytes.view(UNSIGNED[width])[places[:, None] // width + np.arange(count)] = values
