"""Row statistics: one streaming pass over the latents into per-program partials, then a small kernel that adds up.

With ``d = new - old``, ``w = new - reference`` and ``z`` the noise or, on means, ``x' - old``, a program sums its part
of a row to ``d*z, d*d`` and, where asked, ``z*z, w*w``. The row's ``k`` is applied to the sums, so the streaming kernel
reads no step table.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..rows import RowSource, stats_dtype, takes_rows
from .launch import (
    BLOCK,
    MATCHING,
    MEAN,
    NUM_WARPS,
    Geometry,
    Kind,
    Launcher,
    geometry_of,
    kind_of,
    partial_tiles,
    step_arguments,
)
from .philox import normals, row_stream
from .rows import row_offset, row_statistics, row_sums, training_step


@triton.jit(do_not_specialize=["splits", "seed", "first_stream"])
def partials_kernel(
    new,
    old,
    noise,
    reference,
    streams,
    partials,  # [fields, rows*splits]
    numel,
    splits,
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
    MEAN_FORM: tl.constexpr,
    MATCHING: tl.constexpr,  # `reference` is the sample without noise
    SECOND_MOMENT: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAPS: tl.constexpr,  # with the launch behind; see launch.Launcher
):
    if OVERLAPS:
        # it waits for this one's results, and by then it is there
        tl.extra.cuda.gdc_launch_dependents()
    dtype: tl.constexpr = partials.dtype.element_ty
    program = tl.program_id(0)
    row = program // splits
    start = (program % splits).to(tl.int64) * (BLOCKS * BLOCK)
    remaining = tl.minimum(numel - start, BLOCKS * BLOCK).to(tl.int32)
    new += row_offset(row, rows1, new_outer, new_inner) + start
    old += row_offset(row, rows1, old_outer, old_inner) + start
    if noise is None:
        stream = row_stream(streams, first_stream, row)
    else:
        noise += row_offset(row, rows1, noise_outer, noise_inner) + start
    if reference is not None:
        reference += row_offset(row, rows1, reference_outer, reference_inner) + start

    cross = tl.full((BLOCK,), 0.0, dtype)
    square = tl.full((BLOCK,), 0.0, dtype)
    moment = tl.full((BLOCK,), 0.0, dtype)
    apart = tl.full((BLOCK,), 0.0, dtype)
    for i in range(BLOCKS):
        at = tl.arange(0, BLOCK) + i * BLOCK
        inside = at < remaining
        # all loads before any arithmetic and noise first: in another order ptxas starts on new - old before it has sent
        # for the noise
        if noise is not None:
            z = tl.load(noise + at, mask=inside, other=0.0)
        x = tl.load(new + at, mask=inside, other=0.0)
        y = tl.load(old + at, mask=inside, other=0.0)
        if reference is not None:
            w = tl.load(reference + at, mask=inside, other=0.0)
        x = x.to(dtype)
        y = y.to(dtype)
        d = x - y
        if noise is None:
            z = normals(seed.to(tl.int64), stream, start + i * BLOCK, BLOCK).to(dtype)
            if SECOND_MOMENT:
                # x is 0 outside; naming it ties the normals to the layout of the loads
                z = tl.where(inside, z, x)
        else:
            z = z.to(dtype)
            if MEAN_FORM:
                z = z - y
        if MATCHING:
            z = (z - w.to(dtype)) - y
        cross += d * z
        square += d * d
        if SECOND_MOMENT:
            moment += z * z
        if reference is not None and not MATCHING:
            w = x - w.to(dtype)
            apart += w * w

    out = partials + program
    total = tl.num_programs(0).to(tl.int64)
    tl.store(out, tl.sum(cross, axis=0))
    tl.store(out + total, tl.sum(square, axis=0))
    out += 2 * total
    if SECOND_MOMENT:
        tl.store(out, tl.sum(moment, axis=0))
        out += total
    if reference is not None and not MATCHING:
        tl.store(out, tl.sum(apart, axis=0))


@triton.jit(do_not_specialize=["rows", "splits", "numel"])
def statistics_kernel(
    partials,
    step,
    stats,  # [4, rows]
    std,
    scale,
    neg_dt,
    rows,
    splits,
    numel,
    COLUMNS: tl.constexpr,
    MEAN_FORM: tl.constexpr,
    SECOND_MOMENT: tl.constexpr,
    REFERENCE: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
    SPLIT_BLOCK: tl.constexpr,
    SPLIT_BLOCKS: tl.constexpr,
    OVERLAPS: tl.constexpr,  # with the launch ahead
):
    dtype: tl.constexpr = partials.dtype.element_ty
    row = tl.program_id(0) * ROW_BLOCK + tl.arange(0, ROW_BLOCK)
    _, k, _ = training_step(step, std, scale, neg_dt, row, rows, dtype, ROW_BLOCK, COLUMNS, MEAN_FORM)
    if OVERLAPS:
        tl.extra.cuda.gdc_wait()
    fields: tl.constexpr = 2 + SECOND_MOMENT + REFERENCE
    cross, square, moment, apart = row_sums(partials, row, rows, splits, fields, ROW_BLOCK, SPLIT_BLOCK, SPLIT_BLOCKS)
    if REFERENCE and not SECOND_MOMENT:
        moment, apart = apart, moment
    p, q, e, r = row_statistics(cross, square, moment, apart, numel, k, MEAN_FORM)
    inside = row < rows
    line = rows.to(tl.int64)
    tl.store(stats + row, p, mask=inside)
    tl.store(stats + line + row, q, mask=inside)
    tl.store(stats + 2 * line + row, e, mask=inside)
    tl.store(stats + 3 * line + row, r, mask=inside)


_launch_partials = Launcher(partials_kernel, fp_fusion=True)
_launch_statistics = Launcher(statistics_kernel, fp_fusion=False, waits=True)


def launch_partials(source: RowSource, geometry: Geometry, second_moment: bool, like: Tensor) -> Tensor:
    """Sums of ``d*z, d*d``, then ``z*z`` and ``w*w`` where asked, per program.

    Returns ``[fields, R, splits]`` in ``like``'s dtype as one long vector, with room for ``[fields, R]`` behind it.
    """
    of = ("partials", second_moment, source.form)
    found = geometry.prepared.get(of)
    if found is None:
        found = geometry.prepared[of] = _prepared(source, geometry, second_moment)
    kind, size = found
    partials = like.new_empty(size)
    _launch_partials(kind, (*source[:5], partials), (), (source.seed, source.first_stream))
    return partials


def sums_apart(source: RowSource) -> bool:
    """Whether there are sums of ``w*w``."""
    return source.reference is not None and source.form != MATCHING


def _prepared(source: RowSource, geometry: Geometry, second_moment: bool) -> tuple[Kind, int]:
    """The launch, and how many numbers its results take."""
    rows, (blocks, splits), strides = geometry.rows, geometry.cut, geometry.strides
    ints = (geometry.numel, splits, strides.rows1, *strides.outer, *strides.inner)
    constants = (source.form == MEAN, source.form == MATCHING, second_moment, blocks, BLOCK)
    kind = Kind(rows * splits, NUM_WARPS, ints, constants, overlaps=True)
    return kind, (2 + second_moment + sums_apart(source)) * rows * (splits + 1)


@takes_rows
def row_stats(source: RowSource, second_moment: bool) -> Tensor:
    """:func:`flowdppo_fast.reference.row_stats` in two launches."""
    geometry, dtype = geometry_of(source), stats_dtype(source.new)
    rows, splits = geometry.rows, geometry.cut.splits
    stats = torch.empty((4, rows), dtype=dtype, device=source.new.device)
    if rows == 0:
        return stats
    step, values = step_arguments(source.step, source.step_values, rows, stats)
    partials = launch_partials(source, geometry, second_moment, stats)
    tiles = partial_tiles(rows, splits)
    kind = kind_of(
        tiles.row_blocks, 1, (rows, splits, geometry.numel),
        (
            0 if step is None else step.shape[1], source.form == MEAN, second_moment, sums_apart(source),
            tiles.row_block, tiles.split_block, tiles.split_blocks,
        ),
        True,
    )  # fmt: skip
    _launch_statistics(kind, (partials, step, stats), tuple(values))
    return stats
