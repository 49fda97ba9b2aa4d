"""The objectives' epilogue in one small program: the twin of :func:`flowdppo_fast.epilogue.epilogue`.

A single program adds up the rows' partials, then walks the rows in blocks: applies the objective and keeps running
metrics, lane by lane, which it folds at the end. Rows are few, so one launch counts for more than its parallelism.
"""

from __future__ import annotations

import functools
import types
from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..rules import RULES, RowValues
from .elementary import divide, exp_and_expm1, log
from .rows import row_statistics, row_sums, training_step
from .summary import Extras, RowResults, add_row, empty_totals, write_summary


class Numbers(NamedTuple):
    """The options' numbers, in the order of ``EpilogueOptions.floats``."""

    threshold: Any
    clip_low: Any
    clip_high: Any
    advantage_clip: Any
    kl_weight: Any
    strength: Any


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
    of_threshold: Any
    of_penalty: Any
    of_reference: Any


@triton.jit
def _number(value, table, index: tl.constexpr, dtype: tl.constexpr):
    """A scalar option in ``dtype``: the launch argument, or an entry of the float64 table."""
    if table is None:
        number = tl.full((), value, dtype)
    else:
        number = tl.load(table + index)
    return number


@triton.jit
def _numbers(table, threshold, clip_low, clip_high, advantage_clip, kl_weight, strength, dtype: tl.constexpr):
    return Numbers(
        _number(threshold, table, 0, dtype),
        _number(clip_low, table, 1, dtype),
        _number(clip_high, table, 2, dtype),
        _number(advantage_clip, table, 3, dtype),
        _number(kl_weight, table, 4, dtype),
        _number(strength, table, 5, dtype),
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
def _read_inputs(
    advantages,
    row_weights,
    old_log_prob,
    step,
    std,
    scale,
    neg_dt,
    at,
    rows,
    zero,
    COLUMNS: tl.constexpr,
    MEAN_FORM: tl.constexpr,
    ALL_WEIGHTS: tl.constexpr,
):
    """Of a block of rows what their partials have no part in: ``S, k, -dt``, advantage, old log-prob, weights."""
    inside = at < rows
    s, k, t = training_step(step, std, scale, neg_dt, at, rows, zero.dtype, zero.shape[0], COLUMNS, MEAN_FORM)
    weight = zero + 1.0
    of_threshold = weight
    of_penalty = weight
    of_reference = weight
    if row_weights is not None:
        weight = tl.load(row_weights + at, mask=inside, other=0.0)
        if ALL_WEIGHTS:
            line = rows.to(tl.int64)
            of_threshold = tl.load(row_weights + line + at, mask=inside, other=1.0)
            of_penalty = tl.load(row_weights + 2 * line + at, mask=inside, other=1.0)
            of_reference = tl.load(row_weights + 3 * line + at, mask=inside, other=1.0)
    old = zero
    if old_log_prob is not None:
        old = tl.load(old_log_prob + at, mask=inside, other=0.0)
    advantage = tl.load(advantages + at, mask=inside, other=0.0)
    return s, k, t, advantage, old, weight, of_threshold, of_penalty, of_reference


@triton.jit
def _read_row(
    inputs,
    sums,
    partials,
    given_drift,
    given_reference_drift,
    at,
    rows,
    numel,
    zero,
    MEAN_FORM: tl.constexpr,
    MOMENT: tl.constexpr,
    REFERENCE: tl.constexpr,
    FIELDS: tl.constexpr,
):
    """A block of rows from their sums."""
    inside = at < rows
    line = rows.to(tl.int64)
    cross = zero
    moment = zero
    apart = zero
    if partials is not None:
        cross = tl.load(sums + at, mask=inside, other=0.0)
        if MOMENT:
            moment = tl.load(sums + 2 * line + at, mask=inside, other=0.0)
        if REFERENCE:
            apart = tl.load(sums + (FIELDS - 1) * line + at, mask=inside, other=0.0)
    elif given_reference_drift is not None:
        apart = tl.load(given_reference_drift + at, mask=inside, other=0.0)
    square = _squares(sums, partials, given_drift, at, rows, zero)
    std, scale, neg_dt, advantage, _, weight, of_threshold, of_penalty, of_reference = inputs
    p, q, e, r = row_statistics(cross, square, moment, apart, numel, scale, MEAN_FORM)
    return Row(p, q, e, r, std, scale, neg_dt, advantage, weight, of_threshold, of_penalty, of_reference)


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
    ALL_WEIGHTS: tl.constexpr,
):
    """Results and extras of a block of rows."""
    # TrustRegion of objectives.py, LOG_SQRT_2PI of epilogue.py. Not of the module: Triton compares what a kernel takes
    # from there whenever it binds arguments.
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
    threshold = numbers.threshold
    strength = numbers.strength
    kl_weight = numbers.kl_weight
    if ALL_WEIGHTS:
        threshold *= row.of_threshold
        strength *= row.of_penalty
    far = kl >= threshold
    above = excess > numbers.clip_high
    below = -excess > numbers.clip_low
    limit = tl.where(advantage > 0, 1.0 + numbers.clip_high, 1.0 - numbers.clip_low)
    values = RowValues(
        row.p, row.q, std, advantage, exponent, ratio, kl, far, above, below, limit, threshold,
        tl.abs(advantage), excess, numbers.clip_high, strength,
    )  # fmt: skip
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
    asked = kl_weight > 0
    if ALL_WEIGHTS:
        kl_weight *= row.of_reference
    loss = policy + tl.where(asked, row.weight * kl_weight * reference, 0.0)
    grad_r = tl.where(asked, row.weight * kl_weight * reference_slope, 0.0)
    results = RowResults(
        log_ratio=log_ratio, ratio=ratio, kl=kl, kept=tl.where(dropped, zero, one), loss=loss,
        grad_p=grad_p, grad_q=grad_q, grad_r=grad_r,
    )  # fmt: skip
    extras = Extras(policy, reference, std * std * row.q, excess, slope_x * std, far, above, below, dropped, advantage)
    return results, extras


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
    option_table,  # the last six numbers as float64, or None
    std,
    scale,
    neg_dt,
    threshold,
    clip_low,
    clip_high,
    advantage_clip,
    kl_weight,
    strength,
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
    ALL_WEIGHTS: tl.constexpr,  # row_weights has four lines
    REFERENCE: tl.constexpr,  # of the partials
    FIELDS: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
    ROW_BLOCKS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_ROW_BLOCKS: tl.constexpr,
    SPLIT_BLOCK: tl.constexpr,
    SPLIT_BLOCKS: tl.constexpr,
    OVERLAPS: tl.constexpr,  # with the launch ahead, which makes the partials
):
    dtype: tl.constexpr = advantages.dtype.element_ty
    LINE_GRAD_Q: tl.constexpr = 6
    numbers = _numbers(option_table, threshold, clip_low, clip_high, advantage_clip, kl_weight, strength, dtype)
    zero = tl.full((ROW_BLOCK,), 0.0, dtype)
    one = zero + 1.0
    line = rows.to(tl.int64)
    # sent for before the partials are there; for more than a block of rows it would take registers
    first = _read_inputs(
        advantages, row_weights, old_log_prob, step, std, scale, neg_dt, tl.arange(0, ROW_BLOCK), rows, zero,
        COLUMNS, MEAN_FORM, ALL_WEIGHTS,
    )  # fmt: skip
    if OVERLAPS:
        tl.extra.cuda.gdc_wait()
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

    totals = empty_totals(zero)
    for block in range(ROW_BLOCKS):
        at = tl.arange(0, ROW_BLOCK) + block * ROW_BLOCK
        inside = at < rows
        if ROW_BLOCKS == 1:
            inputs = first
        else:
            inputs = _read_inputs(
                advantages, row_weights, old_log_prob, step, std, scale, neg_dt, at, rows, zero,
                COLUMNS, MEAN_FORM, ALL_WEIGHTS,
            )  # fmt: skip
        old = None
        if old_log_prob is not None:
            old = inputs[4]
        log_ratio = None
        if partials is None:
            log_ratio = tl.load(log_prob + at, mask=inside, other=0.0) - old
        row = _read_row(
            inputs, sums, partials, given_drift, given_reference_drift, at, rows, numel, zero,
            MEAN_FORM, old_log_prob is not None, REFERENCE, FIELDS,
        )  # fmt: skip
        results, extras = _evaluate_row(
            row, log_ratio, old, bias, numel, numbers,
            DECIDE, PENALTY, NORMALIZED, TRUST_REGION, SUM_REDUCE, UNNORMALIZED, REFERENCE_WITHOUT_DT, ALL_WEIGHTS,
        )  # fmt: skip
        for i in tl.static_range(len(results)):
            tl.store(rows_out + i * line + at, results[i], mask=inside)
        totals = add_row(totals, results, extras, inside)

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
    write_summary(summary, loss_out, totals, rows)


def _compiled(function):
    """A rule's function as Triton takes it."""
    if function is None:
        return None
    if isinstance(epilogue_kernel, triton.JITFunction):
        return triton.jit(function)
    # the interpreter looks for triton.language among a function's globals; triton.jit would ask the environment again
    seeing = {**function.__globals__, "tl": tl}
    return type(epilogue_kernel)(
        types.FunctionType(function.__code__, seeing, function.__name__, function.__defaults__, function.__closure__)
    )


@functools.cache
def rule_constants(number: int) -> tuple[Any, Any, bool]:
    """What the kernel takes of a rule: ``DECIDE, PENALTY, NORMALIZED``."""
    rule = RULES[number]
    return _compiled(rule.decide), _compiled(rule.penalty), rule.normalized
