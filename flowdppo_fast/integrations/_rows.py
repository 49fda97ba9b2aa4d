"""Losses for trainers that hand over log-probs: the ratio is theirs, only the divergence is read from the latents.

The losses of :mod:`flowdppo_fast.losses` take the log-ratio from the latents themselves. A trainer whose interface ends
at ``log_prob - old_log_prob`` gets the same epilogue here: with ``L`` given and ``Q = mean((mu-mu_old)**2) / S**2``
from one streaming pass, ``P = L + Q/2`` and everything follows as usual, in float64 where the device has it, because
adding ``Q/2`` and taking it off again must not touch ``L``.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import layout
from ..losses import row_statistics
from ..objectives import DPPO, EpilogueOptions, GRPOGuard, Objective, RowField, epilogue
from ..results import LossOutput
from ..samplers import SDEStep

# k = b/S = 1: the statistics of a plain difference
_UNIT_STEP = SDEStep(1.0, 1.0, 1.0, -1.0, "unit")
# what UniRL's Flow-DPPO reports; verl-omni took the names over
UNIRL_METRICS = tuple(name for name in DPPO.metrics if name not in ("drift_mean", "nonfinite_rows"))
_DIVERGENCE_METRICS = ("kl_new_old_mean", "kl_new_old_max", "drift_mean")


def squared_drift(new: Tensor, old: Tensor, *, rows: int = 1, backend: str = "auto") -> Tensor:
    """``mean((new-old)**2)`` over the latents of each row, in one streaming pass, differentiable in ``new``.

    Args:
        new, old: ``[rows, *latent]`` means or velocities; dtypes may differ.
        rows: how many leading dims are rows, 1 or 2.

    Returns:
        shaped like the rows, float32 (float64 for float64 inputs).

    Raises:
        ValueError, TypeError, RuntimeError: as in :func:`flowdppo_fast.row_statistics`.
    """
    old = old.detach()
    return row_statistics(new, old, old, _UNIT_STEP, rows=rows, backend=backend)[1]


class _RowLoss(torch.autograd.Function):
    """The epilogue on ``[4, R]`` statistics, with its own gradients: a dropped row's overflowed ratio stays out."""

    @staticmethod
    def forward(ctx, stats, std, neg_dt, advantages, row_weights, numel, options):
        rows, summary = epilogue(stats, std, 1.0 / std, neg_dt, advantages, row_weights, None, numel, options)
        ctx.save_for_backward(rows)
        ctx.mark_non_differentiable(rows, summary)
        return summary[0].clone(), rows, summary

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, grad_rows, grad_summary):
        (rows,) = ctx.saved_tensors
        grad_p, grad_q, grad_r = rows[RowField.GRAD_P :] * (grad_loss / rows.shape[1])
        return torch.stack((grad_p, grad_q, torch.zeros_like(grad_p), grad_r)), *(None,) * 6


def log_prob_policy_loss(
    objective: Objective,
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantages: Tensor,
    std: float | Tensor,
    *,
    dt: float | Tensor | None = None,
    drift: Tensor | None = None,
    reference_drift: Tensor | None = None,
    log_prob_kind: str = "gaussian",
    advantage_clip: float | None = None,
    row_weights: Tensor | None = None,
    kl_weight: float = 0.0,
    reference_kl: str = "gaussian",
    backend: str = "auto",
) -> LossOutput:
    """Mean row loss of ``objective`` from the trainer's own log-probs.

    Args:
        log_prob: ``[B]`` or ``[B, S]`` mean-reduced log-probs of the new policy, with gradient.
        old_log_prob: same shape, the rollout's.
        advantages: same shape.
        std: standard deviation ``S`` of the steps; broadcasts to the rows.
        dt: ``sigma_next - sigma`` (negative), needed by GRPO-Guard and ``reference_kl="without_dt"``.
        drift: rows of ``mean((mu-mu_old)**2)`` (:func:`squared_drift`), needed by DPPO and GRPO-Guard. It gets a
            gradient
            if it has a graph: GRPO-Guard's bias does, DPPO's mask does not.
        reference_drift: rows of ``mean((mu-mu_ref)**2)``, for the KL to the reference.
        log_prob_kind: ``"gaussian"``, or ``"unnormalized"`` if the log-probs are ``-mean((x'-mu)**2)``.
        advantage_clip, row_weights, kl_weight, reference_kl: as in :class:`flowdppo_fast.LossOptions`.
        backend: what ``drift`` was computed with, for the record.

    Returns:
        :class:`~flowdppo_fast.results.LossOutput` with a scalar loss, differentiable in ``log_prob`` and the drifts.

    Raises:
        ValueError, TypeError: shapes that do not match, or something an objective needs and did not get.
    """
    if drift is None and isinstance(objective, (DPPO, GRPOGuard)):
        raise ValueError(f"drift: got None, expected mean((mu-mu_old)**2) per row; {type(objective).__name__} needs it")
    if kl_weight > 0.0 and reference_drift is None:
        raise ValueError("kl_weight: got a positive weight without a reference, expected reference_drift")
    without_dt = reference_kl == "without_dt" and reference_drift is not None
    if dt is None and (isinstance(objective, GRPOGuard) or without_dt):
        raise ValueError("dt: got None, expected sigma_next - sigma; GRPO-Guard and reference_kl='without_dt' need it")
    options = EpilogueOptions.make(
        objective,
        log_prob=log_prob_kind,
        advantage_clip=advantage_clip,
        kl_weight=kl_weight,
        reference_kl=reference_kl,
    )
    shape, device = tuple(log_prob.shape), log_prob.device
    wide = torch.float64 if device.type in ("cpu", "cuda") else torch.float32

    def vector(value: float | Tensor | None, name: str) -> Tensor | None:
        if value is None:
            return None
        value = value if isinstance(value, Tensor) else torch.full((), value, dtype=wide, device=device)
        return layout.row_vector(value, name, shape, device, wide, differentiable=True)

    def required(value: float | Tensor, name: str) -> Tensor:
        return vector(value, name)  # type: ignore[return-value]

    s = required(std, "std")
    log_ratio = required(log_prob, "log_prob") - required(old_log_prob.detach(), "old_log_prob")
    q = torch.zeros_like(s) if drift is None else required(drift, "drift") / s**2
    r = torch.zeros_like(s) if reference_drift is None else required(reference_drift, "reference_drift") / s**2
    slope = 2.0 * s**2 if log_prob_kind == "unnormalized" else torch.ones_like(s)
    stats = torch.stack((log_ratio / slope + 0.5 * q, q, torch.zeros_like(q), r))
    neg_dt = torch.full_like(s, torch.nan) if dt is None else -required(dt, "dt")
    loss, rows, summary = _RowLoss.apply(
        stats, s, neg_dt, required(advantages.detach(), "advantages"), vector(row_weights, "row_weights"), 1, options
    )
    names = tuple(n for n in objective.metrics if drift is not None or n not in _DIVERGENCE_METRICS)
    names += ("kl_ref_mean",) if reference_drift is not None else ()
    dtype = log_prob.dtype
    return LossOutput(loss.to(dtype), rows.to(dtype), summary.to(dtype), shape, names, backend)
