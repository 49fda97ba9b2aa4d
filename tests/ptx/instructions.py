"""What each instruction does: decoders by opcode, here for integers, bits, predicates and moves."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from ptx.memory import SHARED_WINDOW
from ptx.numbers import Array, from_bf16, numpy_type
from ptx.operands import Reader, halves, reader, unsigned, writer
from ptx.parse import Fault, Immediate, Instruction, Kernel, Register, Vector, bits_of

if TYPE_CHECKING:
    from ptx.machine import Lanes, Machine

Action = Callable[["Machine", "Lanes"], None]
Decoder = Callable[[Kernel, Instruction], Action]
DECODERS: dict[str, Decoder] = {}
_TYPE = re.compile(r"[usbf](8|16|32|64)|pred|bf16|bf16x2|f16x2|f32x2")


def instruction(*opcodes: str) -> Callable[[Decoder], Decoder]:
    """Registers the decoder of opcodes."""

    def register(decoder: Decoder) -> Decoder:
        DECODERS.update(dict.fromkeys(opcodes, decoder))
        return decoder

    return register


def decode(kernel: Kernel, one: Instruction) -> Action:
    """The action of an instruction.

    Raises:
        Fault: an instruction, a modifier or an operand that the emulator does not know.
    """
    if one.opcode not in DECODERS:
        raise Fault("unknown instruction")
    return DECODERS[one.opcode](kernel, one)


def types(one: Instruction) -> list[str]:
    """Types among the modifiers, in order."""
    return [modifier for modifier in one.modifiers if _TYPE.fullmatch(modifier)]


def expect(one: Instruction, *known: str) -> None:
    """Raises Fault for modifiers that are neither types nor ``known``."""
    strange = [m for m in one.modifiers if m not in known and not _TYPE.fullmatch(m)]
    if strange:
        raise Fault(f"unknown modifiers {strange}")


def elementwise(kernel: Kernel, one: Instruction, kinds: list[str], function: Callable[..., Array]) -> Action:
    """``d = function(a, b, ...)`` with sources of ``kinds``."""
    sources = [reader(kernel, operand, kind) for operand, kind in zip(one.operands[1:], kinds, strict=True)]
    write = writer(kernel, one.operands[0])
    if len(sources) == 1:
        (only,) = sources
        return lambda machine, lanes: write(machine, lanes, function(only(machine, lanes)))
    if len(sources) == 2:
        left, right = sources
        return lambda machine, lanes: write(machine, lanes, function(left(machine, lanes), right(machine, lanes)))
    return lambda machine, lanes: write(machine, lanes, function(*(source(machine, lanes) for source in sources)))


# ---------------------------------------------------------------- moves


@instruction("mov")
def _mov(kernel: Kernel, one: Instruction) -> Action:
    expect(one)
    (kind,) = types(one)
    target, source = one.operands
    if isinstance(target, Vector):
        return _unpack(kernel, target, reader(kernel, source, unsigned(kind)), bits_of(kind) // len(target.items))
    if isinstance(source, Vector):
        return _pack(kernel, source, target, bits_of(kind))
    plain = kind if isinstance(source, Immediate) else unsigned(kind)
    return elementwise(kernel, one, [plain], lambda value: value)


def _unpack(kernel: Kernel, target: Vector, read: Reader, each: int) -> Action:
    writes = [writer(kernel, item) for item in target.items]
    narrow = np.dtype(f"uint{each}")

    def run(machine: Machine, lanes: Lanes) -> None:
        value = read(machine, lanes)
        parts = [(value >> value.dtype.type(i * each)).astype(narrow) for i in range(len(writes))]
        for write, part in zip(writes, parts):
            write(machine, lanes, part)

    return run


def _pack(kernel: Kernel, source: Vector, target, bits: int) -> Action:
    each = bits // len(source.items)
    reads = [reader(kernel, item, f"u{each}") for item in source.items]
    write, wide = writer(kernel, target), np.dtype(f"uint{bits}")

    def run(machine: Machine, lanes: Lanes) -> None:
        value = np.zeros(1, wide)
        for i, read in enumerate(reads):
            value = value | (read(machine, lanes).astype(wide) << wide.type(i * each))
        write(machine, lanes, value)

    return run


@instruction("cvta")
def _cvta(kernel: Kernel, one: Instruction) -> Action:
    expect(one, "to", "global", "shared", "const", "param")
    read, write = reader(kernel, one.operands[1], "u64"), writer(kernel, one.operands[0])
    if "shared" not in one.modifiers:
        return lambda machine, lanes: write(machine, lanes, read(machine, lanes))
    if "to" in one.modifiers:
        return lambda machine, lanes: write(machine, lanes, read(machine, lanes) & np.uint64(0xFFFFFF))

    def to_generic(machine: Machine, lanes: Lanes) -> None:
        block = machine.local_block[lanes.pick].astype(np.uint64) << np.uint64(24)
        write(machine, lanes, read(machine, lanes) + np.uint64(SHARED_WINDOW) + block)

    return to_generic


# ---------------------------------------------------------------- integers


def integer_arithmetic(kernel: Kernel, one: Instruction, kind: str) -> Action:
    """``add``, ``sub``, ``mul``, ``mad``, ``div``, ``rem``, ``min``, ``max`` of integers; results wrap."""
    expect(one, "wide", "lo", "hi")
    wide = f"{kind[0]}{2 * bits_of(kind)}" if bits_of(kind) < 64 else kind
    big = numpy_type(wide)
    if one.opcode == "mul" and "wide" in one.modifiers:
        return elementwise(kernel, one, [kind] * 2, lambda a, b: a.astype(big) * b.astype(big))
    if one.opcode == "mad" and "wide" in one.modifiers:
        return elementwise(kernel, one, [kind, kind, wide], lambda a, b, c: a.astype(big) * b.astype(big) + c)
    if one.opcode == "mul" and "hi" in one.modifiers:
        if bits_of(kind) != 32:
            raise Fault("high half of other than 32 bits")
        narrow = numpy_type(kind)
        shift = big.type(32)
        return elementwise(
            kernel, one, [kind] * 2, lambda a, b: ((a.astype(big) * b.astype(big)) >> shift).astype(narrow)
        )
    if one.opcode == "mad":
        if "lo" not in one.modifiers:
            raise Fault("mad of neither low nor wide product")
        return elementwise(kernel, one, [kind] * 3, lambda a, b, c: a * b + c)
    if one.opcode in ("div", "rem"):
        return elementwise(kernel, one, [kind] * 2, _quotient if one.opcode == "div" else _remainder)
    function = {
        "add": np.add, "sub": np.subtract, "mul": np.multiply, "min": np.minimum, "max": np.maximum,
    }[one.opcode]  # fmt: skip
    return elementwise(kernel, one, [kind] * 2, function)


def _quotient(a: Array, b: Array) -> Array:
    """Truncated toward zero."""
    if (b == 0).any():
        raise Fault("integer division by zero")
    if a.dtype.kind == "u":
        return a // b
    return (np.abs(a) // np.abs(b) * np.sign(a) * np.sign(b)).astype(a.dtype)


def _remainder(a: Array, b: Array) -> Array:
    return (a - _quotient(a, b) * b).astype(a.dtype)


@instruction("and", "or", "xor")
def _logic(kernel: Kernel, one: Instruction) -> Action:
    expect(one)
    kind = unsigned(types(one)[0])
    return elementwise(
        kernel, one, [kind] * 2, {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[one.opcode]
    )


@instruction("not")
def _not(kernel: Kernel, one: Instruction) -> Action:
    expect(one)
    return elementwise(kernel, one, [unsigned(types(one)[0])], np.invert)


@instruction("shl", "shr")
def _shift(kernel: Kernel, one: Instruction) -> Action:
    expect(one)
    (kind,) = types(one)
    bits = bits_of(kind)
    source = kind if kind[0] == "s" else unsigned(kind)

    def function(value: Array, count: Array) -> Array:
        held = np.minimum(count, bits - 1).astype(value.dtype)
        moved = value << held if one.opcode == "shl" else value >> held
        # all bits gone, but for a sign, which the shift above has spread
        return moved if kind[0] == "s" else np.where(count >= bits, value.dtype.type(0), moved)

    return elementwise(kernel, one, [source, "u32"], function)


@instruction("bfe")
def _extract_bits(kernel: Kernel, one: Instruction) -> Action:
    expect(one)
    (kind,) = types(one)
    if bits_of(kind) != 32:
        raise Fault("bit field of other than 32 bits")

    def function(value: Array, position: Array, length: Array) -> Array:
        position, length = (x & np.uint32(255) for x in (position, length))
        # a signed field is taken from the number with its sign spread, as far as 255 bits reach
        wide = value.astype(np.int64).astype(np.uint64) >> np.minimum(position, 32).astype(np.uint64)
        mask = (np.uint64(1) << np.minimum(length, 32).astype(np.uint64)) - np.uint64(1)
        found = (wide & mask).astype(np.uint32)
        if kind == "u32":
            return found
        sign = np.where(length > 0, found >> np.minimum(np.maximum(length, 1) - np.uint32(1), 31), 0).astype(np.uint32)
        return np.where(sign & np.uint32(1), found | ~mask.astype(np.uint32), found).astype(np.uint32).view(np.int32)

    return elementwise(kernel, one, [kind, "u32", "u32"], function)


@instruction("bfi")
def _insert_bits(kernel: Kernel, one: Instruction) -> Action:
    expect(one)

    def function(field: Array, into: Array, position: Array, length: Array) -> Array:
        position, length = (np.minimum(x & np.uint32(255), 32).astype(np.uint64) for x in (position, length))
        mask = ((np.uint64(1) << length) - np.uint64(1)) << position
        return (((field.astype(np.uint64) << position) & mask) | (into.astype(np.uint64) & ~mask)).astype(np.uint32)

    return elementwise(kernel, one, ["u32"] * 4, function)


@instruction("lop3")
def _lop3(kernel: Kernel, one: Instruction) -> Action:
    expect(one)
    *_, table = one.operands
    if not isinstance(table, Immediate):
        raise Fault("truth table in a register")

    def function(a: Array, b: Array, c: Array, _: Array) -> Array:
        found = np.zeros(1, np.uint32)
        for row in range(8):
            if table.value >> row & 1:
                found = found | ((a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c))
        return found

    return elementwise(kernel, one, ["u32"] * 4, function)


@instruction("shf")
def _funnel_shift(kernel: Kernel, one: Instruction) -> Action:
    expect(one, "l", "r", "wrap", "clamp")

    def function(low: Array, high: Array, count: Array) -> Array:
        both = (high.astype(np.uint64) << np.uint64(32)) | low.astype(np.uint64)
        count = (np.minimum(count, 32) if "clamp" in one.modifiers else count & np.uint32(31)).astype(np.uint64)
        moved = both >> count if "r" in one.modifiers else (both << count) >> np.uint64(32)
        return moved.astype(np.uint32)

    return elementwise(kernel, one, ["u32"] * 3, function)


@instruction("prmt")
def _permute_bytes(kernel: Kernel, one: Instruction) -> Action:
    expect(one)

    def function(low: Array, high: Array, selector: Array) -> Array:
        both = (high.astype(np.uint64) << np.uint64(32)) | low.astype(np.uint64)
        found = np.zeros(1, np.uint32)
        for i in range(4):
            which = selector >> np.uint32(4 * i)
            place = (which & np.uint32(7)).astype(np.uint64) * np.uint64(8)
            byte = (both >> place).astype(np.uint32) & np.uint32(255)
            sign = np.where(byte & np.uint32(128), np.uint32(255), np.uint32(0))
            found = found | (np.where(which & np.uint32(8), sign, byte) << np.uint32(8 * i))
        return found

    return elementwise(kernel, one, ["u32"] * 3, function)


# ---------------------------------------------------------------- predicates and choices


@instruction("selp")
def _select(kernel: Kernel, one: Instruction) -> Action:
    expect(one)
    (kind,) = types(one)
    return elementwise(kernel, one, [kind, kind, "pred"], lambda a, b, p: np.where(p, a, b))


_COMPARE = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
}  # fmt: skip
_UNSIGNED_COMPARE = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}


@instruction("setp")
def _set_predicate(kernel: Kernel, one: Instruction) -> Action:
    name = one.modifiers[0]
    (kind,) = types(one)
    expect(one, name, "ftz")
    if kind[0] == "b" and kind != "bf16":
        kind = unsigned(kind)
    return elementwise(kernel, one, [kind] * 2, _comparison(name, kind))


def _comparison(name: str, kind: str) -> Callable[[Array, Array], Array]:
    if kind == "bf16":
        inner = _comparison(name, "f32")
        return lambda a, b: inner(from_bf16(a), from_bf16(b))
    if kind[0] != "f":
        return _COMPARE[_UNSIGNED_COMPARE.get(name, name)]
    if name in ("num", "nan"):
        return lambda a, b: (np.isnan(a) | np.isnan(b)) == (name == "nan")
    # numpy's comparisons are the ordered ones, but for its !=
    if name in _COMPARE:
        compare = _COMPARE[name]
        return compare if name != "ne" else lambda a, b: (a != b) & ~np.isnan(a) & ~np.isnan(b)
    if name[:-1] in _COMPARE and name.endswith("u"):
        compare = _COMPARE[name[:-1]]
        return lambda a, b: compare(a, b) | np.isnan(a) | np.isnan(b)
    raise Fault(f"comparison {name}")


# ---------------------------------------------------------------- between the threads of a warp


def whole_warps(machine: Machine, lanes: Lanes, mask: Array | None = None, alive: Array | None = None) -> None:
    """Raises Fault unless all threads of each warp take part, or all that are ``alive``."""
    if mask is not None and (mask != np.uint32(0xFFFFFFFF)).any():
        raise Fault("a mask that leaves threads of the warp out")
    if lanes.count != machine.lane_count:
        here = np.zeros(machine.lane_count, bool)
        here[lanes.index] = True
        parts = here.reshape(-1, 32)
        complete = parts if alive is None else parts | ~alive.reshape(-1, 32)
        if (parts.any(1) & ~complete.all(1)).any():
            raise Fault("executed by part of a warp")


@instruction("shfl")
def _shuffle(kernel: Kernel, one: Instruction) -> Action:
    expect(one, "sync", "bfly", "down", "up", "idx")
    way = one.modifiers[1]
    result, predicate = halves(one.operands[0])
    source, count, clamp, mask = one.operands[1:]
    if not isinstance(source, Register):
        raise Fault("shuffle of what is no register")
    read, distance, bound, members = (reader(kernel, operand, "u32") for operand in (source, count, clamp, mask))
    write, write_predicate = writer(kernel, result), writer(kernel, predicate)

    def run(machine: Machine, lanes: Lanes) -> None:
        whole_warps(machine, lanes, members(machine, lanes))
        if (bound(machine, lanes) != np.uint32(0 if way == "up" else 31)).any():
            raise Fault("shuffle within part of a warp")
        lane = (machine.thread[lanes.pick] & np.uint32(31)).astype(np.int64)
        n = distance(machine, lanes).astype(np.int64)
        giver = {"bfly": lane ^ n, "down": lane + n, "up": lane - n, "idx": n + 0 * lane}[way]
        inside = (giver >= 0) & (giver < 32)
        # whole warps stand side by side among the active lanes
        place = np.arange(lanes.count) - lane + np.where(inside, giver, lane)
        value = read(machine, lanes)[place]
        write_predicate(machine, lanes, inside)
        write(machine, lanes, value)

    return run


@instruction("redux")
def _warp_reduction(kernel: Kernel, one: Instruction) -> Action:
    expect(one, "sync", "min", "max", "add", "NaN")
    way, (kind,) = one.modifiers[1], types(one)
    if kind[0] == "f" and way == "add":
        raise Fault("no such reduction")
    read, members = reader(kernel, one.operands[1], kind), reader(kernel, one.operands[2], "u32")
    write = writer(kernel, one.operands[0])
    names = {"min": (np.fmin, np.minimum), "max": (np.fmax, np.maximum), "add": (np.add, np.add)}[way]
    function = names["NaN" in one.modifiers]

    def run(machine: Machine, lanes: Lanes) -> None:
        whole_warps(machine, lanes, members(machine, lanes))
        values = lanes.spread(read(machine, lanes)).reshape(-1, 32)
        write(machine, lanes, np.repeat(function.reduce(values, axis=1).astype(values.dtype), 32))

    return run


# the other instructions register themselves
from ptx import accesses, floats  # noqa: E402, F401
