"""A GPU that runs one launch. A register is an array with a lane per thread; the lanes that are behind go first."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ptx.instructions import Action, decode, whole_warps
from ptx.memory import SHARED_WINDOW, UNSIGNED, Addresses, GlobalMemory, SharedMemory, check_alignment
from ptx.numbers import Approximation, Array
from ptx.operands import Reader, reader
from ptx.parse import Fault, Immediate, Kernel, bits_of

if TYPE_CHECKING:
    from ptx.races import RaceChecker

_POISON = 0xDEADBEEFDEADBEEF
# instructions executed before a launch counts as endless
_MOST_STEPS = 5_000_000
_OF_WHOLE_WARPS = ("shfl", "redux", "vote", "match")
Index = NDArray[np.int64]


class Lanes:
    """The threads that execute an instruction, by their position among all that run."""

    __slots__ = ("count", "index", "pick")

    def __init__(self, index: Index, of: int) -> None:
        self.index, self.count = index, len(index)
        self.pick: slice | Index = slice(None) if self.count == of else index

    def spread(self, values: Array) -> Array:
        """One number per lane where there is one for all."""
        return values if len(values) == self.count else np.repeat(values, self.count)


class Step(NamedTuple):
    """A decoded instruction; ``flow`` names what the scheduler itself does."""

    flow: str | None
    action: Action | None
    guard: Reader | None
    target: int
    text: str
    gathers: bool = False


class Program:
    """A kernel ready to run. Decoding it meets every instruction, executed or not."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.steps = [self._step(instruction) for instruction in kernel.code]

    def _step(self, instruction) -> Step:
        kernel, opcode, modifiers = self.kernel, instruction.opcode, instruction.modifiers
        guard = reader(kernel, instruction.guard, "pred") if instruction.guard else None
        flow, action, target = None, None, -1
        if opcode == "bra":
            flow, target = "branch", kernel.labels[instruction.operands[0].name]
        elif opcode in ("ret", "exit"):
            flow = "exit"
        elif opcode in ("bar", "barrier") and "sync" in modifiers and "warp" not in modifiers:
            flow = "barrier"
            if instruction.operands != (Immediate(0, "int"),):
                raise Fault(f"{kernel.name}: {instruction.text}: not all threads of the block at barrier 0")
        else:
            try:
                action = decode(kernel, instruction)
            except Fault as fault:
                raise Fault(f"{kernel.name}: {instruction.text}: {fault}") from None
        # predicated ones are asked for whole warps when they run
        gathers = opcode in _OF_WHOLE_WARPS and instruction.guard is None
        return Step(flow, action, guard, target, instruction.text, gathers)


# told of every launch before it runs: the machine, dynamic shared memory in bytes, parameters
WATCHERS: list[Callable[[Machine, int, bytes], None]] = []


