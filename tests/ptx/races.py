"""Races by happens-before: an access has to be ordered after whatever touched the same memory before it.

Order comes from barriers of a warp and of a block, and between blocks from acquire-release atomics on one address.
Every two bytes of memory remember their last writer and their last reader. Fences alone, relaxed atomics and the order
in which the emulator happens to run threads prove nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from ptx.machine import Lanes, Machine

_UNIT = 2
# columns of what memory remembers of an access; a block of 0 is nobody
_BLOCK, _LANE, _EPOCH, _WARP_EPOCH, _TIME = range(5)
# instead of a lane: readers in several warps, or several in warp w (_IN_ONE_WARP - w)
_IN_SEVERAL_WARPS, _IN_ONE_WARP = -1, -2
_MOST_REPORTS = 20
Index = NDArray[np.int64]


class _Known(NamedTuple):
    """What somebody knows of each block: all before an epoch, and of one lane all up to a time."""

    epoch: Index
    time: Index
    lane: Index

    def joined(self, other: _Known) -> _Known:
        newer = other.time > self.time
        return _Known(
            np.maximum(self.epoch, other.epoch),
            np.where(newer, other.time, self.time),
            np.where(newer, other.lane, self.lane),
        )


class RaceChecker:
    """Give it to a :class:`ptx.machine.Machine`; ``reports`` says what it found, one line per instruction and kind."""

    def __init__(self) -> None:
        self.reports: list[str] = []

    def begin(self, machine: Machine) -> None:
        """A launch starts: everything before it is ordered."""
        grid = machine.grid
        self._known = [_Known(np.zeros(grid, np.int64), np.full(grid, -1), np.full(grid, -1)) for _ in range(grid)]
        # what one lane of a block has acquired and no barrier has passed on yet
        self._acquired: dict[int, tuple[int, _Known]] = {}
        self._released: dict[int, _Known] = {}
        self._now = 0
        units = machine.memory.bytes // _UNIT + 1
        self._global = {write: np.zeros((units, 5), np.int32) for write in (False, True)}

    def begin_blocks(self, machine: Machine) -> None:
        """A new set of blocks runs; their shared memory is untouched."""
        self._blocks = machine.blocks
        self._epoch = np.zeros(len(machine.blocks), np.int64)
        self._warp_epoch = np.zeros(machine.lane_count // 32, np.int64)
        units = machine.shared.bytes // _UNIT + 1
        self._shared = {write: np.zeros((units, 5), np.int32) for write in (False, True)}

    # ---------------------------------------------------------------- order

    def warp_barrier(self, lanes: Index) -> None:
        self._warp_epoch[np.unique(lanes // 32)] += 1

    def block_barrier(self, blocks: Index) -> None:
        for local in blocks:
            block = int(self._blocks[local])
            self._epoch[local] += 1
            if block in self._acquired:
                _, known = self._acquired.pop(block)
                self._known[block] = self._known[block].joined(known)

    def atomic(self, machine: Machine, lane: int, address: int, ordering: bool) -> None:
        """An atomic: its lane learns what earlier ones on the address have released, and releases what it knows."""
        self._now += 1
        if not ordering:
            return
        local = int(machine.local_block[lane])
        block, number = int(self._blocks[local]), lane % machine.threads
        known = self._known[block]
        if block in self._acquired and self._acquired[block][0] == number:
            known = known.joined(self._acquired[block][1])
        if address in self._released:
            known = known.joined(self._released[address])
        self._acquired[block] = (number, known)
        released = _Known(*(part.copy() for part in known))
        released.epoch[block] = max(released.epoch[block], self._epoch[local])
        released.time[block], released.lane[block] = self._now, number
        self._released[address] = released

    # ---------------------------------------------------------------- accesses

    def shared_access(self, machine: Machine, lanes: Lanes, places: Index, size: int, write: bool) -> None:
        self._access(machine, lanes, self._shared, "shared", places, size, write)

    def global_access(self, machine: Machine, lanes: Lanes, places: Index, size: int, write: bool) -> None:
        self._access(machine, lanes, self._global, "global", places, size, write)

    def different_values(self, where: str, lanes: int, text: str) -> None:
        """Lanes of one instruction stored different values at one place."""
        self._report(f"{lanes} lanes lose what they store to {where} memory to others (instruction {text!r})")

    def _report(self, text: str) -> None:
        if len(self.reports) < _MOST_REPORTS:
            self.reports.append(text)

    def _access(
        self, machine: Machine, lanes: Lanes, memory: dict, name: str, places: Index, size: int, write: bool
    ) -> None:
        self._now += 1
        each = -(-size // _UNIT)
        units = (places[:, None] // _UNIT + np.arange(each)).reshape(-1)
        index = np.repeat(lanes.index, each)
        local = machine.local_block[index]
        block, lane = self._blocks[local], index % machine.threads
        epoch, warp_epoch = self._epoch[local], self._warp_epoch[index // 32]
        for earlier in (False, True) if write else (True,):
            before = memory[earlier][units].astype(np.int64)
            wrong = ~self._ordered(before, block, lane, epoch, warp_epoch)
            if wrong.any():
                i = int(np.argmax(wrong))
                owner, by = before[i, _BLOCK] - 1, before[i, _LANE]
                self._report(
                    f"{'write' if write else 'read'} of {name} memory by block {block[i]} thread {lane[i]} is not "
                    f"ordered after the {'write' if earlier else 'read'} by block {owner} thread {by} "
                    f"({int(wrong.sum()) // each} lanes, instruction {machine.text!r})"
                )
        places, first, which = np.unique(units, return_index=True, return_inverse=True)
        record = np.stack((block + 1, lane, epoch, warp_epoch, np.full_like(block, self._now)), axis=1)[first]
        if write:
            apart = block[first][which] != block
            if apart.any():
                self._report(
                    f"blocks {block[first][which][apart][0]} and {block[apart][0]} store to one place of {name}"
                )
        elif len(first) < len(units) or memory[False][places, _BLOCK].any():
            record[:, _LANE] = self._readers(record, lane, which, memory[False][places].astype(np.int64))
        memory[write][places] = record

    @staticmethod
    def _readers(record: Index, lane: Index, which: Index, held: Index) -> Index:
        """Who has read each place since the last barrier: one lane, several of a warp, or of several warps."""
        low, high = np.full(len(record), np.iinfo(np.int64).max), np.full(len(record), -1)
        np.minimum.at(low, which, lane)
        np.maximum.at(high, which, lane)
        now = np.where(low == high, low, _several(low, high))
        together = (held[:, _BLOCK] == record[:, _BLOCK]) & (held[:, _EPOCH] == record[:, _EPOCH])
        before = held[:, _LANE]
        one_warp = (_warp(before) == _warp(now)) & (_warp(now) >= 0)
        # what a barrier of the warp has separated from now needs no memory: order after now is order after it
        recent = held[:, _WARP_EPOCH] == record[:, _WARP_EPOCH]
        merged = np.where(one_warp, np.where(recent, _IN_ONE_WARP - _warp(now), now), _IN_SEVERAL_WARPS)
        return np.where(together & (before != now), merged, now)

    def _ordered(self, before: Index, block: Index, lane: Index, epoch: Index, warp_epoch: Index) -> NDArray[np.bool_]:
        """Whether accesses ``before`` happen before accesses now."""
        owner, by, old = before[:, _BLOCK] - 1, before[:, _LANE], before[:, _EPOCH]
        nobody, same_block = owner < 0, owner == block
        if nobody.all():
            return nobody
        single = by >= 0
        same_warp = _warp(by) == lane // 32
        inside = (old < epoch) | (single & (by == lane)) | (same_warp & (before[:, _WARP_EPOCH] < warp_epoch))
        across = np.zeros(len(owner), bool)
        foreign = np.flatnonzero(~nobody & ~same_block)
        for reader in np.unique(block[foreign]):
            mine = foreign[block[foreign] == reader]
            across[mine] = _covers(self._known[reader], owner[mine], by[mine], old[mine], before[mine, _TIME])
            if reader in self._acquired:
                number, known = self._acquired[int(reader)]
                alone = mine[lane[mine] == number]
                across[alone] |= _covers(known, owner[alone], by[alone], old[alone], before[alone, _TIME])
        return nobody | np.where(same_block, inside, across)


def _warp(lane: Index) -> Index:
    """Warp of a reader's mark, -1 for several warps."""
    return np.where(lane >= 0, lane // 32, np.where(lane <= _IN_ONE_WARP, _IN_ONE_WARP - lane, -1))


def _several(low: Index, high: Index) -> Index:
    return np.where(low // 32 == high // 32, _IN_ONE_WARP - low // 32, _IN_SEVERAL_WARPS)


def _covers(known: _Known, owner: Index, lane: Index, epoch: Index, time: Index) -> NDArray[np.bool_]:
    """Whether accesses are among what is known."""
    return (epoch < known.epoch[owner]) | ((lane >= 0) & (lane == known.lane[owner]) & (time <= known.time[owner]))
