"""Instructions that touch memory, and those that order it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ptx.instructions import Action, expect, instruction, types, whole_warps
from ptx.memory import UNSIGNED, Addresses, check_alignment
from ptx.numbers import Array, numpy_type
from ptx.operands import address, elements, reader, writer
from ptx.parse import Fault, Immediate, Instruction, Kernel, bits_of

if TYPE_CHECKING:
    from ptx.machine import Lanes, Machine

_SPACES = ("global", "shared", "param", "const")


def _space(one: Instruction) -> str:
    """State space, ``generic`` where none is named; sub-qualifiers such as ``shared::cta`` do not matter here."""
    named = [modifier.split("::")[0] for modifier in one.modifiers]
    if "local" in named:
        raise Fault("local memory")
    return next((space for space in named if space in _SPACES), "generic")


def _count(one: Instruction) -> int:
    return next((int(m[1]) for m in one.modifiers if m in ("v2", "v4", "v8")), 1)


@instruction("ld", "ldu")
def _load(kernel: Kernel, one: Instruction) -> Action:
    space, count, kind = _space(one), _count(one), types(one)[-1]
    where = address(kernel, one.operands[1])
    writes = [writer(kernel, operand) for operand in elements(one.operands[0])]
    width, dtype = bits_of(kind) // 8, numpy_type(kind)
    if len(writes) != count:
        raise Fault(f"{len(writes)} registers for {count} numbers")
    signed = dtype.kind == "i"

    def run(machine: Machine, lanes: Lanes) -> None:
        found = machine.load(lanes, space, where(machine, lanes), width, count)
        for i, write in enumerate(writes):
            column = np.ascontiguousarray(found[:, i])
            write(machine, lanes, column.view(dtype) if signed else column)

    return run


@instruction("st")
def _store(kernel: Kernel, one: Instruction) -> Action:
    space, count, kind = _space(one), _count(one), types(one)[-1]
    where = address(kernel, one.operands[0])
    width = bits_of(kind) // 8
    sources = elements(one.operands[1])
    reads = [reader(kernel, source, kind if isinstance(source, Immediate) else f"u{8 * width}") for source in sources]
    if len(reads) != count:
        raise Fault(f"{len(reads)} registers for {count} numbers")
    if space == "param":
        raise Fault("parameters are read only")

    def run(machine: Machine, lanes: Lanes) -> None:
        values = np.empty((lanes.count, count), UNSIGNED[width])
        for i, read in enumerate(reads):
            values[:, i] = read(machine, lanes).view(values.dtype)
        machine.store(lanes, space, where(machine, lanes), values)

    return run


@instruction("membar", "fence")
def _fence(kernel: Kernel, one: Instruction) -> Action:
    # order comes from barriers and from atomics; a fence alone proves nothing
    return lambda machine, lanes: None


@instruction("griddepcontrol")
def _dependent_launch(kernel: Kernel, one: Instruction) -> Action:
    expect(one, "wait", "launch_dependents")
    if "wait" in one.modifiers:
        return lambda machine, lanes: machine.wait_for_launch_ahead(lanes)
    # the emulator runs a launch at a time, which is one of the orders that this allows
    return lambda machine, lanes: None


@instruction("bar")
def _warp_barrier(kernel: Kernel, one: Instruction) -> Action:
    expect(one, "warp", "sync")
    members = reader(kernel, one.operands[0], "u32")

    def run(machine: Machine, lanes: Lanes) -> None:
        whole_warps(machine, lanes, members(machine, lanes))
        if machine.races:
            machine.races.warp_barrier(lanes.index)

    return run


@instruction("atom")
def _atomic(kernel: Kernel, one: Instruction) -> Action:
    expect(one, "global", "acq_rel", "relaxed", "gpu", "inc", "add", "sys")
    (kind,) = types(one)
    operation = next((m for m in one.modifiers if m in ("inc", "add")), None)
    if operation is None or _space(one) != "global":
        raise Fault("unknown atomic")
    where, operand = address(kernel, one.operands[1]), reader(kernel, one.operands[2], kind)
    write, dtype = writer(kernel, one.operands[0]), numpy_type(kind)
    ordering = "acq_rel" in one.modifiers

    def run(machine: Machine, lanes: Lanes) -> None:
        places, values = where(machine, lanes), lanes.spread(operand(machine, lanes))
        before = np.empty(lanes.count, dtype)
        arrivals = np.arange(lanes.count)
        if machine.order is not None:
            arrivals = machine.order.permutation(arrivals)
        for i in arrivals:
            here = slice(i, i + 1)
            old = machine.memory.load(places[here], dtype.itemsize, 1)[:, 0].view(dtype)
            before[i] = old[0]
            if operation == "add":
                new = old + values[here]
            else:
                new = np.where(old >= values[here], dtype.type(0), old + dtype.type(1))
            machine.memory.store(places[here], new.astype(dtype).view(UNSIGNED[dtype.itemsize]).reshape(1, 1))
            if machine.races:
                machine.races.atomic(machine, int(lanes.index[i]), int(places[i]), ordering)
        write(machine, lanes, before)

    return run


# ---------------------------------------------------------------- matrices of 8 x 8 numbers of 16 bits


@instruction("ldmatrix", "stmatrix")
def _matrix(kernel: Kernel, one: Instruction) -> Action:
    expect(one, "sync", "aligned", "m8n8", "x1", "x2", "x4", "shared", "trans")
    count = next(int(m[1]) for m in one.modifiers if m in ("x1", "x2", "x4"))
    loads, transposed = one.opcode == "ldmatrix", "trans" in one.modifiers
    registers, place = one.operands if loads else one.operands[::-1]
    if transposed and not loads:
        raise Fault("transposed store")
    where = address(kernel, place)
    writes = [writer(kernel, item) for item in elements(registers)] if loads else []
    reads = [] if loads else [reader(kernel, item, "u32") for item in elements(registers)]

    def run(machine: Machine, lanes: Lanes) -> None:
        whole_warps(machine, lanes)
        rows = where(machine, lanes)
        lane = (machine.thread[lanes.pick] & np.uint32(31)).astype(np.int64)
        warp = np.arange(lanes.count) - lane
        found: list[Array] = []
        for matrix in range(count):
            # thread i holds columns 2*(i % 4) and one more of row i / 4; thread 8*matrix + row gives a row's address
            def row(number: NDArray[np.int64], matrix: int = matrix) -> Addresses:
                start = rows[warp + 8 * matrix + number]
                check_alignment(start, 16)
                return start

            if transposed:
                column = (lane // 4).astype(np.uint64) * np.uint64(2)
                low, high = (
                    machine.load(lanes, "shared", row(2 * (lane % 4) + half) + column, 2)[:, 0].astype(np.uint32)
                    for half in (0, 1)
                )
                found.append(low | (high << np.uint32(16)))
                continue
            at = row(lane // 4) + (lane % 4).astype(np.uint64) * np.uint64(4)
            if loads:
                found.append(machine.load(lanes, "shared", at, 4)[:, 0])
            else:
                machine.store(lanes, "shared", at, lanes.spread(reads[matrix](machine, lanes)).reshape(-1, 1))
        for write, value in zip(writes, found):
            write(machine, lanes, value)

    return run
