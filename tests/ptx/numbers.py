"""PTX arithmetic on numpy arrays: types, fused multiply-add, conversions, and how wrong an approximation may be."""

from __future__ import annotations

import enum

import numpy as np
from numpy.typing import NDArray

from ptx.parse import Fault, bits_of

Array = NDArray
_FLOATS = {16: np.float16, 32: np.float32, 64: np.float64}


def numpy_type(kind: str) -> np.dtype:
    """``"s32"`` -> int32; bits without a meaning (``b32``) are unsigned, and so are bf16 and packed types."""
    if kind == "pred":
        return np.dtype(np.bool_)
    bits = bits_of(kind)
    if kind[0] == "f" and "x" not in kind:
        return np.dtype(_FLOATS[bits])
    return np.dtype(f"{'int' if kind[0] == 's' else 'uint'}{bits}")


class Approximation(enum.Enum):
    """By how much ``*.approx`` and ``*.full`` differ from the rounded result: not, or by all that PTX allows.

    ``VARIED`` takes any error up to that, depending on the value alone, as a GPU's does.
    """

    EXACT = "exact"
    LOW = "low"
    HIGH = "high"
    VARIED = "varied"

    def of(self, value: Array, ulps: int) -> Array:
        """float32 ``value`` with an error of up to ``ulps``; zeros, infinities and NaN stay."""
        if self is Approximation.EXACT:
            return value
        bits = value.view(np.int32)
        if self is Approximation.VARIED:
            mixed = bits.view(np.uint32) * np.uint32(2654435761)
            error = ((mixed >> np.uint32(16)) % np.uint32(2 * ulps + 1)).astype(np.int32) - np.int32(ulps)
        else:
            # magnitudes grow with the bits
            up = (self is Approximation.HIGH) == (value > 0)
            error = np.where(up, ulps, -ulps).astype(np.int32)
        touched = np.isfinite(value) & (np.abs(value) > np.finfo(np.float32).tiny)
        return np.where(touched, bits + error, bits).astype(np.int32).view(np.float32)

    def near(self, value: Array, bound: Array | float) -> Array:
        """float32 ``value`` with an absolute error of up to ``bound``; zeros, infinities and NaN stay."""
        if self is Approximation.EXACT:
            return value
        share: Array | float = 1.0 if self is Approximation.HIGH else -1.0
        if self is Approximation.VARIED:
            share = (value.view(np.uint32) * np.uint32(2654435761)).view(np.int32) / 2.0**31
        moved = (value.astype(np.float64) + share * np.asarray(bound, np.float64)).astype(np.float32)
        return np.where(np.isfinite(value) & (value != 0), moved, value)


def fma32(a: Array, b: Array, c: Array) -> Array:
    """``a*b + c`` rounded once to float32: the product is exact in float64, the sum is rounded to odd there."""
    product = a.astype(np.float64) * b.astype(np.float64)
    addend = c.astype(np.float64)
    total = np.atleast_1d(product + addend)
    bb = total - product
    rest = (product - (total - bb)) + (addend - bb)
    bits = total.view(np.int64)
    inexact = (rest != 0) & ((bits & 1) == 0) & np.isfinite(total) & np.isfinite(rest)
    if inexact.any():
        bits = np.where(inexact, bits + np.where((rest > 0) == (total > 0), 1, -1), bits)
        total = bits.view(np.float64)
    return total.astype(np.float32)


def fma(a: Array, b: Array, c: Array) -> Array:
    """Fused multiply-add of float32 or, within the platform's long double, of float64."""
    if a.dtype == np.float32:
        return fma32(a, b, c)
    wide = np.longdouble
    return (a.astype(wide) * b.astype(wide) + c.astype(wide)).astype(np.float64)


def bf16_bits(value: Array) -> Array:
    """float32 rounded to the nearest bfloat16, ties to even, as uint16."""
    bits = np.ascontiguousarray(value).view(np.uint32)
    rounded = (bits + (((bits >> np.uint32(16)) & np.uint32(1)) + np.uint32(0x7FFF))) >> np.uint32(16)
    return np.where(np.isnan(value), np.uint32(0x7FFF), rounded).astype(np.uint16)


def from_bf16(bits: Array) -> Array:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def flushed(value: Array) -> Array:
    """Subnormal float32 numbers become zeros of their sign (``.ftz``)."""
    return np.where(np.abs(value) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), value), value)


def integers(value: Array, mode: str) -> Array:
    """Rounded to whole numbers: ``rni`` nearest even, ``rmi`` down, ``rpi`` up, ``rzi`` toward zero."""
    return {"rni": np.rint, "rmi": np.floor, "rpi": np.ceil, "rzi": np.trunc}[mode](value)


def convert(value: Array, source: str, target: str, modifiers: tuple[str, ...]) -> Array:
    """``cvt`` between numbers that are not packed."""
    rounding = next((m for m in modifiers if m in ("rni", "rmi", "rpi", "rzi")), None)
    if source == "bf16":
        value, source = from_bf16(value), "f32"
    if target == "bf16":
        if source != "f32" or "rn" not in modifiers:
            raise Fault(f"cvt.{'.'.join(modifiers)}")
        return bf16_bits(value)
    kind = numpy_type(target)
    if source[0] != "f":
        return value.astype(kind)
    if target[0] == "f":
        if rounding:
            value = integers(value, rounding)
        if "sat" in modifiers:
            value = np.where(np.isnan(value), 0, np.clip(value, 0, 1)).astype(value.dtype)
        return value.astype(kind)
    if rounding is None:
        raise Fault(f"cvt.{'.'.join(modifiers)}: no rounding to integers")
    limits = np.iinfo(kind)
    whole = integers(value, rounding).astype(np.longdouble)
    return np.where(np.isnan(whole), 0, np.clip(whole, limits.min, limits.max)).astype(kind)
