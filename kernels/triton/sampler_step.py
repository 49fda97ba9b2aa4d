"""One sampler step, ``mu = a*x + b*v`` and ``x' = mu + S*e``: one launch, two with the log-prob."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..rows import stats_dtype
from .elementary import divide, log
from .launch import (
    BLOCK,
    NUM_WARPS,
    Launcher,
    cut,
    kind_of,
    partial_tiles,
    row_strides,
    step_arguments,
    vector_width,
)
from .philox import normals, row_stream
from .rows import row_offset, row_sums


@triton.jit(do_not_specialize=["splits", "seed", "first_stream"])
def step_kernel(
    sample,
    velocity,
    noise,  # e, or with GIVEN the next state
    streams,
    step,
    next_sample,  # [rows, numel] or None
    mean,  # [rows, numel] or None
    partials,  # [rows*splits] or None
    sample_coef,
    velocity_coef,
    std,
    numel,
    splits,
    rows1,
    sample_outer,
    velocity_outer,
    noise_outer,
    sample_inner,
    velocity_inner,
    noise_inner,
    seed: tl.int64,
    first_stream: tl.int64,
    GIVEN: tl.constexpr,
    FLOAT64: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    dtype: tl.constexpr = tl.float64 if FLOAT64 else tl.float32
    program = tl.program_id(0)
    row = program // splits
    start = (program % splits).to(tl.int64) * (BLOCKS * BLOCK)
    remaining = tl.minimum(numel - start, BLOCKS * BLOCK).to(tl.int32)
    if step is None:
        a = tl.full((), sample_coef, dtype)
        b = tl.full((), velocity_coef, dtype)
        s = tl.full((), std, dtype)
    else:
        a = tl.load(step + row * 3)
        b = tl.load(step + row * 3 + 1)
        s = tl.load(step + row * 3 + 2)
    sample += row_offset(row, rows1, sample_outer, sample_inner) + start
    velocity += row_offset(row, rows1, velocity_outer, velocity_inner) + start
    if noise is None:
        stream = row_stream(streams, first_stream, row)
    else:
        noise += row_offset(row, rows1, noise_outer, noise_inner) + start
    if next_sample is not None:
        next_sample += row.to(tl.int64) * numel + start
    if mean is not None:
        mean += row.to(tl.int64) * numel + start

    moment = tl.full((BLOCK,), 0.0, dtype)
    for i in range(BLOCKS):
        at = tl.max_contiguous(tl.arange(0, BLOCK) + i * BLOCK, VECTOR)
        inside = at < remaining
        # all loads before any arithmetic and noise first, as in statistics.partials_kernel
        if noise is not None:
            e = tl.load(noise + at, mask=inside, other=0.0)
        x = tl.load(sample + at, mask=inside, other=0.0)
        v = tl.load(velocity + at, mask=inside, other=0.0)
        x = x.to(dtype)
        mu = a * x + b * v.to(dtype)
        if noise is None:
            e = normals(seed.to(tl.int64), stream, start + i * BLOCK, BLOCK).to(dtype)
            if partials is not None:
                # x is 0 outside; naming it ties the normals to the layout of the loads
                e = tl.where(inside, e, x)
        else:
            e = e.to(dtype)
        if mean is not None:
            tl.store(mean + at, mu, mask=inside)
        if next_sample is not None:
            # a step without noise keeps its mean even if the noise tensor holds nothing usable
            drawn = tl.where(s == 0, mu, mu + s * e)
            tl.store(next_sample + at, drawn.to(next_sample.dtype.element_ty), mask=inside)
        if partials is not None:
            if GIVEN:
                # 1/S**2 is left to the row; outside, mu is 0 like the rest
                e = e - mu
            moment += e * e
    if partials is not None:
        tl.store(partials + program, tl.sum(moment, axis=0))


@triton.jit(do_not_specialize=["rows", "splits", "numel"])
def log_prob_kernel(
    partials,
    step,
    log_prob,  # [rows]
    std,
    rows,
    splits,
    numel,
    GIVEN: tl.constexpr,
    UNNORMALIZED: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
    SPLIT_BLOCK: tl.constexpr,
    SPLIT_BLOCKS: tl.constexpr,
):
    dtype: tl.constexpr = partials.dtype.element_ty
    row = tl.program_id(0) * ROW_BLOCK + tl.arange(0, ROW_BLOCK)
    if step is None:
        s = tl.full((ROW_BLOCK,), std, dtype)
    else:
        s = tl.load(step + row * 3 + 2, mask=row < rows, other=1.0)
    count = tl.full((ROW_BLOCK,), 1.0, dtype) * numel.to(dtype)
    total, _, _, _ = row_sums(partials, row, rows, splits, 1, ROW_BLOCK, SPLIT_BLOCK, SPLIT_BLOCKS)
    moment = divide(total, count)
    if GIVEN:
        moment = divide(divide(moment, s), s)
    if UNNORMALIZED:
        result = -(s * s) * moment
    else:
        LOG_SQRT_2PI: tl.constexpr = 0.9189385332046727
        result = -0.5 * moment - log(s) - LOG_SQRT_2PI
    tl.store(log_prob + row, result, mask=row < rows)


_launch_step = Launcher(step_kernel, fp_fusion=True)
_launch_log_prob = Launcher(log_prob_kernel, fp_fusion=False)


def sde_step(
    sample: Tensor,
    velocity: Tensor,
    noise: Tensor | None,
    prev_sample: Tensor | None,
    streams: Tensor | None,
    step: Tensor | None,
    step_values: list[float],
    seed: int,
    first_stream: int,
    dtype: torch.dtype,
    with_mean: bool,
    with_log_prob: bool,
    unnormalized: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`flowdppo_fast.reference.sde_step` in one launch, and a small second one for the log-prob."""
    rows0, rows1, numel = sample.shape
    rows, compute, given = rows0 * rows1, stats_dtype(sample), prev_sample is not None
    next_sample = sample.new_empty(0 if given else sample.shape, dtype=dtype)
    mean = sample.new_empty(sample.shape if with_mean else 0, dtype=compute)
    log_prob = sample.new_empty(rows if with_log_prob else 0, dtype=compute)
    if rows == 0 or (given and not with_mean and not with_log_prob):
        return next_sample, mean, log_prob
    step, values = step_arguments(step, step_values, rows, log_prob)
    blocks, splits = cut(rows, numel)
    partials = log_prob.new_empty(rows * splits) if with_log_prob else None
    source = prev_sample if given else noise
    drawn, wanted_mean = None if given else next_sample, mean if with_mean else None
    stored = [x for x in (drawn, wanted_mean) if x is not None]
    rows1, outer, inner = row_strides(sample, velocity, source)
    kind = kind_of(
        rows * splits, NUM_WARPS, (numel, splits, rows1, *outer, *inner),
        (given, compute == torch.float64, vector_width(*(stored or [sample])), blocks, BLOCK),
    )  # fmt: skip
    _launch_step(
        kind,
        (sample, velocity, source, streams, step, drawn, wanted_mean, partials),
        tuple(values),
        (seed, first_stream),
    )
    if with_log_prob:
        tiles = partial_tiles(rows, splits)
        kind = kind_of(
            tiles.row_blocks, 1, (rows, splits, numel),
            (given, unnormalized, tiles.row_block, tiles.split_block, tiles.split_blocks),
        )  # fmt: skip
        _launch_log_prob(kind, (partials, step, log_prob), (values[2],))
    return next_sample, mean, log_prob
