"""The objectives' epilogue in one small program: the twin of :func:`flowdppo_fast.objectives.epilogue`.

A single program adds up the rows' partials, then walks the rows in blocks: applies the objective and keeps running
metrics, lane by lane, which it folds at the end. Rows are few, so one launch counts for more than its parallelism.
"""

from __future__ import annotations

import functools
import types
from collections import namedtuple
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from flowdppo_fast.kernels.elementary import divide, exp_and_expm1, log
from flowdppo_fast.kernels.gradient import launch_gradient
from flowdppo_fast.kernels.launch import MEAN, Launcher, cut, epilogue_tiles, on_device, step_arguments
from flowdppo_fast.kernels.rows import row_statistics, row_sums, training_step
from flowdppo_fast.kernels.statistics import launch_partials
from flowdppo_fast.objectives import SUMMARY, RowField
from flowdppo_fast.rows import RowSource, takes_rows
from flowdppo_fast.rules import RULES, RowValues

_ROW_FIELDS, _SUMMARIES = len(RowField), len(SUMMARY)
_NO_NUMBERS = (None,) * 5

# results by name, in the order in which they are stored
RowResults = namedtuple("RowResults", [field.name.lower() for field in RowField])
Summary = namedtuple("Summary", SUMMARY)  # type: ignore[misc]


class Numbers(NamedTuple):
    """The options' numbers, in the order of ``EpilogueOptions.floats``."""

    threshold: Any
    clip_low: Any
    clip_high: Any
    advantage_clip: Any
    kl_weight: Any


class Row(NamedTuple):
    """A block of rows: statistics, numbers of the step, and what comes with them."""

    p: Any
    q: Any
    e: Any
    r: Any
    std: Any
    scale: Any
    neg_dt: Any
    advantage: Any
    weight: Any


class Extras(NamedTuple):
    """What the summary needs of a row besides its results."""

    policy: Any
    reference: Any
    drift: Any
    excess: Any
    coupling: Any
    far: Any
    above: Any
    below: Any
    dropped: Any
    advantage: Any


class Totals(NamedTuple):
    """Running metrics, one lane per row of a block; Welford's mean and squared distance for the spread of the ratio."""

    rows: Any
    loss: Any
    policy: Any
    log_ratio_squares: Any
    kl: Any
    drift: Any
    reference: Any
    far: Any
    positive_removed: Any
    negative_removed: Any
    dropped: Any
    above: Any
    below: Any
    clipped: Any
    nonfinite: Any
    coupling: Any
    excess_mean: Any
    excess_squares: Any
    ratio_min: Any
    ratio_max: Any
    kl_max: Any
    ratio_nans: Any
    kl_nans: Any


@triton.jit
def _number(value, table, index: tl.constexpr, dtype: tl.constexpr):
    """A scalar option in ``dtype``: the launch argument, or an entry of the float64 table."""
    if table is None:
        number = tl.full((), value, dtype)
    else:
        number = tl.load(table + index)
    return number


@triton.jit
def _numbers(table, threshold, clip_low, clip_high, advantage_clip, kl_weight, dtype: tl.constexpr):
    return Numbers(
        _number(threshold, table, 0, dtype),
        _number(clip_low, table, 1, dtype),
        _number(clip_high, table, 2, dtype),
        _number(advantage_clip, table, 3, dtype),
        _number(kl_weight, table, 4, dtype),
    )


@triton.jit
def _sum_rows(
    partials,
    rows,
    splits,
    FIELDS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_ROW_BLOCKS: tl.constexpr,
    SPLIT_BLOCK: tl.constexpr,
    SPLIT_BLOCKS: tl.constexpr,
):
    """Where the rows' sums ``[FIELDS, rows]`` lie."""
    if SPLIT_BLOCK == 1:
        sums = partials
    else:
        # through memory: kept in registers they would keep the tiles' layout, many copies of every row, through all of
        # the arithmetic that follows
        line = rows.to(tl.int64)
        sums = partials + FIELDS * line * splits
        for block in range(TILE_ROW_BLOCKS):
            row = tl.arange(0, TILE_ROWS) + block * TILE_ROWS
            fields = row_sums(partials, row, rows, splits, FIELDS, TILE_ROWS, SPLIT_BLOCK, SPLIT_BLOCKS)
            for field in tl.static_range(FIELDS):
                tl.store(sums + field * line + row, fields[field], mask=row < rows)
        tl.debug_barrier()
    return sums


