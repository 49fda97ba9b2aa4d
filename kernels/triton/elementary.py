"""Logarithm and exponential for per-row arithmetic, accurate to a few ulp in float32 and float64.

The hardware's ``log`` and ``exp`` are approximations with an absolute error, which is too coarse for ratios that differ
from 1 by 1e-5, and ``expm1`` exists only in a library that the interpreter lacks.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def divide(numerator, denominator):
    """IEEE division; a plain ``/`` of float32 is an approximation on a GPU."""
    if denominator.dtype == tl.float64:
        quotient = numerator / denominator
    else:
        quotient = tl.div_rn(numerator, denominator)
    return quotient


@triton.jit
def minus_two_log_of_bits(bits):
    """``-2*log(u)`` from the int32 bit pattern of a normal float32 ``u > 0``."""
    # u = 2**e * (1 + f) with f in [-1/3, 1/3): u near 1 has e = 0 and an exact f, so nothing cancels. 0x3F2AAAAB is 2/3
    exponent = (bits - 0x3F2AAAAB) & -0x800000
    f = (bits - exponent).to(tl.float32, bitcast=True) - 1.0
    # minimax on [-1/3, 1/3]: -2*log1p(f) = f*q(f), relative error 3e-8
    q = f * -0.28041139245033264 + 0.30767229199409485
    q = q * f - 0.27994272112846375
    q = q * f + 0.3283405601978302
    q = q * f - 0.40022146701812744
    q = q * f + 0.500154972076416
    q = q * f - 0.6666640043258667
    q = q * f + 0.9999987483024597
    q = q * f - 2.0
    # -2*ln(2)*2**-23, because e sits 23 bits up
    return exponent.to(tl.float32) * -1.6525916589735634e-07 + f * q


@triton.jit
def log(x):
    """Natural logarithm with the limits of IEEE: -inf at 0, NaN below."""
    if x.dtype == tl.float64:
        result = tl.log(x)
    else:
        # subnormal numbers have no exponent of their own: scaled up by 2**32, and 32*ln(2) taken off again
        small = x < 1.1754943508222875e-38
        bits = tl.where(small, x * 4294967296.0, x).to(tl.int32, bitcast=True)
        result = -0.5 * minus_two_log_of_bits(bits) - tl.where(small, 22.180709777918249, 0.0)
        result = tl.where((x > 0) & (x < float("inf")), result, tl.where(x == 0, float("-inf"), x))
        result = tl.where(x < 0, float("nan"), result)
    return result


@triton.jit
def exp_and_expm1(x):
    """``exp(x)`` and ``exp(x) - 1``, the latter to full relative accuracy near 0; NaN stays NaN."""
    if x.dtype == tl.float64:
        bound: tl.constexpr = 750.0
        terms: tl.constexpr = 14
        integer: tl.constexpr = tl.int64
        bias: tl.constexpr = 1023
        mantissa_bits: tl.constexpr = 52
    else:
        bound: tl.constexpr = 105.0
        terms: tl.constexpr = 9
        integer: tl.constexpr = tl.int32
        bias: tl.constexpr = 127
        mantissa_bits: tl.constexpr = 23
    # beyond the bound both are at their limits
    y = tl.where(x > bound, bound, tl.where(x < -bound, -bound, x))
    # x = n*ln(2) + f with |f| <= ln(2)/2; the high part of ln(2) has 9 bits, so n times it is exact
    n = tl.floor(tl.where(y == y, y, 0.0) * 1.4426950408889634 + 0.5)
    f = (y - n * 0.693359375) + n * 2.1219444005469057e-4
    # Taylor series of expm1(f) by Horner's rule
    series = tl.full(f.shape, 1.0, x.dtype)
    for i in tl.static_range(terms - 1):
        series = series * f * (1.0 / (terms - i)) + 1.0
    small = f * series
    # 2**n in two halves, each of them a normal number
    n = n.to(integer)
    half = n >> 1
    scale = ((half + bias) << mantissa_bits).to(x.dtype, bitcast=True)
    rest = ((n - half + bias) << mantissa_bits).to(x.dtype, bitcast=True)
    exp = (1.0 + small) * scale * rest
    return exp, tl.where(n == 0, small, exp - 1.0)
