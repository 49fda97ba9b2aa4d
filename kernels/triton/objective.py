"""Losses of objectives: the pass over the latents, then the epilogue, then, in one call, the gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from flowdppo_fast.kernels.epilogue import epilogue_kernel, rule_constants
from flowdppo_fast.kernels.gradient import launch_gradient
from flowdppo_fast.kernels.launch import MEAN, Launcher, cut, epilogue_tiles, on_device, step_arguments
from flowdppo_fast.kernels.statistics import launch_partials
from flowdppo_fast.objectives import SUMMARY, RowField
from flowdppo_fast.rows import RowSource, takes_rows

_ROW_FIELDS, _SUMMARIES = len(RowField), len(SUMMARY)
_NO_NUMBERS = (None,) * 5

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
            numel, splits=cut(rows, numel).splits, mean_form=source.form == MEAN,
            reference=source.reference is not None,
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
            ints, floats, 1, splits=1, mean_form=True, reference=False,
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
    reference: bool,
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
        *ints[1:], 0 if step is None else step.shape[1], mean_form, reference,
        2 + (old_log_prob is not None) + reference, row_block, row_blocks,
        tiles.row_block, tiles.row_blocks, tiles.split_block, tiles.split_blocks,
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