@triton.jit
def _squares(sums, partials, given_drift, row, rows, zero):
    """The rows' sums of ``d*d``."""
    if partials is not None:
        square = tl.load(sums + rows.to(tl.int64) + row, mask=row < rows, other=0.0)
    elif given_drift is not None:
        square = tl.load(given_drift + row, mask=row < rows, other=0.0)
    else:
        square = zero
    return square


@triton.jit
def _read_row(
    advantages,
    row_weights,
    sums,
    partials,
    given_drift,
    given_reference_drift,
    step,
    at,
    rows,
    numel,
    zero,
    MEAN_FORM: tl.constexpr,
    MOMENT: tl.constexpr,
    DRIFT: tl.constexpr,
    FIELDS: tl.constexpr,
):
    """A block of rows from their sums."""
    inside = at < rows
    line = rows.to(tl.int64)
    cross = zero
    moment = zero
    drift = zero
    if partials is not None:
        cross = tl.load(sums + at, mask=inside, other=0.0)
        if MOMENT:
            moment = tl.load(sums + 2 * line + at, mask=inside, other=0.0)
        if DRIFT:
            drift = tl.load(sums + (FIELDS - 1) * line + at, mask=inside, other=0.0)
    elif given_reference_drift is not None:
        drift = tl.load(given_reference_drift + at, mask=inside, other=0.0)
    square = _squares(sums, partials, given_drift, at, rows, zero)
    s, k, t = step
    p, q, e, r = row_statistics(cross, square, moment, drift, numel, k, MEAN_FORM)
    weight = zero + 1.0
    if row_weights is not None:
        weight = tl.load(row_weights + at, mask=inside, other=0.0)
    return Row(p, q, e, r, s, k, t, tl.load(advantages + at, mask=inside, other=0.0), weight)


@triton.jit
def _clamped(value, bound):
    """NaN stays NaN."""
    return tl.where(value > bound, bound, tl.where(value < -bound, -bound, value))


@triton.jit
def _evaluate_row(
    row,
    log_ratio,  # given, or None
    old_log_prob,  # or None
    bias,  # of the batch, or None
    numel,
    numbers,
    DECIDE: tl.constexpr,
    PENALTY: tl.constexpr,
    NORMALIZED: tl.constexpr,
    TRUST_REGION: tl.constexpr,
    SUM_REDUCE: tl.constexpr,
    UNNORMALIZED: tl.constexpr,
    REFERENCE_WITHOUT_DT: tl.constexpr,
):
    """Results and extras of a block of rows."""
    # TrustRegion and LOG_SQRT_2PI of objectives.py. Not of the module: Triton compares what a kernel takes from there
    # whenever it binds arguments.
    REGION_MEAN_DRIFT: tl.constexpr = 1
    REGION_VELOCITY_DRIFT: tl.constexpr = 2
    LOG_SQRT_2PI: tl.constexpr = 0.9189385332046727
    std = row.std
    zero = tl.zeros_like(std)
    one = zero + 1.0
    count = one
    if SUM_REDUCE:
        count = one * numel.to(std.dtype)
    half_count = 0.5 * count
    advantage = _clamped(row.advantage, numbers.advantage_clip)

    # log-ratio and its slopes against P and Q
    slope = count
    if UNNORMALIZED:
        slope = count * 2.0 * (std * std)
    slope_p = slope
    slope_q = -0.5 * slope
    if log_ratio is not None:
        slope_p = one
        slope_q = zero
    elif old_log_prob is None:
        log_ratio = slope * (row.p - 0.5 * row.q)
    else:
        log_ratio = -0.5 * slope * (row.e - 2.0 * row.p + row.q)
        if not UNNORMALIZED:
            log_ratio -= count * (log(std) + LOG_SQRT_2PI)
        log_ratio -= count * old_log_prob
    if TRUST_REGION == REGION_MEAN_DRIFT:
        slope_kl = half_count * (std * std)
        kl = slope_kl * row.q
    elif TRUST_REGION == REGION_VELOCITY_DRIFT:
        slope_kl = divide(count, row.scale * row.scale)
        kl = divide(count * row.q, row.scale * row.scale)
    else:
        slope_kl = half_count
        kl = half_count * row.q

    # exponent of the ratio, its slopes, and what the loss is multiplied by
    exponent = log_ratio
    gain = one
    if NORMALIZED:
        gain = divide(one, row.neg_dt)
        slope_p *= std
        if bias is None:
            exponent = (log_ratio + half_count * row.q) * std
            slope_q = (slope_q + half_count) * std
        else:
            exponent = (log_ratio + bias) * std
            slope_q *= std

    # decisions use r - 1 and the sign of the exponent: exp() rounds what differs from 1 by less than an ulp to 1
    ratio, excess = exp_and_expm1(exponent)
    far = kl >= numbers.threshold
    above = excess > numbers.clip_high
    below = -excess > numbers.clip_low
    limit = tl.where(advantage > 0, 1.0 + numbers.clip_high, 1.0 - numbers.clip_low)
    values = RowValues(row.p, row.q, std, advantage, exponent, ratio, kl, far, above, below, limit, numbers.threshold)
    dropped, bound, surrogate, slope_x = DECIDE(values)
    outer = row.weight * gain
    policy = outer * tl.where(dropped, bound, surrogate)
    # where() keeps an overflowed ratio out of dropped rows
    slope_x = outer * tl.where(dropped, 0.0, slope_x)
    grad_p = tl.where(dropped, 0.0, slope_x * slope_p)
    grad_q = tl.where(dropped, 0.0, slope_x * slope_q)
    if PENALTY is not None:
        penalty, slope_penalty = PENALTY(values)
        policy += outer * penalty
        grad_q += outer * slope_penalty * slope_kl

    reference_slope = half_count
    if REFERENCE_WITHOUT_DT:
        reference_slope *= row.neg_dt
    reference = reference_slope * row.r
    # a weight of 0 must not turn a non-finite reference term into NaN
    kl_weight = numbers.kl_weight
    loss = policy + tl.where(kl_weight > 0, row.weight * kl_weight * reference, 0.0)
    grad_r = tl.where(kl_weight > 0, row.weight * kl_weight * reference_slope, 0.0)
    results = RowResults(
        log_ratio=log_ratio, ratio=ratio, kl=kl, kept=tl.where(dropped, zero, one), loss=loss,
        grad_p=grad_p, grad_q=grad_q, grad_r=grad_r,
    )  # fmt: skip
    extras = Extras(policy, reference, std * std * row.q, excess, slope_x * std, far, above, below, dropped, advantage)
    return results, extras


