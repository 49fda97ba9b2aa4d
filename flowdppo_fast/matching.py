"""The forward process: objectives on noised samples, whose residual is formed in the kernels and is never in memory.

With ``e = (noise - x0) - old_velocity`` and ``k = 1`` a row's ``P, Q, E`` are those of any other row. The matching loss
``mean((v - (noise - x0))**2)`` is ``E - 2*P + Q`` of the new velocity and ``E`` of the old one, so their difference, of
which AWM makes a ratio, is ``2*P - Q`` and subtracts no two losses.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import layout
from .autograd import RowCall, RowStatistics
from .backend import BackendName, resolve_backend
from .loss_call import check_call, check_seeded, run, settings_of, streams_of
from .noise import PhiloxNoise
from .objectives import GRPOGuard, Objective, Reduction
from .results import LossOutput
from .rows import Form, RowPlan, RowSource, plan_of
from .rules import RowValues
from .step_arguments import matching_step

_MATCHING = int(Form.MATCHING)


def matching_loss(
    velocity: Tensor,
    old_velocity: Tensor,
    x0: Tensor,
    noise: Tensor | PhiloxNoise,
    advantages: Tensor,
    *,
    objective: Objective | Callable[[RowValues], tuple],
    weight: float | Tensor = 1.0,
    advantage_clip: float | None = None,
    row_weights: Tensor | None = None,
    threshold_weights: Tensor | None = None,
    reduction: Reduction = "mean",
    single_pass: bool | None = None,
    backend: BackendName = "auto",
) -> LossOutput:
    """Any objective on the ratio of matching losses: AWM (arXiv 2509.25050) with :class:`RatioClip`, or another bound.

    The log-ratio of a row is ``weight * (mean((v_old - g)**2) - mean((v - g)**2))`` with ``g = noise - x0``, and its KL
    ``mean((v - v_old)**2)/2``. Both are means over latent elements.

    Args:
        velocity: ``[rows, *latent]`` new model output at ``(1-sigma)*x0 + sigma*noise``, float32, bfloat16, float16 or
            float64; the only argument that gets a gradient.
        old_velocity: same shape, the old policy's output there.
        x0: same shape, the samples.
        noise: same shape, the noise that they were noised with, or :class:`PhiloxNoise` to regenerate it.
        advantages: ``[B]`` or ``[B, S]``, floating point: one per row, and what says which leading dims are rows.
        objective: as of :func:`fused_policy_velocity_loss`, but for :class:`GRPOGuard`, which needs a sampler's step.
        weight: ``w(sigma)`` > 0, a number, or a tensor that broadcasts to the rows. Default 1: AWM's uniform weights.
        advantage_clip, row_weights, threshold_weights, reduction, single_pass, backend: as of
            :func:`fused_policy_velocity_loss`; ``"cuda"`` has no kernel for this.

    Returns:
        :class:`~flowdppo_fast.results.LossOutput`; ``loss`` is differentiable.

    Raises:
        ValueError, TypeError: an argument of wrong shape, dtype, device or value; the message names it.
        RuntimeError: the named backend cannot run here.
    """
    if isinstance(objective, GRPOGuard):
        raise ValueError("objective: got GRPOGuard, expected one without a sampler's step; use RatioClip")
    named = _named(velocity, old_velocity, x0, noise)
    plan = check_call(objective, named, advantages)
    settings = settings_of(
        objective, plan.numel, True, False, False, single_pass, reduction, "mean", "unnormalized", advantage_clip, 0.0,
        "gaussian",
    )  # fmt: skip
    source = _source(velocity, old_velocity, x0, noise, weight, plan)
    weights = (row_weights, threshold_weights, 0.0, "gaussian")
    return run(velocity, source, plan, settings, advantages, weights, None, reduction, single_pass, backend)


def matching_statistics(
    velocity: Tensor,
    old_velocity: Tensor,
    x0: Tensor,
    noise: Tensor | PhiloxNoise,
    *,
    row_dims: int = 1,
    backend: BackendName = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """``(P, Q, E)`` of noised samples, from which losses of single rows, pairs and groups are a few lines.

    The matching loss is ``E - 2*P + Q``, that of the old velocity ``E``.

    Args:
        velocity, old_velocity, x0, noise: as of :func:`matching_loss`.
        row_dims: how many leading dims are rows: 1 (default) or 2.
        backend: as for the losses. Default ``"auto"``.

    Returns:
        Shaped like the rows, float32 (float64 for float64 velocities); ``P`` and ``Q`` are differentiable in
        ``velocity``.

    Raises:
        ValueError, TypeError: an argument of wrong shape, dtype, device or value; the message names it.
        RuntimeError: the named backend cannot run here.
    """
    if not isinstance(velocity, torch.Tensor):
        raise TypeError(f"velocity: got {type(velocity).__name__}, expected a tensor")
    layout.check_row_dims(row_dims)
    shape = tuple(velocity.shape[:row_dims])
    plan = plan_of(_named(velocity, old_velocity, x0, noise), shape, "velocity")
    source = _source(velocity, old_velocity, x0, noise, 1.0, plan)
    name = resolve_backend(backend, plan.device.type, plan.dtype, matching=True)
    stats = RowStatistics.apply(velocity, RowCall(plan.in_rows(source), plan, name), True)
    p, q, e = (line.reshape(shape) for line in stats[:3])
    return p, q, e.detach()


def _named(velocity: Tensor, old_velocity: Tensor, x0: Tensor, noise: Tensor | PhiloxNoise) -> dict[str, Tensor]:
    named = {"velocity": velocity, "old_velocity": old_velocity, "x0": x0}
    if isinstance(noise, torch.Tensor):
        named["noise"] = noise
    else:
        check_seeded(noise)
    return named


def _source(
    velocity: Tensor, old: Tensor, x0: Tensor, noise: Tensor | PhiloxNoise, weight: float | Tensor, plan: RowPlan
) -> RowSource:
    table, values = matching_step(weight, plan.rows, plan.device, plan.dtype)
    stored = noise if isinstance(noise, torch.Tensor) else None
    streams, seed, first_stream = (None, 0, 0) if stored is not None else streams_of(noise, plan)
    return RowSource(velocity.detach(), old, stored, x0, streams, table, values, seed, first_stream, _MATCHING)
