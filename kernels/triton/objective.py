"""The objectives' epilogue in one small program: the twin of :func:`flowdppo_fast.objectives.epilogue`.

A single program adds up the rows' partials, then walks the rows in blocks: applies the objective and keeps running
metrics, lane by lane, which it folds at the end. Rows are few, so one launch counts for more than its parallelism.
"""

from __future__ import annotations

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

_ROW_FIELDS, _SUMMARIES = len(RowField), len(SUMMARY)
_NO_NUMBERS = (None,) * 5


@triton.jit
def _number(value, table, index: tl.constexpr, dtype: tl.constexpr):
    """A scalar option in ``dtype``: the launch argument, or an entry of the float64 table."""
    if table is None:
        number = tl.full((), value, dtype)
    else:
        number = tl.load(table + index)
    return number


@triton.jit
def _add(total, flags, inside):
    """``total`` plus the flags of the rows inside, in ``total``'s dtype."""
    return total + (flags & inside).to(total.dtype)


@triton.jit
def _squares(sums, partials, given_drift, row, rows, zero):
    """The rows' sums of ``d*d``."""
    if partials is not None:
        square = tl.load(sums + row, mask=row < rows, other=0.0)
    elif given_drift is not None:
        square = tl.load(given_drift + row, mask=row < rows, other=0.0)
    else:
        square = zero
    return square


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
    RULE: tl.constexpr,
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
    # Rule, TrustRegion, RowField and LOG_SQRT_2PI of objectives.py. Not of the module: Triton compares what a kernel
    # takes from there at every launch.
    RULE_DPPO: tl.constexpr = 0
    RULE_DPPO_SYMMETRIC: tl.constexpr = 1
    RULE_GRPO_GUARD: tl.constexpr = 3
    RULE_UNCLIPPED: tl.constexpr = 4
    REGION_MEAN_DRIFT: tl.constexpr = 1
    REGION_VELOCITY_DRIFT: tl.constexpr = 2
    LINE_GRAD_Q: tl.constexpr = 6
    LOG_SQRT_2PI: tl.constexpr = 0.9189385332046727
    threshold = _number(threshold, option_table, 0, dtype)
    clip_low = _number(clip_low, option_table, 1, dtype)
    clip_high = _number(clip_high, option_table, 2, dtype)
    advantage_clip = _number(advantage_clip, option_table, 3, dtype)
    kl_weight = _number(kl_weight, option_table, 4, dtype)
    zero = tl.full((ROW_BLOCK,), 0.0, dtype)
    one = tl.full((ROW_BLOCK,), 1.0, dtype)
    count = one
    if SUM_REDUCE:
        count = one * numel.to(dtype)
    half_kl = 0.5 * count
    total_rows = tl.full((), 1.0, dtype) * rows.to(dtype)
    line = rows.to(tl.int64)

    if partials is None:
        sums = advantages  # of its type; not looked at
    elif SPLIT_BLOCK == 1:
        sums = partials
    else:
        # row sums go through memory: kept in registers they would keep the tiles' layout, many copies of every row,
        # through all of the arithmetic below
        sums = partials + FIELDS * line * splits
        for block in range(TILE_ROW_BLOCKS):
            row = tl.arange(0, TILE_ROWS) + block * TILE_ROWS
            first, second, third, fourth = row_sums(
                partials, row, rows, splits, FIELDS, TILE_ROWS, SPLIT_BLOCK, SPLIT_BLOCKS
            )
            tl.store(sums + row, first, mask=row < rows)
            tl.store(sums + line + row, second, mask=row < rows)
            if FIELDS > 2:
                tl.store(sums + 2 * line + row, third, mask=row < rows)
            if FIELDS > 3:
                tl.store(sums + 3 * line + row, fourth, mask=row < rows)
        tl.debug_barrier()

    bias = zero
    if BATCH_BIAS:
        for block in range(ROW_BLOCKS):
            row = tl.arange(0, ROW_BLOCK) + block * ROW_BLOCK
            _, k, _ = training_step(step, std, scale, neg_dt, row, rows, dtype, ROW_BLOCK, COLUMNS, MEAN_FORM)
            square = _squares(sums + line, partials, given_drift, row, rows, zero)
            bias += half_kl * (divide(square, one * numel.to(dtype)) * k * k)
        bias = one * divide(tl.sum(bias, axis=0), total_rows)

    # running metrics, one lane per row of a block; Welford's mean and squared distance for the spread of the ratio
    loss_sum, policy_sum, log_ratio_squares, kl_sum, drift_sum, reference_sum = zero, zero, zero, zero, zero, zero
    far_sum, positive_sum, negative_sum, dropped_sum, nonfinite_sum = zero, zero, zero, zero, zero
    outside_sum, above_sum, below_sum, slope_sum = zero, zero, zero, zero
    excess_mean, excess_squares, lane_rows = zero, zero, zero
    ratio_min = one * float("inf")
    ratio_max = one * float("-inf")
    kl_max = one * float("-inf")
    ratio_nans, kl_nans = zero, zero

    for block in range(ROW_BLOCKS):
        row = tl.arange(0, ROW_BLOCK) + block * ROW_BLOCK
        inside = row < rows
        s, k, t = training_step(step, std, scale, neg_dt, row, rows, dtype, ROW_BLOCK, COLUMNS, MEAN_FORM)
        square = _squares(sums + line, partials, given_drift, row, rows, zero)
        cross = zero
        moment = zero
        drift = zero
        if partials is None:
            if given_reference_drift is not None:
                drift = tl.load(given_reference_drift + row, mask=inside, other=0.0)
        else:
            cross = tl.load(sums + row, mask=inside, other=0.0)
            if old_log_prob is not None:
                moment = tl.load(sums + 2 * line + row, mask=inside, other=0.0)
            if DRIFT:
                drift = tl.load(sums + (FIELDS - 1) * line + row, mask=inside, other=0.0)
        p, q, e, r = row_statistics(cross, square, moment, drift, numel, k, MEAN_FORM)
        adv = tl.load(advantages + row, mask=inside, other=0.0)
        adv = tl.where(adv > advantage_clip, advantage_clip, tl.where(adv < -advantage_clip, -advantage_clip, adv))
        weight = one
        if row_weights is not None:
            weight = tl.load(row_weights + row, mask=inside, other=0.0)

        # log-ratio and its slopes against P and Q
        slope = count
        if UNNORMALIZED:
            slope = count * 2.0 * (s * s)
        slope_p, slope_q = slope, -0.5 * slope
        if partials is None:
            log_ratio = tl.load(log_prob + row, mask=inside, other=0.0)
            log_ratio -= tl.load(old_log_prob + row, mask=inside, other=0.0)
            slope_p, slope_q = one, zero
        elif old_log_prob is None:
            log_ratio = slope * (p - 0.5 * q)
        else:
            log_ratio = -0.5 * slope * (e - 2.0 * p + q)
            if not UNNORMALIZED:
                log_ratio -= count * (log(s) + LOG_SQRT_2PI)
            log_ratio -= count * tl.load(old_log_prob + row, mask=inside, other=0.0)
        if TRUST_REGION == REGION_MEAN_DRIFT:
            kl = half_kl * (s * s) * q
        elif TRUST_REGION == REGION_VELOCITY_DRIFT:
            kl = divide(count * q, k * k)
        else:
            kl = half_kl * q

        # exponent of the ratio, its slopes, and what the loss is multiplied by
        exponent, gain = log_ratio, one
        if RULE == RULE_GRPO_GUARD:
            gain = divide(one, t)
            slope_p *= s
            if BATCH_BIAS:
                exponent = (log_ratio + bias) * s
                slope_q *= s
            else:
                exponent = (log_ratio + half_kl * q) * s
                slope_q = (slope_q + half_kl) * s

        # decisions use r - 1 and the sign of the exponent: exp() rounds what differs from 1 by less than an ulp to 1
        ratio, excess = exp_and_expm1(exponent)
        far = kl >= threshold
        above = excess > clip_high
        below = -excess > clip_low
        bound = zero
        if RULE == RULE_DPPO:
            dropped = far & (((adv > 0) & (exponent > 0)) | ((adv < 0) & (exponent < 0)))
        elif RULE == RULE_DPPO_SYMMETRIC:
            dropped = far
        elif RULE == RULE_UNCLIPPED:
            dropped = row < 0
        else:
            dropped = ((adv > 0) & above) | ((adv < 0) & below)
            bound = -adv * tl.where(adv > 0, 1.0 + clip_high, 1.0 - clip_low)

        surrogate = -adv * ratio
        policy = weight * gain * tl.where(dropped, bound, surrogate)
        # where() keeps an overflowed ratio out of dropped rows
        slope_x = weight * gain * tl.where(dropped, 0.0, surrogate)
        grad_p = tl.where(dropped, 0.0, slope_x * slope_p)
        grad_q = tl.where(dropped, 0.0, slope_x * slope_q)

        reference_slope = count * 0.5
        if REFERENCE_WITHOUT_DT:
            reference_slope *= t
        reference = reference_slope * r
        # a weight of 0 must not turn a non-finite reference term into NaN
        loss = policy + tl.where(kl_weight > 0, weight * kl_weight * reference, 0.0)
        grad_r = tl.where(kl_weight > 0, weight * kl_weight * reference_slope, 0.0)

        out = rows_out + row
        tl.store(out, log_ratio, mask=inside)
        tl.store(out + line, ratio, mask=inside)
        tl.store(out + 2 * line, kl, mask=inside)
        tl.store(out + 3 * line, tl.where(dropped, zero, one), mask=inside)
        tl.store(out + 4 * line, loss, mask=inside)
        tl.store(out + 5 * line, grad_p, mask=inside)
        tl.store(out + 6 * line, grad_q, mask=inside)
        tl.store(out + 7 * line, grad_r, mask=inside)

        loss_sum += tl.where(inside, loss, 0.0)
        policy_sum += tl.where(inside, policy, 0.0)
        log_ratio_squares += tl.where(inside, log_ratio * log_ratio, 0.0)
        kl_sum += tl.where(inside, kl, 0.0)
        drift_sum += tl.where(inside, s * s * q, 0.0)
        reference_sum += tl.where(inside, reference, 0.0)
        slope_sum += tl.where(inside, slope_x * s, 0.0)
        far_sum = _add(far_sum, far, inside)
        positive_sum = _add(positive_sum, dropped & (adv > 0), inside)
        negative_sum = _add(negative_sum, dropped & (adv < 0), inside)
        dropped_sum = _add(dropped_sum, dropped, inside)
        outside_sum = _add(outside_sum, above | below, inside)
        above_sum = _add(above_sum, above, inside)
        below_sum = _add(below_sum, below, inside)
        # abs(x) < inf is false for NaN, too
        infinity: tl.constexpr = float("inf")
        finite = (tl.abs(log_ratio) < infinity) & (ratio < infinity)
        finite = finite & (tl.abs(kl) < infinity) & (tl.abs(loss) < infinity)
        nonfinite_sum = _add(nonfinite_sum, finite == 0, inside)
        ratio_nans = _add(ratio_nans, ratio != ratio, inside)
        kl_nans = _add(kl_nans, kl != kl, inside)
        ratio_min = tl.where(inside, tl.minimum(ratio_min, ratio), ratio_min)
        ratio_max = tl.where(inside, tl.maximum(ratio_max, ratio), ratio_max)
        kl_max = tl.where(inside, tl.maximum(kl_max, kl), kl_max)
        lane_rows = tl.where(inside, lane_rows + 1.0, lane_rows)
        step_to_mean = divide(excess - excess_mean, tl.where(inside, lane_rows, one))
        distance = excess - excess_mean
        excess_mean = tl.where(inside, excess_mean + step_to_mean, excess_mean)
        excess_squares += tl.where(inside, distance * (excess - excess_mean), 0.0)

    if BATCH_BIAS:
        # the shared bias moves with every row's Q
        shared = divide(half_kl * tl.sum(slope_sum, axis=0), one * total_rows)
        # this program's own stores are read back
        tl.debug_barrier()
        for block in range(ROW_BLOCKS):
            row = tl.arange(0, ROW_BLOCK) + block * ROW_BLOCK
            out = rows_out + LINE_GRAD_Q * line + row
            grad_q = tl.load(out, mask=row < rows, other=0.0)
            # where a row is in several lanes all of them read it and one stores it
            tl.debug_barrier()
            tl.store(out, grad_q + shared, mask=row < rows)

    mean_excess = divide(tl.sum(lane_rows * excess_mean, axis=0), total_rows)
    distance = tl.where(lane_rows > 0, excess_mean - mean_excess, 0.0)
    squares = tl.sum(excess_squares + lane_rows * (distance * distance), axis=0)
    spread = tl.sqrt(divide(squares, tl.maximum(total_rows - 1.0, 1.0)))
    nan = tl.full((), float("nan"), dtype)
    loss = divide(tl.sum(loss_sum, axis=0), total_rows)
    tl.store(loss_out, loss)
    # in the order of objectives.SUMMARY
    tl.store(summary, loss)
    tl.store(summary + 1, divide(tl.sum(policy_sum, axis=0), total_rows))
    tl.store(summary + 2, 1.0 + mean_excess)
    tl.store(summary + 3, tl.where(rows > 1, spread, 0.0))
    tl.store(summary + 4, tl.where(tl.sum(ratio_nans, axis=0) > 0, nan, tl.min(ratio_min, axis=0)))
    tl.store(summary + 5, tl.where(tl.sum(ratio_nans, axis=0) > 0, nan, tl.max(ratio_max, axis=0)))
    tl.store(summary + 6, 0.5 * divide(tl.sum(log_ratio_squares, axis=0), total_rows))
    tl.store(summary + 7, divide(tl.sum(kl_sum, axis=0), total_rows))
    tl.store(summary + 8, tl.where(tl.sum(kl_nans, axis=0) > 0, nan, tl.max(kl_max, axis=0)))
    tl.store(summary + 9, divide(tl.sum(far_sum, axis=0), total_rows))
    tl.store(summary + 10, divide(tl.sum(positive_sum, axis=0), total_rows))
    tl.store(summary + 11, divide(tl.sum(negative_sum, axis=0), total_rows))
    tl.store(summary + 12, divide(tl.sum(dropped_sum, axis=0), total_rows))
    tl.store(summary + 13, divide(total_rows - tl.sum(dropped_sum, axis=0), total_rows))
    tl.store(summary + 14, divide(tl.sum(drift_sum, axis=0), total_rows))
    tl.store(summary + 15, tl.sum(nonfinite_sum, axis=0))
    tl.store(summary + 16, divide(tl.sum(outside_sum, axis=0), total_rows))
    tl.store(summary + 17, divide(tl.sum(above_sum, axis=0), total_rows))
    tl.store(summary + 18, divide(tl.sum(below_sum, axis=0), total_rows))
    tl.store(summary + 19, divide(tl.sum(reference_sum, axis=0), total_rows))


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
    _launch_kernel(
        1, num_warps,
        (
            advantages, partials, log_prob, given_drift, given_reference_drift, step, row_weights, old_log_prob,
            loss, row_results, summary, options,
        ),
        (*values, *numbers),
        (rows, splits, numel),
        (),
        (
            *ints, 0 if step is None else step.shape[1], mean_form, drift, 2 + (old_log_prob is not None) + drift,
            row_block, row_blocks, tiles.row_block, tiles.row_blocks, tiles.split_block, tiles.split_blocks,
        ),
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
