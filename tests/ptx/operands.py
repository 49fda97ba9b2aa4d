"""Reading and writing operands: each function here resolves one once and returns what does it at every execution."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from ptx.memory import UNSIGNED, Addresses
from ptx.numbers import Array, numpy_type
from ptx.parse import Address, Fault, Immediate, Kernel, Operand, Pair, Register, Sink, Special, Symbol, Vector, bits_of

if TYPE_CHECKING:
    from ptx.machine import Lanes, Machine

Reader = Callable[["Machine", "Lanes"], Array]
Writer = Callable[["Machine", "Lanes", Array], None]


def unsigned(kind: str) -> str:
    """The type of the same width whose numbers are plain bits."""
    return "pred" if kind == "pred" else f"u{bits_of(kind)}"


def reader(kernel: Kernel, operand: Operand, kind: str) -> Reader:
    """Gives ``operand`` as numbers of type ``kind``: one per active lane, or one for all."""
    dtype = numpy_type(kind)
    if isinstance(operand, Register):
        return _register_reader(kernel, operand, dtype)
    if isinstance(operand, Immediate):
        constant = _constant(operand, kind)
        return lambda machine, lanes: constant
    if isinstance(operand, Special):
        name = operand.name
        return lambda machine, lanes: machine.special(name, lanes).astype(dtype)
    if isinstance(operand, Symbol):
        return lambda machine, lanes: np.array([machine.symbol(operand.name)], np.uint64).astype(dtype)
    raise Fault(f"operand {operand} as {kind}")


def _register_reader(kernel: Kernel, operand: Register, dtype: np.dtype) -> Reader:
    name, negated = operand.name, operand.negated
    held = kernel.registers[name]
    if (held == "pred") != (dtype == np.bool_):
        raise Fault(f"register {name} is {held} and is read as {dtype}")
    if held == "pred":
        if negated:
            return lambda machine, lanes: ~machine.register(name)[lanes.pick]
        return lambda machine, lanes: machine.register(name)[lanes.pick]
    if bits_of(held) == dtype.itemsize * 8:
        return lambda machine, lanes: machine.register(name)[lanes.pick].view(dtype)
    narrow = UNSIGNED[dtype.itemsize]
    return lambda machine, lanes: machine.register(name)[lanes.pick].astype(narrow).view(dtype)


def _constant(operand: Immediate, kind: str) -> Array:
    dtype = numpy_type(kind)
    if kind == "pred":
        return np.array([operand.value != 0])
    if operand.kind == "int":
        if dtype.kind == "f":
            return np.array([operand.value], dtype)
        bits = bits_of(kind)
        return np.array([operand.value & ((1 << bits) - 1)], UNSIGNED[bits // 8]).view(dtype)
    if operand.kind[1:] != str(bits_of(kind)):
        raise Fault(f"immediate {operand} as {kind}")
    return np.array([operand.value], UNSIGNED[dtype.itemsize]).view(dtype)


def writer(kernel: Kernel, operand: Operand) -> Writer:
    """Stores numbers, one per active lane or one for all; narrower ones are extended by their sign, wider ones cut."""
    if isinstance(operand, Sink):
        return lambda machine, lanes, value: None
    if not isinstance(operand, Register):
        raise Fault(f"result {operand}")
    name = operand.name
    held = kernel.registers[name]
    if held == "pred":
        return lambda machine, lanes, value: machine.set_register(name, value, lanes)
    width = bits_of(held) // 8
    kind = np.dtype(UNSIGNED[width])

    def write(machine: Machine, lanes: Lanes, value: Array) -> None:
        if value.dtype != kind:
            if value.dtype.itemsize == width:
                owned = value.base is None
                value = value.view(kind)
                machine.set_register(name, value, lanes, owned)
                return
            if value.dtype.kind == "f":
                raise Fault(f"register {name} of {held} cannot hold {value.dtype}")
            value = value.astype(kind)
        machine.set_register(name, value, lanes)

    return write


def address(kernel: Kernel, operand: Operand) -> Callable[[Machine, Lanes], Addresses]:
    """Gives the address of each active lane."""
    if not isinstance(operand, Address):
        raise Fault(f"address {operand}")
    offset = np.uint64(operand.offset & 0xFFFFFFFFFFFFFFFF)
    base = reader(kernel, operand.base, "u64")
    if isinstance(operand.base, Register) and kernel.registers[operand.base.name] == "b32":
        # an address of 32 bits wraps there
        mask = np.uint64(0xFFFFFFFF)
        return lambda machine, lanes: (base(machine, lanes) + offset) & mask
    return lambda machine, lanes: lanes.spread(base(machine, lanes) + offset)


def elements(operand: Operand) -> tuple[Operand, ...]:
    """The registers of a vector, or the one operand."""
    return operand.items if isinstance(operand, Vector) else (operand,)


def halves(operand: Operand) -> tuple[Operand, Operand]:
    """Result and predicate of ``d|p``; without one it goes nowhere."""
    return (operand.value, operand.predicate) if isinstance(operand, Pair) else (operand, Sink())
