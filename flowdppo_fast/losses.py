"""The front door: fused losses on step means or on velocities, for every objective, plus the (P, Q) primitive.

``advantages.shape`` says which leading dims are rows (``[B]`` or ``[B, S]``); everything after is latent. Formulas:
with ``u = k*(new-old)``, ``P = mean(e*u)`` and ``Q = mean(u*u)`` the log-ratio is ``P - Q/2`` and the KL ``Q/2`` (both
exact for Gaussians of equal variance; Flow-DPPO, arXiv 2606.11025, Sec. 3.2 and Eq. 14).

Gradients are first-order: differentiating them again is not supported. Under ``torch.compile`` python numbers (a scalar
:class:`SDEStep`, ``threshold``, an int stream) are constants of the graph; stacked steps and stream tensors may change
without recompiling.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypedDict, TypeVar

import torch
from torch import Tensor
from typing_extensions import Unpack

from . import layout
from .autograd import ObjectiveInputs, PolicyLoss, RowCall, RowStatistics
from .backend import operator, resolve
from .noise import PhiloxNoise
from .objectives import (
    DPPO,
    EpilogueOptions,
    GRPOGuard,
    Objective,
    RatioClip,
    Unclipped,
    is_number,
)
from .results import LossOutput
from .rows import Form, RowPlan, RowSource, plan_of
from .samplers import SDEStep
from .step_arguments import mean_step, velocity_step


class LossOptions(TypedDict, total=False):
    """Keyword options that all losses share.

    Attributes:
        advantage_clip: clamp advantages to ``[-c, c]`` first (Flow-Factory, DanceGRPO: 5); None (default) leaves them.
        old_log_prob: ``[rows]`` rollout log-probs, mean-reduced, with normaliser: ``L = logp_new - old_log_prob``
            instead of ``P - Q/2``. For trainers that have nothing else; loses precision (two numbers of order 1 are
            subtracted).
        row_weights: ``[rows]`` weights on row losses (rollout correction).
        reduction: over rows: ``"mean"`` (default; dropped rows stay in the denominator), ``"sum"`` or ``"none"``.
        reduce: over latent elements: ``"mean"`` (default), or ``"sum"`` to multiply log-ratio and KL by N.
        log_prob: ``"gaussian"`` (default), or ``"unnormalized"`` for trainers whose CPS log-prob drops ``1/(2*S**2)``
            and the normaliser.
        kl_weight: weight of the KL to the reference policy, >= 0 (default 0); needs a reference.
        reference_kl: ``"gaussian"`` (default), or ``"without_dt"`` for flow_grpo's
            ``(mu-mu_ref)**2 / (2*std_dev_t**2)`` of the SDE samplers, where ``S = std_dev_t * sqrt(-dt)``.
        single_pass: compute the gradient in the same call (default False); ``out.grad`` feeds
            ``velocity.backward(out.grad)`` and ``out.loss`` is detached.
        backend: ``"auto"`` (default) or a name from :data:`flowdppo_fast.BACKENDS`; a named one that cannot run is an
            error.
    """

    advantage_clip: float | None
    old_log_prob: Tensor | None
    row_weights: Tensor | None
    reduction: str
    reduce: str
    log_prob: str
    kl_weight: float
    reference_kl: str
    single_pass: bool
    backend: str


_T = TypeVar("_T")
_VELOCITY, _MEAN = int(Form.VELOCITY), int(Form.MEAN)
_OPTION_NAMES = tuple(LossOptions.__annotations__)


def _kept(function: Callable[..., _T]) -> Callable[..., _T]:
    """``function`` of hashable arguments, computed once for each; what raises is not kept."""
    # typed: 1 and True are equal, and only one of them is a number
    looked_up = functools.lru_cache(maxsize=256, typed=True)(function)

    @functools.wraps(function)
    def kept(*arguments: Any) -> _T:
        if torch.compiler.is_compiling():
            return function(*arguments)
        try:
            return looked_up(*arguments)
        except TypeError:
            # also where an argument has no hash
            return function(*arguments)

    return kept


_dppo = _kept(DPPO)


def fused_policy_loss(
    objective: Objective,
    prev_sample_mean: Tensor,
    old_prev_sample_mean: Tensor,
    prev_sample: Tensor,
    std: float | Tensor,
    advantages: Tensor,
    *,
    dt: float | Tensor | None = None,
    reference_prev_sample_mean: Tensor | None = None,
    **options: Unpack[LossOptions],
) -> LossOutput:
    """Any objective on step means.

    Args:
        objective: :class:`DPPO`, :class:`RatioClip`, :class:`GRPOGuard` or :class:`Unclipped`.
        prev_sample_mean: ``[rows, *latent]`` mean of the new policy's step; the only argument that gets a gradient.
        old_prev_sample_mean: same shape, the rollout policy's mean. Keep it in float32: bf16 means inflate the KL.
        prev_sample: same shape, the next state ``x'`` that was drawn.
        std: standard deviation ``S`` of the step (``std_dev_t * sqrt(-dt)`` for Flow-SDE): float, or a tensor that
            broadcasts to the rows, trailing dims of size 1 allowed (``[B, 1, 1, 1]``).
        advantages: ``[B]`` or ``[B, S]``.
        dt: ``sigma_next - sigma`` (negative), needed by GRPO-Guard and ``reference_kl="without_dt"``.
        reference_prev_sample_mean: same shape, the reference policy's mean.
        options: see :class:`LossOptions`.

    Returns:
        :class:`~flowdppo_fast.results.LossOutput`.

    Raises:
        ValueError, TypeError: an argument of wrong shape, dtype, device or value; the message names it.
        RuntimeError: the named backend cannot run here.
    """
    _check_option_names(options)
    if isinstance(objective, DPPO) and objective.trust_region == "velocity_drift":
        raise ValueError(
            "objective: trust_region='velocity_drift' needs velocities; use the velocity form, or 'mean_drift' here"
        )
    named = {
        "prev_sample_mean": prev_sample_mean,
        "old_prev_sample_mean": old_prev_sample_mean,
        "prev_sample": prev_sample,
    }
    if reference_prev_sample_mean is not None:
        named["reference_prev_sample_mean"] = reference_prev_sample_mean
    plan = _check_call(objective, named, advantages)
    without_dt = options.get("reference_kl") == "without_dt" and reference_prev_sample_mean is not None
    if dt is None and (isinstance(objective, GRPOGuard) or without_dt):
        raise ValueError("dt: got None, expected sigma_next - sigma; GRPO-Guard and reference_kl='without_dt' need it")
    table, values = mean_step(std, dt, plan.rows, plan.device, plan.dtype)
    latents = (prev_sample_mean, old_prev_sample_mean, prev_sample, reference_prev_sample_mean)
    source = plan.source(latents, None, table, values, 0, 0, _MEAN)
    return _run(objective, plan, source, advantages, **options)


def fused_velocity_policy_loss(
    objective: Objective,
    velocity: Tensor,
    old_velocity: Tensor,
    noise: Tensor | PhiloxNoise,
    step: SDEStep,
    advantages: Tensor,
    *,
    reference_velocity: Tensor | None = None,
    **options: Unpack[LossOptions],
) -> LossOutput:
    """Any objective on velocities: half the bytes of float32 means, lossless in the model's own dtype.

    Args:
        objective: :class:`DPPO`, :class:`RatioClip`, :class:`GRPOGuard` or :class:`Unclipped`.
        velocity: ``[rows, *latent]`` new model output; the only argument that gets a gradient.
        old_velocity: same shape, the rollout policy's output, in the model's dtype.
        noise: same shape, the standard normal noise that was drawn, or :class:`PhiloxNoise` to regenerate it.
        step: the :class:`SDEStep` of the rows (one for all, or stacked to broadcast against the rows).
        advantages: ``[B]`` or ``[B, S]``.
        reference_velocity: same shape, the reference policy's output.
        options: see :class:`LossOptions`.

    Returns:
        :class:`~flowdppo_fast.results.LossOutput`.

    Raises:
        ValueError, TypeError: an argument of wrong shape, dtype, device or value; the message names it.
        RuntimeError: the named backend cannot run here.
    """
    _check_option_names(options)
    named = {"velocity": velocity, "old_velocity": old_velocity}
    stored = _stored_noise(noise, named)
    if reference_velocity is not None:
        named["reference_velocity"] = reference_velocity
    plan = _check_call(objective, named, advantages)
    table, values = velocity_step(step, plan.rows, plan.device, plan.dtype)
    streams, seed, first_stream = _seeded_noise(noise, plan)
    latents = (velocity, old_velocity, stored, reference_velocity)
    source = plan.source(latents, streams, table, values, seed, first_stream, _VELOCITY)
    return _run(objective, plan, source, advantages, **options)


def fused_dppo_loss(
    prev_sample_mean: Tensor,
    old_prev_sample_mean: Tensor,
    prev_sample: Tensor,
    std: float | Tensor,
    advantages: Tensor,
    *,
    threshold: float = 1e-5,
    symmetric: bool = False,
    trust_region: str = "kl",
    **options: Unpack[LossOptions],
) -> LossOutput:
    """Flow-DPPO (arXiv 2606.11025, Eq. 14 and 18) on step means: :func:`fused_policy_loss` with :class:`DPPO`.

    Tensors, results and errors are those of :func:`fused_policy_loss`.

    Args:
        threshold: bound on the mean-reduced KL, nats per latent element (1e-5: UniRL, verl-omni, FLUX.1-dev; 1e-6:
            Flow-Factory SD3.5, FLUX.2).
        symmetric, trust_region: see :class:`DPPO`; ``"velocity_drift"`` needs velocities.
        options: see :class:`LossOptions`.
    """
    objective = _dppo(threshold, symmetric, trust_region)
    return fused_policy_loss(objective, prev_sample_mean, old_prev_sample_mean, prev_sample, std, advantages, **options)


def fused_dppo_velocity_loss(
    velocity: Tensor,
    old_velocity: Tensor,
    noise: Tensor | PhiloxNoise,
    step: SDEStep,
    advantages: Tensor,
    *,
    threshold: float = 1e-5,
    symmetric: bool = False,
    trust_region: str = "kl",
    **options: Unpack[LossOptions],
) -> LossOutput:
    """Flow-DPPO (arXiv 2606.11025, Eq. 14 and 18) on velocities: :func:`fused_velocity_policy_loss` with :class:`DPPO`.

    Tensors, results and errors are those of :func:`fused_velocity_policy_loss`.

    Args:
        threshold: bound on the mean-reduced KL, nats per latent element, as in :func:`fused_dppo_loss`.
        symmetric, trust_region: see :class:`DPPO`.
        options: see :class:`LossOptions`.
    """
    objective = _dppo(threshold, symmetric, trust_region)
    return fused_velocity_policy_loss(objective, velocity, old_velocity, noise, step, advantages, **options)


def fused_ratio_clip_loss(
    prev_sample_mean: Tensor,
    old_prev_sample_mean: Tensor,
    prev_sample: Tensor,
    std: float | Tensor,
    advantages: Tensor,
    *,
    clip_range: float | tuple[float, float] = 1e-4,
    **options: Unpack[LossOptions],
) -> LossOutput:
    """Flow-GRPO's ratio clipping (arXiv 2505.05470) on step means: :func:`fused_policy_loss` with :class:`RatioClip`.

    Tensors, results and errors are those of :func:`fused_policy_loss`.

    Args:
        clip_range: ``c`` or ``(low, high)``: ratios of mean-reduced log-probs are kept in ``[1-low, 1+high]``.
        options: see :class:`LossOptions`.
    """
    objective = RatioClip(*clip_pair(clip_range))
    return fused_policy_loss(objective, prev_sample_mean, old_prev_sample_mean, prev_sample, std, advantages, **options)


def fused_ratio_clip_velocity_loss(
    velocity: Tensor,
    old_velocity: Tensor,
    noise: Tensor | PhiloxNoise,
    step: SDEStep,
    advantages: Tensor,
    *,
    clip_range: float | tuple[float, float] = 1e-4,
    **options: Unpack[LossOptions],
) -> LossOutput:
    """Flow-GRPO's ratio clipping on velocities: :func:`fused_velocity_policy_loss` with :class:`RatioClip`.

    Tensors, results and errors are those of :func:`fused_velocity_policy_loss`.

    Args:
        clip_range: as in :func:`fused_ratio_clip_loss`.
        options: see :class:`LossOptions`.
    """
    objective = RatioClip(*clip_pair(clip_range))
    return fused_velocity_policy_loss(objective, velocity, old_velocity, noise, step, advantages, **options)


def fused_grpo_guard_loss(
    prev_sample_mean: Tensor,
    old_prev_sample_mean: Tensor,
    prev_sample: Tensor,
    std: float | Tensor,
    advantages: Tensor,
    *,
    dt: float | Tensor,
    clip_range: float | tuple[float, float] = 2e-6,
    bias: str = "row",
    **options: Unpack[LossOptions],
) -> LossOutput:
    """GRPO-Guard (arXiv 2510.22319) on step means: :func:`fused_policy_loss` with :class:`GRPOGuard`.

    Tensors, results and errors are those of :func:`fused_policy_loss`.

    Args:
        dt: ``sigma_next - sigma``, negative: float, or a tensor that broadcasts to the rows.
        clip_range: ``c`` or ``(low, high)`` on the normalised ratio.
        bias: ``"row"`` or ``"batch"``, see :class:`GRPOGuard`.
        options: see :class:`LossOptions`.
    """
    objective = GRPOGuard(*clip_pair(clip_range), bias)
    return fused_policy_loss(
        objective, prev_sample_mean, old_prev_sample_mean, prev_sample, std, advantages, dt=dt, **options
    )


def fused_grpo_guard_velocity_loss(
    velocity: Tensor,
    old_velocity: Tensor,
    noise: Tensor | PhiloxNoise,
    step: SDEStep,
    advantages: Tensor,
    *,
    clip_range: float | tuple[float, float] = 2e-6,
    bias: str = "row",
    **options: Unpack[LossOptions],
) -> LossOutput:
    """GRPO-Guard on velocities: :func:`fused_velocity_policy_loss` with :class:`GRPOGuard`.

    Tensors, results and errors are those of :func:`fused_velocity_policy_loss`.

    Args:
        clip_range, bias: as in :func:`fused_grpo_guard_loss`; the step has ``dt``.
        options: see :class:`LossOptions`.
    """
    objective = GRPOGuard(*clip_pair(clip_range), bias)
    return fused_velocity_policy_loss(objective, velocity, old_velocity, noise, step, advantages, **options)


def row_statistics(
    velocity: Tensor,
    old_velocity: Tensor,
    noise: Tensor | PhiloxNoise,
    step: SDEStep,
    *,
    rows: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The differentiable primitive: ``(P, Q)``, from which any objective is a few lines on ``[rows]`` tensors.

    KL is ``Q/2``, the log-ratio ``P - Q/2``, the mean-squared drift ``S**2 * Q``.

    Args:
        velocity, old_velocity, noise, step: as in :func:`fused_velocity_policy_loss`.
        rows: how many leading dims are rows: 1 (default) or 2.

    Returns:
        ``P`` and ``Q`` shaped like the rows, float32 (float64 for float64 velocities), differentiable in ``velocity``.

    Raises:
        ValueError, TypeError, RuntimeError: as in :func:`fused_velocity_policy_loss`.
    """
    if not isinstance(velocity, torch.Tensor):
        raise TypeError(f"velocity: got {type(velocity).__name__}, expected a tensor")
    row_dims = 1 if rows is None else rows
    if row_dims not in (1, 2):
        raise ValueError(f"rows: got {rows!r}, expected 1 or 2 leading row dims")
    shape = tuple(velocity.shape[:row_dims])
    named = {"velocity": velocity, "old_velocity": old_velocity}
    stored = _stored_noise(noise, named)
    plan = plan_of(named, shape, "velocity")
    table, values = velocity_step(step, shape, plan.device, plan.dtype)
    streams, seed, first_stream = _seeded_noise(noise, plan)
    name = resolve(backend, plan.device.type, plan.dtype)
    latents = (velocity, old_velocity, stored, None)
    source = plan.source(latents, streams, table, values, seed, first_stream, _VELOCITY)
    stats = RowStatistics.apply(velocity, RowCall(source, plan, name), False)
    return stats[0].reshape(shape), stats[1].reshape(shape)


