"""Device functions that kernels share: where a row lies, what its step's numbers are, how its partials add up."""

from __future__ import annotations

import triton
import triton.language as tl

from .elementary import divide


@triton.jit
def row_offset(row, rows1, outer, inner):
    """int64 offset of a row in elements; see :func:`flowdppo_fast.kernels.launch.row_strides`."""
    if rows1 is None:
        offset = row.to(tl.int64) * inner
    else:
        offset = (row // rows1).to(tl.int64) * outer + (row % rows1).to(tl.int64) * inner
    return offset


@triton.jit
def row_sums(
    partials,
    row,
    rows,
    splits,
    FIELDS: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
    SPLIT_BLOCK: tl.constexpr,
    SPLIT_BLOCKS: tl.constexpr,
):
    """Sums over the splits of ``partials`` ``[FIELDS, rows, splits]`` for rows ``[ROW_BLOCK]``, in a fixed order.

    Always four tensors; those of fields that do not exist, and rows past the end, are 0.
    """
    dtype: tl.constexpr = partials.dtype.element_ty
    field = rows.to(tl.int64) * splits
    first = tl.full((ROW_BLOCK, SPLIT_BLOCK), 0.0, dtype)
    second, third, fourth = first, first, first
    for i in range(SPLIT_BLOCKS):
        split = tl.arange(0, SPLIT_BLOCK) + i * SPLIT_BLOCK
        inside = (row < rows)[:, None] & (split < splits)[None, :]
        at = partials + (row.to(tl.int64) * splits)[:, None] + split[None, :]
        first += tl.load(at, mask=inside, other=0.0)
        if FIELDS > 1:
            second += tl.load(at + field, mask=inside, other=0.0)
        if FIELDS > 2:
            third += tl.load(at + 2 * field, mask=inside, other=0.0)
        if FIELDS > 3:
            fourth += tl.load(at + 3 * field, mask=inside, other=0.0)
    return tl.sum(first, axis=1), tl.sum(second, axis=1), tl.sum(third, axis=1), tl.sum(fourth, axis=1)


@triton.jit
def training_step(
    step,
    std,
    scale,
    neg_dt,
    row,
    rows,
    dtype: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    MEAN_FORM: tl.constexpr,
):
    """``S, k, -dt`` of rows ``[ROW_BLOCK]``, from the table or from the three numbers that serve all rows."""
    inside = row < rows
    if step is None:
        s = tl.full((ROW_BLOCK,), std, dtype)
        k = tl.full((ROW_BLOCK,), scale, dtype)
        t = tl.full((ROW_BLOCK,), neg_dt, dtype)
    else:
        s = tl.load(step + row * COLUMNS, mask=inside, other=1.0)
        k = s
        t = tl.full((ROW_BLOCK,), float("nan"), dtype)
        if COLUMNS > 1:
            k = tl.load(step + row * COLUMNS + 1, mask=inside, other=1.0)
            t = tl.load(step + row * COLUMNS + 2, mask=inside, other=1.0)
    if MEAN_FORM:
        k = divide(tl.full((ROW_BLOCK,), 1.0, dtype), s)
    return s, k, t


@triton.jit
def row_statistics(cross, square, moment, apart, numel, k, MEAN_FORM: tl.constexpr):
    """``P, Q, E, R`` of rows from their sums of ``d*z, d*d, z*z, w*w`` (``statistics.partials_kernel``)."""
    count = tl.full(cross.shape, 1.0, cross.dtype) * numel.to(cross.dtype)
    p = divide(cross, count) * k
    q = divide(square, count) * k * k
    e = divide(moment, count)
    r = divide(apart, count) * k * k
    if MEAN_FORM:
        p = p * k
        e = e * k * k
    return p, q, e, r
