"""Losses of objectives: the pass over the latents, then the epilogue, then, in one call, the gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..objectives import SUMMARY, RowField
from ..rows import RowSource, takes_rows
from .epilogue import epilogue_kernel, rule_constants
from .gradient import launch_gradient
from .launch import (
    MATCHING,
    MEAN,
    Geometry,
    Kind,
    Launcher,
    epilogue_tiles,
    geometry_at,
    geometry_of,
    step_arguments,
)
from .statistics import launch_partials

_ROW_FIELDS, _SUMMARIES = len(RowField), len(SUMMARY)
_NO_NUMBERS = (None,) * 6

# unfused, so that decisions see the reference's roundings
_launch_kernel = Launcher(epilogue_kernel, fp_fusion=False, waits=True)


def launch_policy_loss(
    source: RowSource,
    geometry: Geometry,
    advantages: Tensor,
    row_weights: Tensor | None,
    old_log_prob: Tensor | None,
    ints: list[int],
    floats: list[float],
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`policy_loss` of latents in any shape in which rows lie like ``geometry``'s."""
    if geometry.rows == 0:
        return _nothing(advantages)
    partials = launch_partials(source, geometry, old_log_prob is not None, advantages)
    apart = source.reference is not None and source.form != MATCHING
    return _launch_epilogue(
        geometry, source.form == MEAN, apart, (advantages, partials, None, None, None),
        source.step, source.step_values, row_weights, old_log_prob, ints, floats,
    )  # fmt: skip


def launch_policy_loss_and_grad(
    source: RowSource, geometry: Geometry, shape: torch.Size, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`policy_loss_and_grad` likewise; the gradient is contiguous in ``shape``."""
    *objective, factor = arguments
    loss, rows, summary = launch_policy_loss(source, geometry, *objective)
    return loss, rows, summary, launch_gradient(source, geometry, rows, None, factor, shape)


@takes_rows
def policy_loss(source: RowSource, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`flowdppo_fast.reference.policy_loss` in two launches."""
    return launch_policy_loss(source, geometry_of(source), *arguments)


@takes_rows
def policy_loss_and_grad(source: RowSource, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`flowdppo_fast.reference.policy_loss_and_grad` in three launches."""
    return launch_policy_loss_and_grad(source, geometry_of(source), source.new.shape, *arguments)


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
    # sums over rows of one element
    geometry = geometry_at(log_prob.shape[0], 1, 1)
    if geometry.rows == 0:
        return _nothing(advantages)
    return _launch_epilogue(
        geometry, True, False, (advantages, None, log_prob, drift, reference_drift), step, step_values,
        row_weights, old_log_prob, ints, floats,
    )  # fmt: skip


def _nothing(like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """No rows: no loss, nothing to count, and no statistics to report."""
    summary = like.new_full((_SUMMARIES,), float("nan"))
    summary[[SUMMARY.index(name) for name in ("loss", "policy_loss", "nonfinite_rows")]] = 0.0
    return like.new_zeros(()), like.new_empty((_ROW_FIELDS, 0)), summary


def _launch_epilogue(
    geometry: Geometry,
    mean_form: bool,
    reference: bool,
    given: tuple[Tensor | None, ...],
    step: Tensor | None,
    step_values: list[float],
    row_weights: Tensor | None,
    old_log_prob: Tensor | None,
    ints: list[int],
    floats: list[float],
) -> tuple[Tensor, Tensor, Tensor]:
    advantages = given[0]
    assert advantages is not None
    # advantages are in the accumulation dtype
    loss, summary = advantages.new_empty(()), advantages.new_empty(_SUMMARIES)
    row_results = advantages.new_empty((_ROW_FIELDS, geometry.rows))
    step, values = step_arguments(step, step_values, geometry.rows, loss)
    numbers, options = floats, None
    if advantages.dtype == torch.float64:
        # like step_arguments(): python floats reach kernels as float32
        numbers, options = _NO_NUMBERS, advantages.new_tensor(floats)
    columns = 0 if step is None else step.shape[1]
    all_weights = row_weights is not None and row_weights.dim() == 2
    of = ("epilogue", mean_form, reference, old_log_prob is not None, columns, options is None, all_weights, *ints)
    kind = geometry.prepared.get(of)
    if kind is None:
        rows, splits = geometry.rows, geometry.cut.splits
        tiles, row_block, row_blocks, num_warps = epilogue_tiles(rows, splits)
        kind = geometry.prepared[of] = Kind(
            1, num_warps, (rows, splits, geometry.numel),
            (
                *rule_constants(ints[0]), *ints[1:], columns, mean_form, all_weights, reference,
                2 + (old_log_prob is not None) + reference, row_block, row_blocks,
                tiles.row_block, tiles.row_blocks, tiles.split_block, tiles.split_blocks,
            ),
            # float64 has its tables made between the two launches
            overlaps=given[1] is not None and options is None,
        )  # fmt: skip
    _launch_kernel(
        kind, (*given, step, row_weights, old_log_prob, loss, row_results, summary, options), (*values, *numbers)
    )
    return loss, row_results, summary