def _check_option_names(options: LossOptions) -> None:
    for name in options:
        if name not in _OPTION_NAMES:
            raise TypeError(f"{name}: no such option, expected one of {', '.join(_OPTION_NAMES)}")


def clip_pair(clip_range: float | tuple[float, float]) -> tuple[float, float]:
    """``(low, high)`` of a clip range.

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


def _stored_noise(noise: Tensor | PhiloxNoise, named: dict[str, Tensor]) -> Tensor | None:
    """The noise tensor, entered into ``named`` to be checked with the other latents; None for seeded noise."""
    if isinstance(noise, PhiloxNoise):
        return None
    if not isinstance(noise, torch.Tensor):
        raise TypeError(
            f"noise: got {type(noise).__name__}, expected the drawn noise as a tensor, or PhiloxNoise(seed, stream)"
        )
    named["noise"] = noise
    return noise


def _seeded_noise(noise: Tensor | PhiloxNoise, plan: RowPlan) -> tuple[Tensor | None, int, int]:
    """Streams, seed and first stream as the operators take them; not looked at where noise is stored."""
    return noise.kernel_source(plan.rows, plan.device) if isinstance(noise, PhiloxNoise) else (None, 0, 0)


def _check_call(objective: Objective, named: dict[str, Tensor], advantages: Tensor) -> RowPlan:
    """Objective, and shapes, dtypes and gradients of all latents; the first one gets the gradient."""
    if not isinstance(objective, (DPPO, RatioClip, GRPOGuard, Unclipped)):
        got = objective.__name__ if isinstance(objective, type) else type(objective).__name__
        raise TypeError(
            f"objective: got {'the type ' if isinstance(objective, type) else ''}{got}, expected an instance of DPPO, "
            "RatioClip, GRPOGuard or Unclipped, for example DPPO(threshold=1e-5)"
        )
    if not isinstance(advantages, torch.Tensor):
        raise TypeError(f"advantages: got {type(advantages).__name__}, expected a tensor shaped [B] or [B, S]")
    return plan_of(named, advantages.shape, next(iter(named)))


class _Settings(NamedTuple):
    """What an objective and the options come to."""

    ints: list[int]
    floats: list[float]
    metrics: tuple[str, ...]


@_kept
def _settings(
    objective: Objective,
    with_reference: bool,
    single_pass: bool,
    reduction: str,
    reduce: str,
    log_prob: str,
    advantage_clip: float | None,
    kl_weight: float,
    reference_kl: str,
) -> _Settings:
    options = EpilogueOptions.make(
        objective,
        reduce=reduce,
        log_prob=log_prob,
        advantage_clip=advantage_clip,
        kl_weight=kl_weight,
        reference_kl=reference_kl,
    )
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction: got {reduction!r}, expected 'mean', 'sum' or 'none'")
    if options.batch_bias and reduction == "none":
        raise ValueError("reduction: bias='batch' couples all rows, so 'none' has no per-row gradient; use 'mean'")
    if options.kl_weight > 0.0 and not with_reference:
        raise ValueError("kl_weight: got a positive weight without a reference, expected the reference policy's output")
    if single_pass and reduction == "none":
        raise ValueError(
            "reduction: got 'none', expected 'mean' or 'sum' in the single-pass form (one loss, one gradient)"
        )
    metrics = objective.metrics + (("kl_ref_mean",) if with_reference else ())
    return _Settings(options.ints, options.floats, metrics)


def _run(
    objective: Objective,
    plan: RowPlan,
    source: RowSource,
    advantages: Tensor,
    *,
    advantage_clip: float | None = None,
    old_log_prob: Tensor | None = None,
    row_weights: Tensor | None = None,
    reduction: str = "mean",
    reduce: str = "mean",
    log_prob: str = "gaussian",
    kl_weight: float = 0.0,
    reference_kl: str = "gaussian",
    single_pass: bool = False,
    backend: str = "auto",
) -> LossOutput:
    """Checks what both forms share, then calls the operator; defaults of :class:`LossOptions` live here."""
    ints, floats, metrics = _settings(
        objective, source.reference is not None, single_pass, reduction, reduce, log_prob, advantage_clip, kl_weight,
        reference_kl,
    )  # fmt: skip
    name = resolve(backend, plan.device.type, plan.dtype)

    kind = (plan.rows, plan.device, plan.dtype)
    inputs = ObjectiveInputs(
        layout.row_vector(advantages, "advantages", *kind),
        None if row_weights is None else layout.row_vector(row_weights, "row_weights", *kind),
        None if old_log_prob is None else layout.row_vector(old_log_prob, "old_log_prob", *kind),
        ints,
        floats,
    )
    if not single_pass:
        loss, rows, summary = PolicyLoss.apply(source.new, RowCall(source, plan, name), inputs, reduction)
        if reduction == "none":
            loss = loss.reshape(plan.rows)
        return LossOutput(loss, rows, summary, plan.rows, metrics, name)
    with torch.no_grad():
        count = advantages.numel()
        factor = 1.0 / count if reduction == "mean" and count > 0 else 1.0
        loss, rows, summary, grad = operator("policy_loss_and_grad", name, plan.device.type)(
            plan.to_rows(source.new), *source[1:], *inputs, factor
        )
        if reduction == "sum":
            loss = loss * count
    return LossOutput(loss, rows, summary, plan.rows, metrics, name, plan.gradient(grad))