class Machine:
    """One launch of a program.

    Args:
        program: what runs.
        memory: all of global memory that it may touch.
        approximation: errors of approximate instructions.
        order: shuffles blocks and the order in which lanes arrive at atomics; None leaves both as they are.
        resident: blocks that run at a time; None is all.
        races: watches every access.
        ahead: memory that the launch ahead wrote (start and end of each piece) where this one may begin before that
            one ends; None where it may not.
    """

    def __init__(
        self,
        program: Program,
        memory: GlobalMemory,
        *,
        approximation: Approximation = Approximation.EXACT,
        order: np.random.Generator | None = None,
        resident: int | None = None,
        races: RaceChecker | None = None,
        ahead: list[tuple[int, int]] | None = None,
    ) -> None:
        self.program, self.kernel, self.memory = program, program.kernel, memory
        self.approximation, self.order, self.resident, self.races = approximation, order, resident, races
        self.ahead = ahead
        self.steps = 0
        self.text = ""

    def launch(self, grid: int, threads: int, shared_bytes: int, parameters: bytes) -> None:
        """Runs ``grid`` blocks of ``threads``, with ``shared_bytes`` of dynamic shared memory each.

        Raises:
            Fault: see :class:`Fault`; the message names the kernel and the instruction.
        """
        kernel = self.kernel
        if len(parameters) < kernel.parameter_bytes:
            raise Fault(f"{kernel.name}: {len(parameters)} bytes of parameters, expected {kernel.parameter_bytes}")
        if threads % 32 or threads > (kernel.max_threads or 1024):
            raise Fault(f"{kernel.name}: {threads} threads per block, compiled for {kernel.max_threads}")
        self._parameters = ctypes.create_string_buffer(parameters, max(len(parameters), 1))
        self._parameter_memory = GlobalMemory([(ctypes.addressof(self._parameters), len(parameters))])
        self.grid, self.threads = grid, threads
        self._shared_bytes = kernel.static_shared + shared_bytes
        blocks = np.arange(grid) if self.order is None else self.order.permutation(grid)
        together = self.resident or grid
        for watch in WATCHERS:
            watch(self, shared_bytes, parameters)
        if self.races:
            self.races.begin(self)
        with np.errstate(all="ignore"):
            for start in range(0, grid, together):
                self._run(blocks[start : start + together])

    # ---------------------------------------------------------------- scheduling

    def _run(self, blocks: Index) -> None:
        threads, count = self.threads, len(blocks) * self.threads
        self.lane_count, self.blocks = count, blocks
        self.thread = np.tile(np.arange(threads, dtype=np.uint32), len(blocks))
        self.local_block = np.repeat(np.arange(len(blocks)), threads)
        self.block = np.repeat(blocks.astype(np.uint32), threads)
        self.shared = SharedMemory(len(blocks), self._shared_bytes)
        self._registers: dict[str, Array] = {}
        self._exited = np.zeros(count, bool)
        self._waits = np.zeros(count, bool)
        self._resume = np.zeros(count, np.int64)
        self._ready: dict[int, Index] = {0: np.arange(count)}
        # lanes at an instruction of whole warps, until the rest of their warp gets there
        self._early: dict[int, Index] = {}
        self._waited = np.full(count, self.ahead is None)
        if self.races:
            self.races.begin_blocks(self)
        while self._ready:
            at = min(self._ready)
            self._advance(at, Lanes(self._ready.pop(at), count))
        if not self._waited.all():
            # whoever comes next takes the end of this launch for the end of the one ahead
            raise Fault(f"{self.kernel.name}: ended without griddepcontrol.wait for the launch ahead")
        if self._early:
            step = self.program.steps[min(self._early)]
            raise Fault(f"{self.kernel.name}: {step.text}: executed by part of a warp")

    def _advance(self, at: int, lanes: Lanes) -> None:
        """Runs lanes that are at one instruction until they part, wait or end."""
        steps, ready = self.program.steps, self._ready
        while True:
            if at >= len(steps):
                raise Fault(f"{self.kernel.name}: ran past the last instruction")
            step = steps[at]
            if step.gathers:
                lanes = self._whole_warps(at, lanes)
                if not lanes.count:
                    return
            self.steps += 1
            if self.steps > _MOST_STEPS:
                raise Fault(f"{self.kernel.name}: more than {_MOST_STEPS} instructions")
            on = lanes
            if step.guard is not None:
                condition = step.guard(self, lanes)
                if not condition.all():
                    on = Lanes(lanes.index[condition], self.lane_count)
            if step.flow is not None:
                off = lanes.index[~condition] if on is not lanes else lanes.index[:0]
                self._flow(step, at, on.index, off)
                return
            if on.count:
                self.text = step.text
                try:
                    step.action(self, on)
                except Fault as fault:
                    raise Fault(f"{self.kernel.name}: {step.text}: {fault}") from None
            at += 1
            if at in ready:
                lanes = Lanes(np.sort(np.concatenate((ready.pop(at), lanes.index))), self.lane_count)

    def _whole_warps(self, at: int, lanes: Lanes) -> Lanes:
        """Those of whole warps; the others wait for the rest of theirs, as an instruction with a mask has them do."""
        index = np.concatenate((self._early.pop(at, lanes.index[:0]), lanes.index))
        complete = (np.bincount(index // 32, minlength=self.lane_count // 32) == 32)[index // 32]
        if not complete.all():
            self._early[at] = index[~complete]
        return Lanes(np.sort(index[complete]), self.lane_count)

    def _flow(self, step: Step, at: int, on: Index, off: Index) -> None:
        self._go(at + 1, off)
        if step.flow == "branch":
            self._go(step.target, on)
            return
        if step.flow == "exit":
            self._exited[on] = True
        else:
            try:
                whole_warps(self, Lanes(on, self.lane_count), alive=~self._exited)
            except Fault as fault:
                raise Fault(f"{self.kernel.name}: {step.text}: {fault}") from None
            self._waits[on] = True
            self._resume[on] = at + 1
        self._release()

    def _go(self, at: int, lanes: Index) -> None:
        if len(lanes):
            waiting = self._ready.get(at)
            self._ready[at] = lanes if waiting is None else np.sort(np.concatenate((waiting, lanes)))

    def _release(self) -> None:
        """Lets blocks go on whose living threads all wait at the barrier."""
        waits = self._waits.reshape(-1, self.threads)
        complete = (waits | self._exited.reshape(-1, self.threads)).all(1) & waits.any(1)
        if not complete.any():
            return
        if self.races:
            self.races.block_barrier(np.flatnonzero(complete))
        lanes = np.flatnonzero((waits & complete[:, None]).reshape(-1))
        self._waits[lanes] = False
        for at in np.unique(self._resume[lanes]):
            self._go(int(at), lanes[self._resume[lanes] == at])

    # ---------------------------------------------------------------- registers and memory, for instructions

    def register(self, name: str) -> Array:
        """All lanes of a register; poison where nothing was written."""
        held = self._registers.get(name)
        if held is None:
            kind = self.kernel.registers[name]
            if kind == "pred":
                held = np.zeros(self.lane_count, np.bool_)
            else:
                bits = bits_of(kind)
                held = np.full(self.lane_count, _POISON & ((1 << bits) - 1), UNSIGNED[bits // 8])
            self._registers[name] = held
        return held

    def set_register(self, name: str, value: Array, lanes: Lanes, owned: bool | None = None) -> None:
        """``owned``: nobody else holds the array's memory, so that it can become the register."""
        mine = owned or (owned is None and value.base is None)
        if mine and isinstance(lanes.pick, slice) and len(value) == self.lane_count:
            self._registers[name] = value
            return
        self.register(name)[lanes.pick] = value

    def special(self, name: str, lanes: Lanes) -> Array:
        """``%tid.x`` and its like."""
        if name == "%tid.x":
            return self.thread[lanes.pick]
        if name == "%laneid":
            return self.thread[lanes.pick] & np.uint32(31)
        if name == "%ctaid.x":
            return self.block[lanes.pick]
        one_for_all = {
            "%ntid.x": self.threads, "%ntid.y": 1, "%ntid.z": 1, "%tid.y": 0, "%tid.z": 0,
            "%nctaid.x": self.grid, "%nctaid.y": 1, "%nctaid.z": 1, "%ctaid.y": 0, "%ctaid.z": 0,
        }  # fmt: skip
        if name not in one_for_all:
            raise Fault(f"special register {name}")
        return np.array([one_for_all[name]], np.uint32)

    def symbol(self, name: str) -> int:
        """Address of a parameter or of a shared array."""
        for parameter in self.kernel.parameters:
            if parameter.name == name:
                return ctypes.addressof(self._parameters) + parameter.offset
        if name in self.kernel.shared:
            offset, size = self.kernel.shared[name]
            return offset if size else self.kernel.static_shared
        raise Fault(f"unknown name {name}")

    def _is_shared(self, space: str, addresses: Addresses) -> bool:
        if space != "generic":
            return space == "shared"
        window = addresses >= np.uint64(SHARED_WINDOW)
        if window.any() and not window.all():
            raise Fault("generic addresses of shared and of global memory in one instruction")
        return bool(window.any())

    def load(self, lanes: Lanes, space: str, addresses: Addresses, width: int, count: int = 1) -> Array:
        """``[lanes, count]`` numbers of ``width`` bytes; ``space`` is global, shared, param or generic."""
        size = width * count
        check_alignment(addresses, size)
        # a generic address may be that of a parameter (__grid_constant__)
        if space == "param" or (space == "generic" and self._parameter_memory.holds(addresses)):
            return self._parameter_memory.load(addresses, width, count)
        if self._is_shared(space, addresses):
            places = self.shared.place(addresses, self.local_block[lanes.pick], size)
            if self.races:
                self.races.shared_access(self, lanes, places, size, False)
            return self.shared.load(places, width, count)
        self._check_waited(lanes, addresses, "reads")
        found = self.memory.load(addresses, width, count)
        if self.races:
            self.races.global_access(self, lanes, self.memory.places(addresses), size, False)
        return found

    def store(self, lanes: Lanes, space: str, addresses: Addresses, values: Array) -> None:
        """Unsigned numbers ``[lanes, count]`` to memory."""
        size = values.dtype.itemsize * values.shape[1]
        check_alignment(addresses, size)
        if self._is_shared(space, addresses):
            places = self.shared.place(addresses, self.local_block[lanes.pick], size)
            self.shared.store(places, values)
            if self.races:
                self.races.shared_access(self, lanes, places, size, True)
                self._compare("shared", self.shared.load(places, values.dtype.itemsize, values.shape[1]), values)
            return
        self._check_waited(lanes, addresses, "writes")
        self.memory.store(addresses, values)
        if self.races:
            self.races.global_access(self, lanes, self.memory.places(addresses), size, True)
            self._compare("global", self.memory.load(addresses, values.dtype.itemsize, values.shape[1]), values)

    def wait_for_launch_ahead(self, lanes: Lanes) -> None:
        """What the launch ahead wrote is there for these lanes from now on."""
        self._waited[lanes.pick] = True

    def _check_waited(self, lanes: Lanes, addresses: Addresses, does: str) -> None:
        early = None if self.ahead is None else ~self._waited[lanes.pick]
        if early is None or not early.any():
            return
        for start, end in self.ahead or ():
            if (early & (addresses >= np.uint64(start)) & (addresses < np.uint64(end))).any():
                raise Fault(f"{does} what the launch ahead writes, without griddepcontrol.wait")

    def _compare(self, where: str, held: Array, stored: Array) -> None:
        different = (held != stored).any(1)
        if different.any() and self.races:
            self.races.different_values(where, int(different.sum()), self.text)
