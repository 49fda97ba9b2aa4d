"""Kernels around single device functions; ``conftest.py`` imports them so that it decides how Triton sees them."""

from __future__ import annotations

import triton
import triton.language as tl

from flowdppo_fast.kernels.elementary import exp_and_expm1, log
from flowdppo_fast.kernels.philox import _cos_sin, _radius, normals, philox_words
from flowdppo_fast.kernels.rows import row_offset


@triton.jit
def words_kernel(out, block, seed, stream, high, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    low = tl.load(block + lane).to(tl.uint32)
    words = philox_words(tl.load(seed), tl.load(stream), low, tl.load(high).to(tl.uint32))
    for i in tl.static_range(4):
        tl.store(out + i * BLOCK + lane, words[i].to(tl.int64))


@triton.jit
def normals_kernel(out, seed, stream, start, BLOCK: tl.constexpr):
    z = normals(tl.load(seed), tl.load(stream), tl.load(start), BLOCK)
    tl.store(out + tl.arange(0, BLOCK), z)


@triton.jit
def box_muller_kernel(words, radius, cosine, sine, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK) + tl.program_id(0) * BLOCK
    word = tl.load(words + lane).to(tl.uint32)
    c, s = _cos_sin(word)
    tl.store(radius + lane, _radius(word))
    tl.store(cosine + lane, c)
    tl.store(sine + lane, s)


@triton.jit
def elementary_kernel(x, exp_out, expm1_out, log_out, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK) + tl.program_id(0) * BLOCK
    value = tl.load(x + lane)
    exp, expm1 = exp_and_expm1(value)
    tl.store(exp_out + lane, exp)
    tl.store(expm1_out + lane, expm1)
    tl.store(log_out + lane, log(value))


@triton.jit
def offset_kernel(out, rows1, outer, inner, BLOCK: tl.constexpr):
    tl.store(out + tl.arange(0, BLOCK), row_offset(tl.arange(0, BLOCK), rows1, outer, inner))
