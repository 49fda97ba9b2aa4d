"""What the epilogue reports: results by name, running metrics, and the summary that they are folded into."""

from __future__ import annotations

from collections import namedtuple
from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..objectives import SUMMARY, RowField
from .elementary import divide

# results by name, in the order in which they are stored
RowResults = namedtuple("RowResults", [field.name.lower() for field in RowField])
Summary = namedtuple("Summary", SUMMARY)  # type: ignore[misc]


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
def empty_totals(zero):
    return Totals(
        zero, zero, zero, zero, zero, zero, zero, zero, zero, zero, zero, zero, zero, zero, zero, zero, zero, zero,
        zero + float("inf"), zero + float("-inf"), zero + float("-inf"), zero, zero,
    )  # fmt: skip


@triton.jit
def _counted(total, flags, inside):
    """``total`` plus the flags of the rows inside, in ``total``'s dtype."""
    return total + (flags & inside).to(total.dtype)


@triton.jit
def add_row(t, row, more, inside):
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
def write_summary(summary, loss_out, t, rows):
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
