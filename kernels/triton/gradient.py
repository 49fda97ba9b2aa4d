"""The backward pass: one streaming launch from row coefficients to the gradient of the first argument."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..rows import RowSource, takes_rows
from .elementary import divide
from .launch import (
    BLOCK,
    MATCHING,
    MEAN,
    NUM_WARPS,
    Geometry,
    Kind,
    Launcher,
    geometry_of,
    step_arguments,
    vector_width,
)
from .philox import normals, row_stream
from .rows import row_offset


@triton.jit(do_not_specialize=["splits", "upstream_stride", "seed", "first_stream"])
def gradient_kernel(
    new,
    old,
    noise,
    reference,
    streams,
    step,
    coefficients,  # [LINE + 3, rows], of which the last three
    upstream,
    grad,  # [rows, numel]
    scale,
    factor,
    numel,
    splits,
    upstream_stride,
    rows1,
    new_outer,
    old_outer,
    noise_outer,
    reference_outer,
    new_inner,
    old_inner,
    noise_inner,
    reference_inner,
    seed: tl.int64,
    first_stream: tl.int64,
    COLUMNS: tl.constexpr,
    MEAN_FORM: tl.constexpr,
    MATCHING: tl.constexpr,  # `reference` is the sample without noise
    LINE: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    dtype: tl.constexpr = coefficients.dtype.element_ty
    program = tl.program_id(0)
    row = program // splits
    rows = tl.num_programs(0) // splits
    start = (program % splits).to(tl.int64) * (BLOCKS * BLOCK)
    remaining = tl.minimum(numel - start, BLOCKS * BLOCK).to(tl.int32)
    grad += row.to(tl.int64) * numel + start
    coefficients += LINE * rows.to(tl.int64) + row
    grad_p = tl.load(coefficients)
    grad_q = tl.load(coefficients + rows.to(tl.int64))
    grad_r = tl.load(coefficients + 2 * rows.to(tl.int64))
    if (grad_p != 0) | (grad_q != 0) | (grad_r != 0):
        if step is None:
            k = tl.full((), scale, dtype)
        else:
            if MEAN_FORM:
                k = divide(tl.full((), 1.0, dtype), tl.load(step + row * COLUMNS))
            else:
                k = tl.load(step + row * COLUMNS + 1)
        outer = tl.full((), factor, dtype) * k
        if upstream is not None:
            outer *= tl.load(upstream + row * upstream_stride).to(dtype)
        times_z = outer * grad_p
        times_d = 2.0 * outer * k * grad_q
        times_w = 2.0 * outer * k * grad_r
        if MEAN_FORM:
            times_z = times_z * k
        new += row_offset(row, rows1, new_outer, new_inner) + start
        old += row_offset(row, rows1, old_outer, old_inner) + start
        if noise is None:
            stream = row_stream(streams, first_stream, row)
        else:
            noise += row_offset(row, rows1, noise_outer, noise_inner) + start
        if reference is not None:
            reference += row_offset(row, rows1, reference_outer, reference_inner) + start
        for i in range(BLOCKS):
            at = tl.max_contiguous(tl.arange(0, BLOCK) + i * BLOCK, VECTOR)
            inside = at < remaining
            x = tl.load(new + at, mask=inside, other=0.0)
            y = tl.load(old + at, mask=inside, other=0.0)
            if noise is not None:
                z = tl.load(noise + at, mask=inside, other=0.0)
            if reference is not None:
                w = tl.load(reference + at, mask=inside, other=0.0)
            x = x.to(dtype)
            y = y.to(dtype)
            if noise is None:
                z = normals(seed.to(tl.int64), stream, start + i * BLOCK, BLOCK).to(dtype)
            else:
                z = z.to(dtype)
                if MEAN_FORM:
                    z = z - y
            if MATCHING:
                z = (z - w.to(dtype)) - y
            result = times_z * z + times_d * (x - y)
            if reference is not None and not MATCHING:
                result += times_w * (x - w.to(dtype))
            tl.store(grad + at, result.to(grad.dtype.element_ty), mask=inside)
    else:
        # nothing is read: the row may hold overflowed numbers, and reading is most of the cost
        for i in range(BLOCKS):
            at = tl.max_contiguous(tl.arange(0, BLOCK) + i * BLOCK, VECTOR)
            tl.store(grad + at, tl.full((BLOCK,), 0.0, grad.dtype.element_ty), mask=at < remaining)


_launch_gradient = Launcher(gradient_kernel, fp_fusion=True)


def launch_gradient(
    source: RowSource, geometry: Geometry, lines: Tensor, upstream: Tensor | None, factor: float, shape: torch.Size
) -> Tensor:
    """:func:`row_grad`, contiguous in ``shape``; ``upstream`` may be None for 1.

    ``lines`` are contiguous ``[L, rows]``, of which the last three are the coefficients.
    """
    grad = source.new.new_empty(shape)
    if geometry.rows == 0:
        return grad
    step, (std, scale, _) = step_arguments(source.step, source.step_values, geometry.rows, lines)
    if step is None and source.form == MEAN:
        scale = 1.0 / std if std != 0.0 else float("inf")
    factor /= geometry.numel
    if lines.dtype == torch.float64:
        # python floats reach kernels as float32
        scaled = torch.full((), factor, dtype=torch.float64, device=lines.device)
        upstream, factor = scaled if upstream is None else scaled * upstream, 1.0
    upstream_stride = 0 if upstream is None or upstream.numel() == 1 else upstream.stride(0)
    columns = 0 if step is None else step.shape[1]
    of = ("gradient", source.form, columns, upstream_stride, lines.shape[0], grad.dtype)
    kind = geometry.prepared.get(of)
    if kind is None:
        (blocks, splits), strides = geometry.cut, geometry.strides
        ints = (geometry.numel, splits, upstream_stride, strides.rows1, *strides.outer, *strides.inner)
        kind = geometry.prepared[of] = Kind(
            geometry.rows * splits, NUM_WARPS, ints,
            (
                columns, source.form == MEAN, source.form == MATCHING, lines.shape[0] - 3, vector_width(grad),
                blocks, BLOCK,
            ),
        )  # fmt: skip
    _launch_gradient(
        kind, (*source[:5], step, lines, upstream, grad), (scale, factor), (source.seed, source.first_stream)
    )
    return grad


@takes_rows
def row_grad(source: RowSource, coefficients: Tensor, upstream: Tensor, factor: float) -> Tensor:
    """:func:`flowdppo_fast.reference.row_grad` in one launch."""
    lines = coefficients.contiguous()
    return launch_gradient(source, geometry_of(source), lines, upstream, factor, source.new.shape)
