"""Philox4x32-7 normals inside a kernel: the draws of :mod:`flowdppo_fast.noise`.

On NVIDIA GPUs logarithm, sine and cosine are the hardware's approximations (``lg2``, ``sin``, ``cos``), which is what
lets arithmetic keep up with memory: normals are within 1e-5 of the float64 definition. Elsewhere, and in the
interpreter, they are polynomials and within 4 float32 eps of the radius.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import libdevice

from .elementary import minus_two_log_of_bits


@triton.jit
def philox_words(seed, stream, block_low, block_high):
    """The four uint32 words of counters ``(block_low, block_high, stream_low, stream_high)`` under key ``seed``.

    ``seed`` and ``stream`` are int64 scalars, ``block_low`` a uint32 tensor, ``block_high`` a uint32 scalar. Words that
    depend on scalars alone stay scalars through the first rounds, which saves their vector arithmetic.
    """
    k0 = (seed & 0xFFFFFFFF).to(tl.uint32)
    k1 = ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    c0 = block_low
    c1 = block_high
    c2 = (stream & 0xFFFFFFFF).to(tl.uint32)
    c3 = ((stream >> 32) & 0xFFFFFFFF).to(tl.uint32)
    for _ in tl.static_range(7):
        # a 64-bit product is one wide multiply; mul and umulhi would be two
        product0 = c0.to(tl.uint64) * 0xD2511F53
        product1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (product1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c1 = product1.to(tl.uint32)
        c2 = (product0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c3 = product0.to(tl.uint32)
        k0 = k0 + 0x9E3779B9
        k1 = k1 + 0xBB67AE85
    return c0, c1, c2, c3


# whether kernels are compiled for NVIDIA GPUs
_HARDWARE = tl.constexpr(isinstance(philox_words, triton.JITFunction) and torch.version.hip is None)


@triton.jit
def _radius(word):
    """``sqrt(-2*log(u))`` for ``u = word * 2**-32 + 2**-33``, where ``word`` and the sum are rounded to float32."""
    rounded = word.to(tl.float32)
    u = rounded * 2.3283064365386963e-10 + 1.1641532182693481e-10
    if _HARDWARE:
        # lg2 has an absolute error of 2**-22 near u = 1. From 1 - 2**-11 on, -2*log(u) is 2*(1 - u) to 2.4e-7: both are
        # off by the same there, which is 5e-6 in the radius
        near = rounded * -4.656612873077393e-10 + 2.0
        square = tl.where(u > 0.99951171875, near, libdevice.fast_log2f(u) * -1.3862943611198906)
    else:
        square = minus_two_log_of_bits(u.to(tl.int32, bitcast=True))
    return tl.sqrt(square)


@triton.jit
def _cos_sin(word):
    """``cos`` and ``sin`` of ``2*pi*turns`` for ``turns = word * 2**-32``."""
    if _HARDWARE:
        # signed turns: the smaller angle is the more exact one
        angle = word.to(tl.int32, bitcast=True).to(tl.float32) * 1.4629180792671596e-09
        cosine = libdevice.fast_cosf(angle)
        sine = libdevice.fast_sinf(angle)
    else:
        # to the nearest quarter turn in integers, which is exact: with an eighth added, the two top bits number the
        # quarter and the rest, from -1/2 to 1/2 quarters, is a signed fraction
        shifted = word + 0x20000000
        rest = ((shifted << 2) ^ 0x80000000).to(tl.int32, bitcast=True).to(tl.float32) * 2.3283064365386963e-10
        y = rest * rest
        # minimax of sin(pi/2*rest)/rest and cos(pi/2*rest), relative errors 3e-9 and 4e-8
        s = y * -0.004685971420258284 + 0.07971252501010895
        s = s * y - 0.645966649055481
        s = (s * y + 1.5707963705062866) * rest
        c = y * -0.020414529368281364 + 0.25360238552093506
        c = c * y - 1.2336976528167725
        c = c * y + 1.0
        odd = (shifted & 0x40000000) != 0
        cosine = tl.where(odd, s, c).to(tl.uint32, bitcast=True) ^ ((shifted + 0x40000000) & 0x80000000)
        sine = tl.where(odd, c, s).to(tl.uint32, bitcast=True) ^ (shifted & 0x80000000)
        cosine = cosine.to(tl.float32, bitcast=True)
        sine = sine.to(tl.float32, bitcast=True)
    return cosine, sine


@triton.jit
def normals(seed, stream, start, BLOCK: tl.constexpr):
    """float32 normals ``start .. start + BLOCK - 1`` of a stream; ``start`` is an int64 multiple of ``BLOCK``."""
    first = start // 4
    # BLOCK/4 divides 2**32, so the low words of one block never carry
    low = (first & 0xFFFFFFFF).to(tl.uint32) + tl.arange(0, BLOCK // 4).to(tl.uint32)
    w0, w1, w2, w3 = philox_words(seed, stream, low, (first >> 32).to(tl.uint32))
    # both words of a pair in one integer: with a single join Triton carries the layout of the loads back through all
    # rounds, with two it would move the normals through shared memory; the packing itself compiles to nothing
    pair0 = w0.to(tl.uint64) | (w1.to(tl.uint64) << 32)
    pair1 = w2.to(tl.uint64) | (w3.to(tl.uint64) << 32)
    pairs = tl.join(pair0, pair1)
    radius = _radius(pairs.to(tl.uint32))
    cosine, sine = _cos_sin((pairs >> 32).to(tl.uint32))
    # [BLOCK/4, pair, cosine or sine] is z0 z1 z2 z3 in memory order
    return tl.reshape(tl.join(radius * cosine, radius * sine), (BLOCK,))


@triton.jit
def row_stream(streams, first_stream, row):
    """The int64 Philox stream of a row: from the table, or consecutive from the first."""
    if streams is None:
        stream = first_stream.to(tl.int64) + row.to(tl.int64)
    else:
        stream = tl.load(streams + row)
    return stream