@triton.jit
def _empty_totals(zero):
    return Totals(
        zero, zero, zero, zero, zero, zero, zero, zero, zero, zero, zero, zero, zero, zero, zero, zero, zero, zero,
        zero + float("inf"), zero + float("-inf"), zero + float("-inf"), zero, zero,
    )  # fmt: skip


@triton.jit
def _counted(total, flags, inside):
    """``total`` plus the flags of the rows inside, in ``total``'s dtype."""
    return total + (flags & inside).to(total.dtype)


@triton.jit
def _add_row(t, row, more, inside):
    """Totals with a block of rows."""
    # abs(x) < inf is false for NaN, too
    infinity: tl.constexpr = float("inf")
    finite = (tl.abs(row.log_ratio) < infinity) & (row.ratio < infinity)
    finite = finite & (tl.abs(row.kl) < infinity) & (tl.abs(row.loss) < infinity)
    rows = tl.where(inside, t.rows + 1.0, t.rows)
    step_to_mean = divide(more.excess - t.excess_mean, tl.where(inside, rows, 1.0))
    distance = more.excess - t.excess_mean
    excess_mean = tl.where(inside, t.excess_mean + step_to_mean, t.excess_mean)
    return Totals(
        rows=rows,
        loss=t.loss + tl.where(inside, row.loss, 0.0),
        policy=t.policy + tl.where(inside, more.policy, 0.0),
        log_ratio_squares=t.log_ratio_squares + tl.where(inside, row.log_ratio * row.log_ratio, 0.0),
        kl=t.kl + tl.where(inside, row.kl, 0.0),
        drift=t.drift + tl.where(inside, more.drift, 0.0),
        reference=t.reference + tl.where(inside, more.reference, 0.0),
        far=_counted(t.far, more.far, inside),
        positive_removed=_counted(t.positive_removed, more.dropped & (more.advantage > 0), inside),
        negative_removed=_counted(t.negative_removed, more.dropped & (more.advantage < 0), inside),
        dropped=_counted(t.dropped, more.dropped, inside),
        above=_counted(t.above, more.above, inside),
        below=_counted(t.below, more.below, inside),
        clipped=_counted(t.clipped, more.above | more.below, inside),
        nonfinite=_counted(t.nonfinite, finite == 0, inside),
        coupling=t.coupling + tl.where(inside, more.coupling, 0.0),
        excess_mean=excess_mean,
        excess_squares=t.excess_squares + tl.where(inside, distance * (more.excess - excess_mean), 0.0),
        ratio_min=tl.where(inside, tl.minimum(t.ratio_min, row.ratio), t.ratio_min),
        ratio_max=tl.where(inside, tl.maximum(t.ratio_max, row.ratio), t.ratio_max),
        kl_max=tl.where(inside, tl.maximum(t.kl_max, row.kl), t.kl_max),
        ratio_nans=_counted(t.ratio_nans, row.ratio != row.ratio, inside),
        kl_nans=_counted(t.kl_nans, row.kl != row.kl, inside),
    )


