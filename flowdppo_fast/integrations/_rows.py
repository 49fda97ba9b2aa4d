"""Losses for trainers that hand over log-probs: the ratio is theirs, only the divergence is read from the latents.

The losses of :mod:`flowdppo_fast.losses` take the log-ratio from the latents themselves. A trainer whose interface ends
at ``log_prob - old_log_prob`` gets the same epilogue here, in one small launch on ``[rows]`` vectors: ``L`` is given,
``Q = mean((mu-mu_old)**2) / S**2`` comes from one streaming pass, and everything else follows as usual.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import layout
from ..autograd import LogProbCall, LogProbLoss
from ..backend import BackendName, resolve_backend
from ..losses import row_statistics
from ..objectives import DPPO, SEES_DRIFT, EpilogueOptions, GRPOGuard, LogProbKind, Objective, ReferenceKL, is_number
from ..results import LossOutput
from ..samplers import SDEStep
from ..step_arguments import mean_step

# k = b/S = 1: the statistics of a plain difference
_UNIT_STEP = SDEStep(1.0, 1.0, 1.0, -1.0, "unit")
# what UniRL's Flow-DPPO reports; verl-omni took the names over
UNIRL_METRICS = tuple(name for name in DPPO.metrics if name not in ("drift_mean", "nonfinite_rows"))
_DIVERGENCE_METRICS = ("kl_new_old_mean", "kl_new_old_max", "drift_mean")


def squared_drift(new: Tensor, old: Tensor, *, row_dims: int = 1, backend: BackendName = "auto") -> Tensor:
    """``mean((new-old)**2)`` over the latents of each row, in one streaming pass, differentiable in ``new``.

    Args:
        new, old: ``[rows, *latent]`` means or velocities; dtypes may differ.
        row_dims: how many leading dims are rows, 1 or 2.

    Returns:
        shaped like the rows, float32 (float64 for float64 inputs).

    Raises:
        ValueError, TypeError, RuntimeError: as in :func:`flowdppo_fast.row_statistics`.
    """
    # P is not looked at, so any noise will do; torch.compile refuses one tensor in two places
    return row_statistics(new, old.detach(), old.detach(), _UNIT_STEP, row_dims=row_dims, backend=backend)[1]


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
    log_prob_kind: LogProbKind = "gaussian",
    advantage_clip: float | None = None,
    row_weights: Tensor | None = None,
    kl_weight: float = 0.0,
    reference_kl: ReferenceKL = "gaussian",
    backend: BackendName = "auto",
) -> LossOutput:
    """Mean row loss of ``objective`` from the trainer's own log-probs.

    Args:
        log_prob: ``[B]`` or ``[B, S]`` mean-reduced log-probs of the new policy, with gradient.
        old_log_prob: same shape, the rollout's.
        advantages: same shape.
        std: standard deviation ``S`` of the steps; broadcasts to the rows.
        dt: ``sigma_next - sigma`` (negative), needed by GRPO-Guard and ``reference_kl="without_dt"``.
        drift: rows of ``mean((mu-mu_old)**2)`` (:func:`squared_drift`), needed by DPPO and GRPO-Guard. It gets a
            gradient if it has a graph: GRPO-Guard's bias does, DPPO's mask does not.
        reference_drift: rows of ``mean((mu-mu_ref)**2)``, for the KL to the reference.
        log_prob_kind: ``"gaussian"``, or ``"unnormalized"`` if the log-probs are ``-mean((x'-mu)**2)``.
        advantage_clip, row_weights, kl_weight, reference_kl: as in :func:`flowdppo_fast.fused_policy_loss`.
        backend: ``"auto"`` or a name, as in :func:`flowdppo_fast.fused_policy_loss`.

    Returns:
        :class:`~flowdppo_fast.results.LossOutput` with a scalar loss, differentiable in ``log_prob`` and the drifts.

    Raises:
        ValueError, TypeError: shapes that do not match, or something an objective needs and did not get.
        RuntimeError: the named backend cannot run here.
    """
    if drift is None and isinstance(objective, SEES_DRIFT):
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
    given = (log_prob, old_log_prob, drift, reference_drift)
    wide = any(x is not None and x.dtype == torch.float64 for x in given)
    dtype = torch.float64 if wide else torch.float32

    def vector(value: Tensor | None, name: str, *, differentiable: bool = False) -> Tensor | None:
        if value is None:
            return None
        return layout.row_vector(value, name, shape, device, dtype, differentiable=differentiable)

    name = resolve_backend(backend, device.type, dtype)
    table, values = mean_step(std, dt, shape, device, dtype)
    call = LogProbCall(
        vector(old_log_prob.detach(), "old_log_prob"), table, values, vector(advantages.detach(), "advantages"),  # type: ignore[arg-type]
        vector(row_weights, "row_weights"), options.ints, options.floats, name,
    )  # fmt: skip
    loss, rows, summary = LogProbLoss.apply(
        vector(log_prob, "log_prob", differentiable=True),
        vector(drift, "drift", differentiable=True),
        vector(reference_drift, "reference_drift", differentiable=True),
        call,
    )
    names = tuple(n for n in objective.metrics if drift is not None or n not in _DIVERGENCE_METRICS)
    names += ("kl_ref_mean",) if reference_drift is not None else ()
    out = log_prob.dtype
    return LossOutput(loss.to(out), rows.to(out), summary.to(out), shape, names, name)


def clip_pair(clip_range: float | tuple[float, float]) -> tuple[float, float]:
    """``(low, high)`` of a trainer's clip range.

    Raises:
        ValueError: not a number in (0, 1), and no pair of numbers with ``low`` in (0, 1) and ``high > 0``.
    """
    pair = clip_range if isinstance(clip_range, (tuple, list)) else (clip_range, clip_range)
    if len(pair) != 2 or not all(is_number(c) for c in pair) or not (0.0 < pair[0] < 1.0 and pair[1] > 0.0):
        raise ValueError(
            f"clip_range: got {clip_range!r}, expected a number in (0, 1) or a pair (low, high) with low in (0, 1) and "
            "high > 0"
        )
    return pair[0], pair[1]
