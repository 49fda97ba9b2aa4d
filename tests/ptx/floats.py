"""Arithmetic in floating point, packed pairs, conversions, approximations; what rounds to integers shares opcodes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ptx.instructions import Action, elementwise, expect, instruction, integer_arithmetic, types
from ptx.numbers import Array, bf16_bits, convert, flushed, fma, fma32
from ptx.operands import reader, writer
from ptx.parse import Fault, Instruction, Kernel, bits_of

_ROUNDED = ("rn", "ftz", "approx", "full", "NaN", "sat", "rz", "rm", "rp")


@instruction("add", "sub", "mul", "mad", "fma", "div", "rem", "min", "max")
def _arithmetic(kernel: Kernel, one: Instruction) -> Action:
    kinds = types(one)
    if kinds == ["f32x2"]:
        return _packed(kernel, one)
    if len(kinds) == 2 and kinds[0] == "f32":
        return _mixed(kernel, one, kinds[1])
    (kind,) = kinds
    if kind[0] != "f":
        return integer_arithmetic(kernel, one, kind)
    expect(one, "rn", "ftz", "approx", "full", "NaN", "rm")
    if "rm" in one.modifiers and one.opcode != "fma":
        raise Fault("rounding down")
    function = _function(one.opcode, "NaN" in one.modifiers, "rm" in one.modifiers)
    if "ftz" in one.modifiers:
        function = _flushing(function)
    if {"approx", "full"} & {*one.modifiers}:
        return _approximate(kernel, one, function, 2)
    return elementwise(kernel, one, [kind] * (len(one.operands) - 1), function)


def _function(opcode: str, nan: bool, down: bool) -> Callable[..., Array]:
    if opcode in ("fma", "mad"):
        return _fma_down if down else lambda a, b, c: fma(*np.broadcast_arrays(a, b, c))
    if opcode in ("min", "max"):
        # without .NaN the number wins over NaN
        return {"min": (np.fmin, np.minimum), "max": (np.fmax, np.maximum)}[opcode][nan]
    return {"add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide}[opcode]


def _fma_down(a: Array, b: Array, c: Array) -> Array:
    """Rounded toward minus infinity; float32 whose sum float64 holds exactly enough (magic-number rounding)."""
    if a.dtype != np.float32:
        raise Fault("rounding down of other than f32")
    exact = a.astype(np.float64) * b.astype(np.float64) + c.astype(np.float64)
    nearest = exact.astype(np.float32)
    return np.where(nearest > exact, np.nextafter(nearest, np.float32(-np.inf)), nearest)


def _flushing(function: Callable[..., Array]) -> Callable[..., Array]:
    return lambda *values: flushed(function(*(flushed(value) for value in values)))


def _approximate(kernel: Kernel, one: Instruction, function: Callable[..., Array], ulps: int) -> Action:
    sources = [reader(kernel, operand, "f32") for operand in one.operands[1:]]
    write = writer(kernel, one.operands[0])

    def run(machine, lanes) -> None:
        exact = function(*(source(machine, lanes) for source in sources))
        write(machine, lanes, machine.approximation.of(exact, ulps))

    return run


def _packed(kernel: Kernel, one: Instruction) -> Action:
    """Two float32 numbers in 64 bits."""
    expect(one, "rn", "ftz")
    function = _function(one.opcode, False, False)
    if "ftz" in one.modifiers:
        function = _flushing(function)

    def both(*pairs: Array) -> Array:
        numbers = [np.ascontiguousarray(pair).view(np.float32).reshape(-1, 2) for pair in np.broadcast_arrays(*pairs)]
        return function(*(x.reshape(-1) for x in numbers)).view(np.uint64)

    return elementwise(kernel, one, ["u64"] * (len(one.operands) - 1), both)


def _mixed(kernel: Kernel, one: Instruction, narrow: str) -> Action:
    """``add.f32.bf16`` and its like: sources of 16 bits widened, the last one of float32."""
    expect(one, "rn")
    function = _function(one.opcode, False, False)
    kinds = [narrow] * (len(one.operands) - 2) + ["f32"]

    def widened(*values: Array) -> Array:
        return function(*(convert(value, narrow, "f32", ()) for value in values[:-1]), values[-1])

    return elementwise(kernel, one, kinds, widened)


@instruction("contracted")
def _contracted(kernel: Kernel, one: Instruction) -> Action:
    """``±a*b ± c`` rounded once: what :mod:`ptx.contract` makes of a multiplication and an addition."""
    product, addend, kind = one.modifiers
    signs = [np.float32(-1 if sign == "minus" else 1) for sign in (product, addend)]

    def function(a: Array, b: Array, c: Array) -> Array:
        return fma32(*np.broadcast_arrays(a * signs[0], b, c * signs[1]))

    if kind == "f32":
        return elementwise(kernel, one, ["f32"] * 3, function)

    def both(*pairs: Array) -> Array:
        numbers = (np.ascontiguousarray(pair).view(np.float32) for pair in np.broadcast_arrays(*pairs))
        return function(*numbers).view(np.uint64)

    return elementwise(kernel, one, ["u64"] * 3, both)


@instruction("neg")
def _negative(kernel: Kernel, one: Instruction) -> Action:
    expect(one, "ftz")
    return elementwise(kernel, one, types(one), np.negative)


@instruction("abs")
def _absolute(kernel: Kernel, one: Instruction) -> Action:
    expect(one, "ftz")
    return elementwise(kernel, one, types(one), np.abs)


# errors that PTX allows, in ulp of the result
_APPROXIMATIONS: dict[str, tuple[Callable[[Array], Array], int]] = {
    "sqrt": (np.sqrt, 1),
    "rsqrt": (lambda x: 1.0 / np.sqrt(x), 2),
    "rcp": (lambda x: 1.0 / x, 1),
    "ex2": (np.exp2, 2),
}
# errors that PTX allows for these, from argument and result, all absolute
_NEAR: dict[str, tuple[Callable[[Array], Array], Callable[[Array, Array], Array | float]]] = {
    "lg2": (np.log2, lambda x, y: 2.0**-22 * np.where((x > 0.5) & (x < 2.0), 1.0, np.abs(y))),
    # in [-2*pi, 2*pi], beyond which nothing here goes
    "sin": (np.sin, lambda x, y: np.where(np.abs(x) <= 2 * np.pi, 2.0**-20.5, np.nan)),
    "cos": (np.cos, lambda x, y: np.where(np.abs(x) <= 2 * np.pi, 2.0**-20.5, np.nan)),
}


@instruction(*_NEAR)
def _logarithm_or_angle(kernel: Kernel, one: Instruction) -> Action:
    expect(one, "approx", "ftz")
    function, bound = _NEAR[one.opcode]
    read, write = reader(kernel, one.operands[1], "f32"), writer(kernel, one.operands[0])

    def run(machine, lanes) -> None:
        x = read(machine, lanes)
        x = flushed(x) if "ftz" in one.modifiers else x
        y = function(x.astype(np.float64)).astype(np.float32)
        write(machine, lanes, machine.approximation.near(y, bound(x, y)))

    return run


@instruction(*_APPROXIMATIONS)
def _root_or_power(kernel: Kernel, one: Instruction) -> Action:
    expect(one, "rn", "approx", "ftz")
    function, ulps = _APPROXIMATIONS[one.opcode]
    (kind,) = types(one)
    if kind == "f64" and "approx" in one.modifiers:
        if one.opcode != "rcp":
            raise Fault("approximation of f64")
        # the upper half of a quotient, as a start for Newton's method
        upper = np.uint64(0xFFFFFFFF00000000)
        return elementwise(kernel, one, ["f64"], lambda x: ((1.0 / x).view(np.uint64) & upper).view(np.float64))
    if "approx" not in one.modifiers:
        if one.opcode not in ("sqrt", "rcp"):
            raise Fault("only approximate")
        return elementwise(kernel, one, [kind], lambda x: function(x).astype(x.dtype))

    def rounded(x: Array) -> Array:
        return function(x.astype(np.float64)).astype(np.float32)

    whole = _flushing(rounded) if "ftz" in one.modifiers else rounded
    if one.opcode != "ex2":
        return _approximate(kernel, one, whole, ulps)
    read, write = reader(kernel, one.operands[1], "f32"), writer(kernel, one.operands[0])

    def power(machine, lanes) -> None:
        x = read(machine, lanes)
        exact = whole(x)
        # the PTX manual has 2**0 == 1
        write(machine, lanes, np.where(x == 0, exact, machine.approximation.of(exact, ulps)))

    return power


@instruction("cvt")
def _convert(kernel: Kernel, one: Instruction) -> Action:
    expect(one, "rn", "rni", "rmi", "rpi", "rzi", "ftz", "sat")
    target, source = types(one)
    if target in ("bf16x2", "f16x2"):
        if source != "f32" or "rn" not in one.modifiers:
            raise Fault("packed conversion of other than f32")
        narrow = bf16_bits if target == "bf16x2" else lambda x: x.astype(np.float16).view(np.uint16)

        def pack(high: Array, low: Array) -> Array:
            return (narrow(high).astype(np.uint32) << np.uint32(16)) | narrow(low).astype(np.uint32)

        return elementwise(kernel, one, ["f32", "f32"], pack)
    ftz = "ftz" in one.modifiers and bits_of(source) == 32

    def function(value: Array) -> Array:
        return convert(flushed(value) if ftz else value, source, target, one.modifiers)

    return elementwise(kernel, one, [source], function)