@triton.jit
def _mean(total, count):
    return divide(tl.sum(total, axis=0), count)


@triton.jit
def _write_summary(summary, loss_out, t, rows):
    """Folds the lanes of the totals."""
    count = tl.full((), 1.0, t.rows.dtype) * rows.to(t.rows.dtype)
    nan = tl.full((), float("nan"), t.rows.dtype)
    mean_excess = divide(tl.sum(t.rows * t.excess_mean, axis=0), count)
    distance = tl.where(t.rows > 0, t.excess_mean - mean_excess, 0.0)
    squares = tl.sum(t.excess_squares + t.rows * (distance * distance), axis=0)
    spread = tl.sqrt(divide(squares, tl.maximum(count - 1.0, 1.0)))
    ratio_nans = tl.sum(t.ratio_nans, axis=0)
    dropped = tl.sum(t.dropped, axis=0)
    loss = _mean(t.loss, count)
    tl.store(loss_out, loss)
    values = Summary(
        loss=loss,
        policy_loss=_mean(t.policy, count),
        ratio_mean=1.0 + mean_excess,
        ratio_std=tl.where(rows > 1, spread, 0.0),
        ratio_min=tl.where(ratio_nans > 0, nan, tl.min(t.ratio_min, axis=0)),
        ratio_max=tl.where(ratio_nans > 0, nan, tl.max(t.ratio_max, axis=0)),
        approx_kl=0.5 * _mean(t.log_ratio_squares, count),
        kl_new_old_mean=_mean(t.kl, count),
        kl_new_old_max=tl.where(tl.sum(t.kl_nans, axis=0) > 0, nan, tl.max(t.kl_max, axis=0)),
        kl_mask_fraction=_mean(t.far, count),
        pos_rm_fraction=_mean(t.positive_removed, count),
        neg_rm_fraction=_mean(t.negative_removed, count),
        masked_fraction=divide(dropped, count),
        unmasked_fraction=divide(count - dropped, count),
        drift_mean=_mean(t.drift, count),
        nonfinite_rows=tl.sum(t.nonfinite, axis=0),
        clipfrac=_mean(t.clipped, count),
        clipfrac_gt_one=_mean(t.above, count),
        clipfrac_lt_one=_mean(t.below, count),
        kl_ref_mean=_mean(t.reference, count),
    )
    for i in tl.static_range(len(values)):
        tl.store(summary + i, values[i])


