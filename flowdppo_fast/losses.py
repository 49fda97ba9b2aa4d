"""The front door: fused losses on velocities or on step means, for every objective, plus the (P, Q) primitive.

``advantages.shape`` says which leading dims are rows (``[B]`` or ``[B, S]``); everything after is latent. Formulas:
with ``u = k*(new-old)``, ``P = mean(e*u)`` and ``Q = mean(u*u)`` the log-ratio is ``P - Q/2`` and the KL ``Q/2`` (both
exact for Gaussians of equal variance; Flow-DPPO, arXiv 2606.11025, Sec. 3.2 and Eq. 14).

Gradients are first-order: differentiating them again is not supported. Under ``torch.compile`` python numbers (a scalar
:class:`SDEStep`, ``threshold``, an int stream) are constants of the graph; stacked steps and stream tensors may change
without recompiling.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from . import layout
from .autograd import RowCall, RowStatistics
from .backend import BackendName, resolve_backend
from .loss_call import check_call, check_seeded, dppo, run, settings_of, shared_kl, streams_of
from .noise import PhiloxNoise
from .objectives import LogProbKind, Objective, Reduction, ReferenceKL, TrustRegionName
from .results import LossOutput
from .rows import Form, RowSource, plan_of
from .rules import RowValues
from .samplers import SDEStep
from .step_arguments import mean_step, velocity_step

_VELOCITY, _MEAN = int(Form.VELOCITY), int(Form.MEAN)


def fused_policy_velocity_loss(
    velocity: Tensor,
    old_velocity: Tensor,
    noise: Tensor | PhiloxNoise,
    step: SDEStep,
    advantages: Tensor,
    *,
    objective: Objective | Callable[[RowValues], tuple],
    reference_velocity: Tensor | None = None,
    kl_weight: float | Tensor = 0.0,
    reference_kl: ReferenceKL = "gaussian",
    advantage_clip: float | None = None,
    old_log_prob: Tensor | None = None,
    row_weights: Tensor | None = None,
    threshold_weights: Tensor | None = None,
    reduction: Reduction = "mean",
    latent_reduction: Literal["mean", "sum"] = "mean",
    log_prob: LogProbKind = "gaussian",
    single_pass: bool | None = None,
    backend: BackendName = "auto",
) -> LossOutput:
    """Any objective on velocities: half the bytes of float32 means, lossless in the model's own dtype.

    Args:
        velocity: ``[rows, *latent]`` new model output, float32, bfloat16, float16 or float64; the only argument that
            gets a gradient.
        old_velocity: same shape, the rollout policy's output, in the model's dtype.
        noise: same shape, the standard normal noise that was drawn, or :class:`PhiloxNoise` to regenerate it.
        step: the :class:`SDEStep` of the rows: one for all, or stacked to broadcast against the rows.
        advantages: ``[B]`` or ``[B, S]``, floating point: one per row, and what says which leading dims are rows.
        objective: :class:`DPPO`, :class:`RatioClip`, :class:`GRPOGuard`, :class:`KLPenalty`, :class:`DRPO`,
            :class:`LogHinge` or :class:`Unclipped`; or a rule of your own, a function of
            :class:`~flowdppo_fast.rules.RowValues`.
        reference_velocity: same shape, the reference policy's output, for a KL term and its metric. Default None.
        kl_weight: weight of the KL to the reference policy, >= 0, or one of any sign per row (a tensor as
            ``row_weights``); needs a reference. Default 0.
        reference_kl: ``"gaussian"`` (default), ``"without_dt"`` for flow_grpo's ``(mu-mu_ref)**2 /
            (2*std_dev_t**2)`` of the SDE samplers, where ``S = std_dev_t * sqrt(-dt)``, or without a scale
            ``"mean_mse"`` for ``mean((mu-mu_ref)**2)`` and ``"velocity_mse"`` for ``mean((v-v_ref)**2)`` (velocities
            only). The metric stays a KL.
        advantage_clip: clamp advantages to ``[-c, c]`` first (Flow-Factory, DanceGRPO: 5), > 0. Default None: as they
            are.
        old_log_prob: ``[rows]`` rollout log-probs in nats, mean-reduced, with normaliser: ``L = logp_new -
            old_log_prob`` instead of ``P - Q/2``. For trainers that have nothing else; loses precision (two numbers of
            order 1 are subtracted). Default None.
        row_weights: ``[rows]`` weights on row losses (rollout correction). Default None: 1.
        threshold_weights: ``[rows]`` what the objective's threshold is multiplied by, and the strength of its penalty
            divided by, > 0: a bound per step. Default None: 1.
        reduction: over rows: ``"mean"`` (default; dropped rows stay in the denominator), ``"kept"`` (the sum over the
            number of kept rows; metrics stay means of all), ``"sum"`` or ``"none"``.
        latent_reduction: over latent elements: ``"mean"`` (default), or ``"sum"`` to multiply log-ratio and KL by N.
        log_prob: ``"gaussian"`` (default), or ``"unnormalized"`` for trainers whose CPS log-prob drops ``1/(2*S**2)``
            and the normaliser.
        single_pass: when the gradient is made. None (default): together with the loss where that is quicker, which is
            on a CPU; ``loss.backward()`` then has nothing left to read. False: in ``backward``. True: together with the
            loss, also where nothing requires a gradient; it is :attr:`LossOutput.grad`. ``"none"`` has no such form.
        backend: ``"auto"`` (default) or a name from :data:`flowdppo_fast.BACKENDS`; a named one that cannot run is an
            error.

    Returns:
        :class:`~flowdppo_fast.results.LossOutput`; ``loss`` is differentiable.

    Raises:
        ValueError, TypeError: an argument of wrong shape, dtype, device or value; the message names it.
        RuntimeError: the named backend cannot run here.
    """
    named = {"velocity": velocity, "old_velocity": old_velocity}
    if isinstance(noise, torch.Tensor):
        stored = named["noise"] = noise
    else:
        stored = None
        check_seeded(noise)
    if reference_velocity is not None:
        named["reference_velocity"] = reference_velocity
    plan = check_call(objective, named, advantages)
    weights = (row_weights, threshold_weights, kl_weight, reference_kl)
    shared = kl_weight if kl_weight.__class__ is float else shared_kl(kl_weight)
    settings = settings_of(
        objective, plan.numel, True, reference_velocity is not None, True, single_pass, reduction,
        latent_reduction, log_prob, advantage_clip, shared, reference_kl,
    )  # fmt: skip
    table, values = velocity_step(step, plan.rows, plan.device, plan.dtype)
    streams, seed, first_stream = (None, 0, 0) if stored is not None else streams_of(noise, plan)
    source = RowSource(
        velocity.detach(), old_velocity, stored, reference_velocity, streams, table, values,
        seed, first_stream, _VELOCITY,
    )  # fmt: skip
    return run(velocity, source, plan, settings, advantages, weights, old_log_prob, reduction, single_pass, backend)


def fused_policy_loss(
    prev_sample_mean: Tensor,
    old_prev_sample_mean: Tensor,
    prev_sample: Tensor,
    std: float | Tensor,
    advantages: Tensor,
    *,
    objective: Objective | Callable[[RowValues], tuple],
    dt: float | Tensor | None = None,
    reference_prev_sample_mean: Tensor | None = None,
    kl_weight: float | Tensor = 0.0,
    reference_kl: ReferenceKL = "gaussian",
    advantage_clip: float | None = None,
    old_log_prob: Tensor | None = None,
    row_weights: Tensor | None = None,
    threshold_weights: Tensor | None = None,
    reduction: Reduction = "mean",
    latent_reduction: Literal["mean", "sum"] = "mean",
    log_prob: LogProbKind = "gaussian",
    single_pass: bool | None = None,
    backend: BackendName = "auto",
) -> LossOutput:
    """Any objective on step means, for trainers that keep means instead of velocities.

    Args:
        prev_sample_mean: ``[rows, *latent]`` mean of the new policy's step, float32, bfloat16, float16 or float64; the
            only argument that gets a gradient.
        old_prev_sample_mean: same shape, the rollout policy's mean. Keep it in float32: bfloat16 means inflate the KL.
        prev_sample: same shape, the next state ``x'`` that was drawn.
        std: standard deviation ``S`` of the step in latent units (``std_dev_t * sqrt(-dt)`` for Flow-SDE), > 0: a
            number, or a tensor that broadcasts to the rows, trailing dims of size 1 allowed (``[B, 1, 1, 1]``).
        advantages: ``[B]`` or ``[B, S]``, floating point: one per row, and what says which leading dims are rows.
        objective: :class:`DPPO`, :class:`RatioClip`, :class:`GRPOGuard`, :class:`KLPenalty`, :class:`DRPO`,
            :class:`LogHinge` or :class:`Unclipped`; or a rule of your own, a function of
            :class:`~flowdppo_fast.rules.RowValues`.
        dt: ``sigma_next - sigma``, negative, a number or a tensor like ``std``; GRPO-Guard and
            ``reference_kl="without_dt"`` need it. Default None.
        reference_prev_sample_mean: same shape, the reference policy's mean, for a KL term and its metric. Default None.
        kl_weight: weight of the KL to the reference policy, >= 0, or one of any sign per row (a tensor as
            ``row_weights``); needs a reference. Default 0.
        reference_kl: ``"gaussian"`` (default), ``"without_dt"`` for flow_grpo's ``(mu-mu_ref)**2 /
            (2*std_dev_t**2)`` of the SDE samplers, where ``S = std_dev_t * sqrt(-dt)``, or without a scale
            ``"mean_mse"`` for ``mean((mu-mu_ref)**2)`` and ``"velocity_mse"`` for ``mean((v-v_ref)**2)`` (velocities
            only). The metric stays a KL.
        advantage_clip: clamp advantages to ``[-c, c]`` first (Flow-Factory, DanceGRPO: 5), > 0. Default None: as they
            are.
        old_log_prob: ``[rows]`` rollout log-probs in nats, mean-reduced, with normaliser: ``L = logp_new -
            old_log_prob`` instead of ``P - Q/2``. For trainers that have nothing else; loses precision (two numbers of
            order 1 are subtracted). Default None.
        row_weights: ``[rows]`` weights on row losses (rollout correction). Default None: 1.
        threshold_weights: ``[rows]`` what the objective's threshold is multiplied by, and the strength of its penalty
            divided by, > 0: a bound per step. Default None: 1.
        reduction: over rows: ``"mean"`` (default; dropped rows stay in the denominator), ``"kept"`` (the sum over the
            number of kept rows; metrics stay means of all), ``"sum"`` or ``"none"``.
        latent_reduction: over latent elements: ``"mean"`` (default), or ``"sum"`` to multiply log-ratio and KL by N.
        log_prob: ``"gaussian"`` (default), or ``"unnormalized"`` for trainers whose CPS log-prob drops ``1/(2*S**2)``
            and the normaliser.
        single_pass: when the gradient is made. None (default): together with the loss where that is quicker, which is
            on a CPU; ``loss.backward()`` then has nothing left to read. False: in ``backward``. True: together with the
            loss, also where nothing requires a gradient; it is :attr:`LossOutput.grad`. ``"none"`` has no such form.
        backend: ``"auto"`` (default) or a name from :data:`flowdppo_fast.BACKENDS`; a named one that cannot run is an
            error.

    Returns:
        :class:`~flowdppo_fast.results.LossOutput`; ``loss`` is differentiable.

    Raises:
        ValueError, TypeError: an argument of wrong shape, dtype, device or value; the message names it.
        RuntimeError: the named backend cannot run here.
    """
    named = {
        "prev_sample_mean": prev_sample_mean,
        "old_prev_sample_mean": old_prev_sample_mean,
        "prev_sample": prev_sample,
    }
    if reference_prev_sample_mean is not None:
        named["reference_prev_sample_mean"] = reference_prev_sample_mean
    plan = check_call(objective, named, advantages)
    weights = (row_weights, threshold_weights, kl_weight, reference_kl)
    shared = kl_weight if kl_weight.__class__ is float else shared_kl(kl_weight)
    settings = settings_of(
        objective, plan.numel, False, reference_prev_sample_mean is not None, dt is not None, single_pass, reduction,
        latent_reduction, log_prob, advantage_clip, shared, reference_kl,
    )  # fmt: skip
    table, values = mean_step(std, dt, plan.rows, plan.device, plan.dtype)
    source = RowSource(
        prev_sample_mean.detach(), old_prev_sample_mean, prev_sample, reference_prev_sample_mean,
        None, table, values, 0, 0, _MEAN,
    )  # fmt: skip
    return run(
        prev_sample_mean, source, plan, settings, advantages, weights, old_log_prob, reduction, single_pass, backend
    )


def fused_dppo_velocity_loss(
    velocity: Tensor,
    old_velocity: Tensor,
    noise: Tensor | PhiloxNoise,
    step: SDEStep,
    advantages: Tensor,
    *,
    threshold: float = 1e-5,
    symmetric: bool = False,
    trust_region: TrustRegionName = "kl",
    reference_velocity: Tensor | None = None,
    kl_weight: float | Tensor = 0.0,
    reference_kl: ReferenceKL = "gaussian",
    advantage_clip: float | None = None,
    old_log_prob: Tensor | None = None,
    row_weights: Tensor | None = None,
    threshold_weights: Tensor | None = None,
    reduction: Reduction = "mean",
    latent_reduction: Literal["mean", "sum"] = "mean",
    log_prob: LogProbKind = "gaussian",
    single_pass: bool | None = None,
    backend: BackendName = "auto",
) -> LossOutput:
    """Flow-DPPO (arXiv 2606.11025, Eq. 14 and 18) on velocities: :func:`fused_policy_velocity_loss` with :class:`DPPO`.

    Args:
        velocity: ``[rows, *latent]`` new model output, float32, bfloat16, float16 or float64; the only argument that
            gets a gradient.
        old_velocity: same shape, the rollout policy's output, in the model's dtype.
        noise: same shape, the standard normal noise that was drawn, or :class:`PhiloxNoise` to regenerate it.
        step: the :class:`SDEStep` of the rows: one for all, or stacked to broadcast against the rows.
        advantages: ``[B]`` or ``[B, S]``, floating point: one per row, and what says which leading dims are rows.
        threshold: bound on the mean-reduced KL, nats per latent element, > 0. Default 1e-5 (UniRL, verl-omni,
            FLUX.1-dev); 1e-6: Flow-Factory SD3.5, FLUX.2.
        symmetric: drop every far row, not only those that move away (an ablation). Default False.
        trust_region: the divergence that is bounded: ``"kl"`` (default; exact for Gaussians of equal variance),
            ``"mean_drift"`` (``mean((mu-mu_old)**2)/2``) or
            ``"velocity_drift"`` (``mean((v-v_old)**2)``).
        reference_velocity: same shape, the reference policy's output, for a KL term and its metric. Default None.
        kl_weight: weight of the KL to the reference policy, >= 0, or one of any sign per row (a tensor as
            ``row_weights``); needs a reference. Default 0.
        reference_kl: ``"gaussian"`` (default), ``"without_dt"`` for flow_grpo's ``(mu-mu_ref)**2 /
            (2*std_dev_t**2)`` of the SDE samplers, where ``S = std_dev_t * sqrt(-dt)``, or without a scale
            ``"mean_mse"`` for ``mean((mu-mu_ref)**2)`` and ``"velocity_mse"`` for ``mean((v-v_ref)**2)`` (velocities
            only). The metric stays a KL.
        advantage_clip: clamp advantages to ``[-c, c]`` first (Flow-Factory, DanceGRPO: 5), > 0. Default None: as they
            are.
        old_log_prob: ``[rows]`` rollout log-probs in nats, mean-reduced, with normaliser: ``L = logp_new -
            old_log_prob`` instead of ``P - Q/2``. For trainers that have nothing else; loses precision (two numbers of
            order 1 are subtracted). Default None.
        row_weights: ``[rows]`` weights on row losses (rollout correction). Default None: 1.
        threshold_weights: ``[rows]`` what the objective's threshold is multiplied by, and the strength of its penalty
            divided by, > 0: a bound per step. Default None: 1.
        reduction: over rows: ``"mean"`` (default; dropped rows stay in the denominator), ``"kept"`` (the sum over the
            number of kept rows; metrics stay means of all), ``"sum"`` or ``"none"``.
        latent_reduction: over latent elements: ``"mean"`` (default), or ``"sum"`` to multiply log-ratio and KL by N.
        log_prob: ``"gaussian"`` (default), or ``"unnormalized"`` for trainers whose CPS log-prob drops ``1/(2*S**2)``
            and the normaliser.
        single_pass: when the gradient is made. None (default): together with the loss where that is quicker, which is
            on a CPU; ``loss.backward()`` then has nothing left to read. False: in ``backward``. True: together with the
            loss, also where nothing requires a gradient; it is :attr:`LossOutput.grad`. ``"none"`` has no such form.
        backend: ``"auto"`` (default) or a name from :data:`flowdppo_fast.BACKENDS`; a named one that cannot run is an
            error.

    Returns:
        :class:`~flowdppo_fast.results.LossOutput`; ``loss`` is differentiable.

    Raises:
        ValueError, TypeError: an argument of wrong shape, dtype, device or value; the message names it.
        RuntimeError: the named backend cannot run here.
    """
    return fused_policy_velocity_loss(
        velocity,
        old_velocity,
        noise,
        step,
        advantages,
        objective=dppo(threshold, symmetric, trust_region),
        reference_velocity=reference_velocity,
        kl_weight=kl_weight,
        reference_kl=reference_kl,
        advantage_clip=advantage_clip,
        old_log_prob=old_log_prob,
        row_weights=row_weights,
        threshold_weights=threshold_weights,
        reduction=reduction,
        latent_reduction=latent_reduction,
        log_prob=log_prob,
        single_pass=single_pass,
        backend=backend,
    )


def fused_dppo_loss(
    prev_sample_mean: Tensor,
    old_prev_sample_mean: Tensor,
    prev_sample: Tensor,
    std: float | Tensor,
    advantages: Tensor,
    *,
    threshold: float = 1e-5,
    symmetric: bool = False,
    trust_region: Literal["kl", "mean_drift"] = "kl",
    dt: float | Tensor | None = None,
    reference_prev_sample_mean: Tensor | None = None,
    kl_weight: float | Tensor = 0.0,
    reference_kl: ReferenceKL = "gaussian",
    advantage_clip: float | None = None,
    old_log_prob: Tensor | None = None,
    row_weights: Tensor | None = None,
    threshold_weights: Tensor | None = None,
    reduction: Reduction = "mean",
    latent_reduction: Literal["mean", "sum"] = "mean",
    log_prob: LogProbKind = "gaussian",
    single_pass: bool | None = None,
    backend: BackendName = "auto",
) -> LossOutput:
    """Flow-DPPO (arXiv 2606.11025, Eq. 14 and 18) on step means: :func:`fused_policy_loss` with :class:`DPPO`.

    Args:
        prev_sample_mean: ``[rows, *latent]`` mean of the new policy's step, float32, bfloat16, float16 or float64; the
            only argument that gets a gradient.
        old_prev_sample_mean: same shape, the rollout policy's mean. Keep it in float32: bfloat16 means inflate the KL.
        prev_sample: same shape, the next state ``x'`` that was drawn.
        std: standard deviation ``S`` of the step in latent units (``std_dev_t * sqrt(-dt)`` for Flow-SDE), > 0: a
            number, or a tensor that broadcasts to the rows, trailing dims of size 1 allowed (``[B, 1, 1, 1]``).
        advantages: ``[B]`` or ``[B, S]``, floating point: one per row, and what says which leading dims are rows.
        threshold: bound on the mean-reduced KL, nats per latent element, > 0. Default 1e-5 (UniRL, verl-omni,
            FLUX.1-dev); 1e-6: Flow-Factory SD3.5, FLUX.2.
        symmetric: drop every far row, not only those that move away (an ablation). Default False.
        trust_region: the divergence that is bounded: ``"kl"`` (default; exact for Gaussians of equal variance),
            ``"mean_drift"`` (``mean((mu-mu_old)**2)/2``).
        dt: ``sigma_next - sigma``, negative, a number or a tensor like ``std``; ``reference_kl="without_dt"`` needs it.
            Default None.
        reference_prev_sample_mean: same shape, the reference policy's mean, for a KL term and its metric. Default None.
        kl_weight: weight of the KL to the reference policy, >= 0, or one of any sign per row (a tensor as
            ``row_weights``); needs a reference. Default 0.
        reference_kl: ``"gaussian"`` (default), ``"without_dt"`` for flow_grpo's ``(mu-mu_ref)**2 /
            (2*std_dev_t**2)`` of the SDE samplers, where ``S = std_dev_t * sqrt(-dt)``, or without a scale
            ``"mean_mse"`` for ``mean((mu-mu_ref)**2)`` and ``"velocity_mse"`` for ``mean((v-v_ref)**2)`` (velocities
            only). The metric stays a KL.
        advantage_clip: clamp advantages to ``[-c, c]`` first (Flow-Factory, DanceGRPO: 5), > 0. Default None: as they
            are.
        old_log_prob: ``[rows]`` rollout log-probs in nats, mean-reduced, with normaliser: ``L = logp_new -
            old_log_prob`` instead of ``P - Q/2``. For trainers that have nothing else; loses precision (two numbers of
            order 1 are subtracted). Default None.
        row_weights: ``[rows]`` weights on row losses (rollout correction). Default None: 1.
        threshold_weights: ``[rows]`` what the objective's threshold is multiplied by, and the strength of its penalty
            divided by, > 0: a bound per step. Default None: 1.
        reduction: over rows: ``"mean"`` (default; dropped rows stay in the denominator), ``"kept"`` (the sum over the
            number of kept rows; metrics stay means of all), ``"sum"`` or ``"none"``.
        latent_reduction: over latent elements: ``"mean"`` (default), or ``"sum"`` to multiply log-ratio and KL by N.
        log_prob: ``"gaussian"`` (default), or ``"unnormalized"`` for trainers whose CPS log-prob drops ``1/(2*S**2)``
            and the normaliser.
        single_pass: when the gradient is made. None (default): together with the loss where that is quicker, which is
            on a CPU; ``loss.backward()`` then has nothing left to read. False: in ``backward``. True: together with the
            loss, also where nothing requires a gradient; it is :attr:`LossOutput.grad`. ``"none"`` has no such form.
        backend: ``"auto"`` (default) or a name from :data:`flowdppo_fast.BACKENDS`; a named one that cannot run is an
            error.

    Returns:
        :class:`~flowdppo_fast.results.LossOutput`; ``loss`` is differentiable.

    Raises:
        ValueError, TypeError: an argument of wrong shape, dtype, device or value; the message names it.
        RuntimeError: the named backend cannot run here.
    """
    return fused_policy_loss(
        prev_sample_mean,
        old_prev_sample_mean,
        prev_sample,
        std,
        advantages,
        objective=dppo(threshold, symmetric, trust_region),
        dt=dt,
        reference_prev_sample_mean=reference_prev_sample_mean,
        kl_weight=kl_weight,
        reference_kl=reference_kl,
        advantage_clip=advantage_clip,
        old_log_prob=old_log_prob,
        row_weights=row_weights,
        threshold_weights=threshold_weights,
        reduction=reduction,
        latent_reduction=latent_reduction,
        log_prob=log_prob,
        single_pass=single_pass,
        backend=backend,
    )


def row_statistics(
    velocity: Tensor,
    old_velocity: Tensor,
    noise: Tensor | PhiloxNoise,
    step: SDEStep,
    *,
    row_dims: int = 1,
    second_moment: bool = False,
    backend: BackendName = "auto",
) -> tuple[Tensor, ...]:
    """The differentiable primitive: ``(P, Q)``, from which any objective is a few lines on ``[rows]`` tensors.

    KL is ``Q/2``, the log-ratio ``P - Q/2``, the mean-squared drift ``S**2 * Q``. With ``E`` the new log-prob is
    ``-(E - 2*P + Q)/2 - log S - log(2*pi)/2``, mean-reduced.

    Args:
        velocity: ``[rows, *latent]`` new model output; the only argument that gets a gradient.
        old_velocity: same shape, the rollout policy's output.
        noise: same shape, the standard normal noise that was drawn, or :class:`PhiloxNoise` to regenerate it.
        step: the :class:`SDEStep` of the rows: one for all, or stacked to broadcast against the rows.
        row_dims: how many leading dims are rows: 1 (default) or 2.
        second_moment: also return ``E = mean(e*e)``. Default False.
        backend: as for the losses. Default ``"auto"``.

    Returns:
        ``(P, Q)``, or ``(P, Q, E)``, shaped like the rows, float32 (float64 for float64 velocities); ``P`` and ``Q``
        are differentiable in ``velocity``.

    Raises:
        ValueError, TypeError: an argument of wrong shape, dtype, device or value; the message names it.
        RuntimeError: the named backend cannot run here.
    """
    if not isinstance(velocity, torch.Tensor):
        raise TypeError(f"velocity: got {type(velocity).__name__}, expected a tensor")
    layout.check_row_dims(row_dims)
    shape = tuple(velocity.shape[:row_dims])
    named = {"velocity": velocity, "old_velocity": old_velocity}
    if isinstance(noise, torch.Tensor):
        stored = named["noise"] = noise
    else:
        stored = None
        check_seeded(noise)
    plan = plan_of(named, shape, "velocity")
    table, values = velocity_step(step, shape, plan.device, plan.dtype)
    streams, seed, first_stream = (None, 0, 0) if stored is not None else streams_of(noise, plan)
    name = resolve_backend(backend, plan.device.type, plan.dtype)
    source = RowSource(
        velocity.detach(), old_velocity, stored, None, streams, table, values, seed, first_stream, _VELOCITY
    )
    stats = RowStatistics.apply(velocity, RowCall(plan.in_rows(source), plan, name), second_moment)
    p, q = stats[0].reshape(shape), stats[1].reshape(shape)
    return (p, q, stats[2].detach().reshape(shape)) if second_moment else (p, q)