@triton.jit(do_not_specialize=["rows", "splits", "numel"])
def epilogue_kernel(
    advantages,
    partials,  # [FIELDS, rows, splits], and room for [FIELDS, rows] behind it; None: the next three stand in for it
    log_prob,  # [rows], with old_log_prob
    given_drift,  # [rows] or None, sums over rows of one element
    given_reference_drift,
    step,
    row_weights,
    old_log_prob,
    loss_out,  # []
    rows_out,  # [len(RowField), rows]
    summary,  # [len(SUMMARY)]
    option_table,  # the last five numbers as float64, or None
    std,
    scale,
    neg_dt,
    threshold,
    clip_low,
    clip_high,
    advantage_clip,
    kl_weight,
    rows,
    splits,
    numel,
    DECIDE: tl.constexpr,  # of rules.py, compiled
    PENALTY: tl.constexpr,
    NORMALIZED: tl.constexpr,
    TRUST_REGION: tl.constexpr,
    SUM_REDUCE: tl.constexpr,
    UNNORMALIZED: tl.constexpr,
    BATCH_BIAS: tl.constexpr,
    REFERENCE_WITHOUT_DT: tl.constexpr,
    COLUMNS: tl.constexpr,
    MEAN_FORM: tl.constexpr,
    DRIFT: tl.constexpr,  # of the partials
    FIELDS: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
    ROW_BLOCKS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_ROW_BLOCKS: tl.constexpr,
    SPLIT_BLOCK: tl.constexpr,
    SPLIT_BLOCKS: tl.constexpr,
):
    dtype: tl.constexpr = advantages.dtype.element_ty
    LINE_GRAD_Q: tl.constexpr = 6
    numbers = _numbers(option_table, threshold, clip_low, clip_high, advantage_clip, kl_weight, dtype)
    zero = tl.full((ROW_BLOCK,), 0.0, dtype)
    one = zero + 1.0
    line = rows.to(tl.int64)
    if partials is None:
        sums = advantages  # of its type; not looked at
    else:
        sums = _sum_rows(partials, rows, splits, FIELDS, TILE_ROWS, TILE_ROW_BLOCKS, SPLIT_BLOCK, SPLIT_BLOCKS)

    half_count = 0.5 * one
    if SUM_REDUCE:
        half_count = 0.5 * (one * numel.to(dtype))
    bias = None
    if BATCH_BIAS:
        total = zero
        for block in range(ROW_BLOCKS):
            at = tl.arange(0, ROW_BLOCK) + block * ROW_BLOCK
            _, k, _ = training_step(step, std, scale, neg_dt, at, rows, dtype, ROW_BLOCK, COLUMNS, MEAN_FORM)
            square = _squares(sums, partials, given_drift, at, rows, zero)
            total += half_count * (divide(square, one * numel.to(dtype)) * k * k)
        bias = one * divide(tl.sum(total, axis=0), rows.to(dtype))

    totals = _empty_totals(zero)
    for block in range(ROW_BLOCKS):
        at = tl.arange(0, ROW_BLOCK) + block * ROW_BLOCK
        inside = at < rows
        old = None
        log_ratio = None
        if old_log_prob is not None:
            old = tl.load(old_log_prob + at, mask=inside, other=0.0)
        if partials is None:
            log_ratio = tl.load(log_prob + at, mask=inside, other=0.0) - old
        numbers_of_step = training_step(step, std, scale, neg_dt, at, rows, dtype, ROW_BLOCK, COLUMNS, MEAN_FORM)
        row = _read_row(
            advantages, row_weights, sums, partials, given_drift, given_reference_drift, numbers_of_step,
            at, rows, numel, zero, MEAN_FORM, old_log_prob is not None, DRIFT, FIELDS,
        )  # fmt: skip
        results, extras = _evaluate_row(
            row, log_ratio, old, bias, numel, numbers,
            DECIDE, PENALTY, NORMALIZED, TRUST_REGION, SUM_REDUCE, UNNORMALIZED, REFERENCE_WITHOUT_DT,
        )  # fmt: skip
        for i in tl.static_range(len(results)):
            tl.store(rows_out + i * line + at, results[i], mask=inside)
        totals = _add_row(totals, results, extras, inside)

    if BATCH_BIAS:
        # the shared bias moves with every row's Q
        shared = divide(half_count * tl.sum(totals.coupling, axis=0), one * rows.to(dtype))
        # this program's own stores are read back
        tl.debug_barrier()
        for block in range(ROW_BLOCKS):
            at = tl.arange(0, ROW_BLOCK) + block * ROW_BLOCK
            out = rows_out + LINE_GRAD_Q * line + at
            grad_q = tl.load(out, mask=at < rows, other=0.0)
            # where a row is in several lanes all of them read it and one stores it
            tl.debug_barrier()
            tl.store(out, grad_q + shared, mask=at < rows)
    _write_summary(summary, loss_out, totals, rows)


def _compiled(function):
    """A rule's function as Triton takes it."""
    if function is None:
        return None
    if isinstance(epilogue_kernel, triton.JITFunction):
        return triton.jit(function)
    # the interpreter looks for triton.language among a function's globals
    seeing = {**function.__globals__, "tl": tl}
    return triton.jit(
        types.FunctionType(function.__code__, seeing, function.__name__, function.__defaults__, function.__closure__)
    )


@functools.cache
def rule_constants(number: int) -> tuple[Any, Any, bool]:
    """What the kernel takes of a rule: ``DECIDE, PENALTY, NORMALIZED``."""
    rule = RULES[number]
    return _compiled(rule.decide), _compiled(rule.penalty), rule.normalized


# unfused, so that decisions see the reference's roundings
_launch_kernel = Launcher(epilogue_kernel, fp_fusion=False)


@takes_rows
def policy_loss(
    source: RowSource,
    advantages: Tensor,
    row_weights: Tensor | None,
    old_log_prob: Tensor | None,
    ints: list[int],
    floats: list[float],
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`flowdppo_fast.reference.policy_loss` in two launches."""
    rows0, rows1, numel = source.new.shape
    rows = rows0 * rows1
    if rows == 0:
        return _nothing(advantages)
    with on_device(source.new):
        return _launch_epilogue(
            launch_partials(source, old_log_prob is not None, advantages), None, None, None,
            source.step, source.step_values, advantages, row_weights, old_log_prob, ints, floats,
            numel, splits=cut(rows, numel).splits, mean_form=source.form == MEAN, drift=source.reference is not None,
        )  # fmt: skip


def log_prob_loss(
    log_prob: Tensor,
    old_log_prob: Tensor,
    drift: Tensor | None,
    reference_drift: Tensor | None,
    step: Tensor | None,
    step_values: list[float],
    advantages: Tensor,
    row_weights: Tensor | None,
    ints: list[int],
    floats: list[float],
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`flowdppo_fast.reference.log_prob_loss` in one launch."""
    if log_prob.shape[0] == 0:
        return _nothing(advantages)
    with on_device(log_prob):
        return _launch_epilogue(
            None, log_prob, drift, reference_drift, step, step_values, advantages, row_weights, old_log_prob,
            ints, floats, 1, splits=1, mean_form=True, drift=False,
        )  # fmt: skip


def _nothing(like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """No rows: no loss, nothing to count, and no statistics to report."""
    summary = like.new_full((_SUMMARIES,), float("nan"))
    summary[[SUMMARY.index(name) for name in ("loss", "policy_loss", "nonfinite_rows")]] = 0.0
    return like.new_zeros(()), like.new_empty((_ROW_FIELDS, 0)), summary


def _launch_epilogue(
    partials: Tensor | None,
    log_prob: Tensor | None,
    given_drift: Tensor | None,
    given_reference_drift: Tensor | None,
    step: Tensor | None,
    step_values: list[float],
    advantages: Tensor,
    row_weights: Tensor | None,
    old_log_prob: Tensor | None,
    ints: list[int],
    floats: list[float],
    numel: int,
    *,
    splits: int,
    mean_form: bool,
    drift: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    # advantages are in the accumulation dtype
    rows = advantages.shape[0]
    loss, summary = advantages.new_empty(()), advantages.new_empty(_SUMMARIES)
    row_results = advantages.new_empty((_ROW_FIELDS, rows))
    step, values = step_arguments(step, step_values, rows, loss)
    numbers, options = floats, None
    if advantages.dtype == torch.float64:
        # like step_arguments(): python floats reach kernels as float32
        numbers, options = _NO_NUMBERS, advantages.new_tensor(floats)
    tiles, row_block, row_blocks, num_warps = epilogue_tiles(rows, splits)
    kind = (
        *ints[1:], 0 if step is None else step.shape[1], mean_form, drift, 2 + (old_log_prob is not None) + drift,
        row_block, row_blocks, tiles.row_block, tiles.row_blocks, tiles.split_block, tiles.split_blocks,
    )  # fmt: skip
    _launch_kernel(
        1, num_warps,
        (
            advantages, partials, log_prob, given_drift, given_reference_drift, step, row_weights, old_log_prob,
            loss, row_results, summary, options,
        ),
        (*values, *numbers),
        (rows, splits, numel),
        (),
        (*rule_constants(ints[0]), *kind),
        (ints[0], *kind),
    )  # fmt: skip
    return loss, row_results, summary


@takes_rows
def policy_loss_and_grad(
    source: RowSource,
    advantages: Tensor,
    row_weights: Tensor | None,
    old_log_prob: Tensor | None,
    ints: list[int],
    floats: list[float],
    factor: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`flowdppo_fast.reference.policy_loss_and_grad` in three launches."""
    loss, rows, summary = policy_loss(*source, advantages, row_weights, old_log_prob, ints, floats)
    return loss, rows, summary, launch_gradient(source, rows[RowField.GRAD_P :], None, factor)
