"""flow_grpo (yifan123/flow_grpo): its sampler steps and the inline loss of its ``train_*.py`` scripts, fused.

Nothing of flow_grpo is imported. The scripts hold one dict per micro-batch, ``sample``, whose tensors are ``[B, T,
...]``: ``latents``, ``next_latents``, ``log_probs``, ``advantages`` and, for what is here, the rollout policy's
``prev_sample_mean`` or ``old_velocity``, which :func:`record` keeps around the sampling call. Guide with the changed
lines per script: ``docs/integrations/flow_grpo.md``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from ..backend import BackendName
from ..losses import fused_policy_loss, fused_policy_velocity_loss
from ..objectives import DPPO, GRPOGuard, LogProbKind, Objective, RatioClip, ReferenceKL
from ..results import LossOutput
from ..samplers import SDEStep, on_host
from ..sampling import sde_step, sde_step_with_logprob
from ..schedule import HostSchedule, per_row
from ._record import Seen, StepRecord
from ._rows import clip_pair, log_prob_policy_loss, squared_drift

__all__ = [
    "dppo_loss_from_sample",
    "dppo_velocity_loss_from_sample",
    "grpo_guard_loss_from_sample",
    "policy_loss_from_sample",
    "ratio_clip_loss_from_sample",
    "record",
    "recover_noise",
    "sampler_step",
    "sde_step_with_logprob",
    "training_info",
    "velocity_policy_loss_from_sample",
    "wan_sde_step_with_logprob",
]

_SAMPLERS = {"sde": "flow_sde", "cps": "cps", "wan": "wan"}


def record(*, keep: Literal["means", "velocities"] = "means", modules: Sequence[Any] = ()) -> StepRecord:
    """Keeps the old policy of a rollout: ``with flow_grpo.record() as old:`` around ``pipeline_with_logprob(...)``.

    While it is open, it looks on as the pipeline's ``sde_step_with_logprob`` runs, whichever that is, and keeps a
    column for each step that draws noise: all steps, or those of the window of a Fast pipeline. Steps without noise and
    recorded states that are scored again are no columns.

    Args:
        keep: ``"means"``: ``old.means()`` is ``sample["prev_sample_mean"]``, ``[B, T, *latent]`` float32.
            ``"velocities"``: ``old.velocities()`` is ``sample["old_velocity"]``, in the dtype the step was given.
        modules: modules outside the package ``flow_grpo`` whose ``sde_step_with_logprob`` the pipeline calls.

    Raises:
        RuntimeError: no loaded module has the step function.
    """
    return StepRecord({"sde_step_with_logprob": _read_step}, "flow_grpo", tuple(modules), keep)


def _read_step(step: Callable[..., Any], call: inspect.BoundArguments) -> tuple[Any, Seen]:
    """Either step of flow_grpo: that of the images, with its ``noise_level``, and that of Wan."""
    result, named = step(*call.args, **call.kwargs), call.arguments
    silent = named["prev_sample"] is not None or named.get("determistic", False) or named.get("noise_level") == 0.0
    timestep = float(torch.as_tensor(named["timestep"]).reshape(-1)[0])
    return result, Seen(result[2], named["model_output"], result[3], not silent, -timestep)


def wan_sde_step_with_logprob(
    scheduler: Any,
    model_output: Tensor,
    timestep: Tensor,
    sample: Tensor,
    prev_sample: Tensor | None = None,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    determistic: bool = False,
    return_pixel_log_prob: bool = False,
    return_dt_and_std_dev_t: bool = False,
) -> tuple[Tensor, ...]:
    """The step of flow_grpo's Wan pipeline under its signature (spelling included), fused.

    Args:
        scheduler: a diffusers flow scheduler with ``sigmas`` and ``timesteps``.
        model_output, sample: ``[B, *latent]`` of any rank (videos: ``[B, C, T, H, W]``).
        timestep: ``[B]`` or ``[1]`` timesteps of the schedule.
        prev_sample: the next state of a recorded step.
        generator: source of the noise when ``prev_sample`` is None.
        determistic: take the ODE step instead; the log-prob is then the stochastic step's density of it.
        return_pixel_log_prob: accepted and without effect, as in flow_grpo.
        return_dt_and_std_dev_t: see Returns.

    Returns:
        ``(prev_sample, log_prob [B], prev_sample_mean, std)`` in float32, where ``std`` is the standard deviation
        ``std_dev_t * sqrt(-dt)`` of the step; or, if asked, ``(..., std_dev_t, sqrt_dt)`` apart. They are
        ``[len(timestep), 1, ...]``.

    Raises:
        ValueError: a timestep outside the schedule, or a generator together with ``prev_sample``.
    """
    if prev_sample is not None and generator is not None:
        raise ValueError("generator: got one together with prev_sample, expected one source of the next state")
    step = sampler_step(scheduler, timestep, sde_type="wan")
    x, v = sample.float(), model_output.float()
    if determistic:
        dt = per_row(step.dt, sample)
        prev_sample = (x + dt * v).detach()
    result = sde_step(
        x,
        v,
        step,
        generator=generator if prev_sample is None else None,
        prev_sample=None if prev_sample is None else prev_sample.detach().float(),
        return_mean=True,
        log_prob="gaussian",
    )
    sqrt_dt = torch.sqrt(-on_host(step.dt))
    numbers = (step.std / sqrt_dt, sqrt_dt) if return_dt_and_std_dev_t else (step.std,)
    shaped = (per_row(x, sample).expand(timestep.numel(), *(1,) * (sample.ndim - 1)) for x in numbers)
    return result.prev_sample, result.log_prob, result.mean, *shaped  # type: ignore[arg-type, return-value]


def sampler_step(scheduler: Any, timestep: Tensor, *, sde_type: str = "sde", noise_level: float = 0.7) -> SDEStep:
    """The :class:`SDEStep` of ``timestep`` under flow_grpo's samplers, for losses on velocities.

    Args:
        scheduler: a diffusers flow scheduler with ``sigmas`` and ``timesteps``.
        timestep: ``[B]`` timesteps of the schedule; one sync to read them.
        sde_type: ``"sde"``, ``"cps"`` or ``"wan"``.
        noise_level: eta, without effect for ``"wan"``.

    Returns:
        one scalar step if all timesteps are equal, else steps stacked to ``[B]``.

    Raises:
        ValueError: unknown ``sde_type``, or a timestep outside the schedule.
    """
    host = HostSchedule.of(scheduler)
    return host.step(_sampler(sde_type), host.indices(timestep), noise_level)


def recover_noise(step: SDEStep, sample: Tensor, prev_sample: Tensor, old_velocity: Tensor) -> Tensor:
    """The noise ``e = (x' - mu_old) / S`` of recorded steps, ``[B, *latent]`` float32.

    For loops that stored states and old velocities but no noise. Once per step and rollout is enough: keep the result
    in place of ``next_latents``.

    Args:
        step: the step of the rows.
        sample, prev_sample: ``[B, *latent]`` states before and after it.
        old_velocity: ``[B, *latent]`` velocity of the rollout policy.
    """
    with torch.no_grad():
        mean = sde_step(sample, old_velocity, step, prev_sample=prev_sample, return_mean=True).mean
        std = on_host(step.std).to(mean)  # type: ignore[arg-type]
        return (prev_sample - mean) / std.reshape((-1,) + (1,) * (sample.ndim - 1))  # type: ignore[operator]


def policy_loss_from_sample(
    objective: Objective,
    sample: Mapping[str, Tensor],
    j: int,
    prev_sample_mean: Tensor,
    std_dev_t: Tensor,
    sqrt_dt: Tensor | None = None,
    *,
    scheduler: Any = None,
    sde_type: str = "sde",
    log_prob: Tensor | None = None,
    prev_sample_mean_ref: Tensor | None = None,
    beta: float = 0.0,
    adv_clip_max: float | None = 5.0,
    reference_kl: ReferenceKL | None = None,
    backend: BackendName = "auto",
) -> LossOutput:
    """The loss of one (micro-batch, timestep) under any objective, from what ``compute_log_prob`` returns.

    Two forms. Without ``log_prob`` the log-ratio comes from the means in the same pass as everything else: no
    cancellation of two log-probs, ``sample["log_probs"]`` is not read, and the log-prob's own graph is never walked.
    With ``log_prob`` it is the script's ``log_prob - sample["log_probs"][:, j]``; one pass over the means adds the
    divergence.

    Args:
        objective: :class:`~flowdppo_fast.DPPO`, ``RatioClip``, ``GRPOGuard`` or ``Unclipped``.
        sample: the script's dict. Read: ``advantages [B, T]``, ``prev_sample_mean [B, T, *latent]`` (the rollout's
            means) and ``next_latents [B, T, *latent]``, or with ``log_prob`` ``log_probs [B, T]``. A ratio clip with
            ``log_prob`` and no stored mean reads no latents at all.
        j: timestep column.
        prev_sample_mean: ``[B, *latent]`` mean of the current policy, with gradient.
        std_dev_t, sqrt_dt: as the step function returned them (``return_sqrt_dt=True``, for Wan
            ``return_dt_and_std_dev_t=True``); ``sqrt_dt`` may be left out for ``"cps"``, and with a ``scheduler``.
        scheduler: the pipeline's, from which ``sqrt_dt`` is made for ``sample["timesteps"][:, j]``; one sync.
        sde_type: ``"sde"``, ``"cps"`` or ``"wan"``. CPS log-ratios keep the scripts' scale, ``-mean((x'-mu)**2)``.
        log_prob: ``[B]`` log-prob of the current policy, with gradient, for the second form.
        prev_sample_mean_ref, beta: mean of the reference policy and weight of the KL to it.
        adv_clip_max: clamp on advantages (``config.train.adv_clip_max``), None for none.
        reference_kl: ``"without_dt"`` or ``"gaussian"``; None takes what the script of ``sde_type`` has: without dt for
            ``"sde"``, the exact KL for ``"wan"`` and ``"cps"`` (there ``std_dev_t`` is the standard deviation).
        backend: as for the losses.

    Returns:
        :class:`~flowdppo_fast.results.LossOutput`; :func:`training_info` has the script's log names.

    Raises:
        ValueError: unknown ``sde_type``, ``sqrt_dt`` missing, or a key that ``sample`` lacks; the message names it.
    """
    _sampler(sde_type)
    if sqrt_dt is None and scheduler is not None:
        dt = sampler_step(scheduler, _column(sample, "timesteps", j), sde_type=sde_type).dt
        sqrt_dt = torch.sqrt(-per_row(dt, prev_sample_mean)).to(std_dev_t)
    if sqrt_dt is None and sde_type != "cps":
        raise ValueError(
            f"sqrt_dt: got None, expected sqrt(-dt) for sde_type={sde_type!r}; pass scheduler=pipeline.scheduler, or "
            "call the step function with return_sqrt_dt=True (Wan: return_dt_and_std_dev_t=True)"
        )
    shared = {
        "advantage_clip": adv_clip_max,
        "kl_weight": beta,
        "reference_kl": reference_kl or ("without_dt" if sde_type == "sde" else "gaussian"),
        "backend": backend,
    }
    convention: LogProbKind = "unnormalized" if sde_type == "cps" else "gaussian"
    advantages = _column(sample, "advantages", j)
    if log_prob is None:
        return fused_policy_loss(
            prev_sample_mean,
            _column(sample, "prev_sample_mean", j),
            _column(sample, "next_latents", j),
            _std(std_dev_t, sqrt_dt, sde_type),
            advantages,
            objective=objective,
            dt=None if sqrt_dt is None else -(sqrt_dt**2),
            reference_prev_sample_mean=prev_sample_mean_ref,
            log_prob=convention,
            **shared,  # type: ignore[arg-type]
        )
    if isinstance(objective, GRPOGuard) and objective.bias == "batch":
        # the script averages every number of the step over the batch, not the bias alone
        std_dev_t, sqrt_dt = std_dev_t.mean(), None if sqrt_dt is None else sqrt_dt.mean()
    drift = reference_drift = None
    if isinstance(objective, (DPPO, GRPOGuard)):
        # a mask passes no gradient on, the guard's bias does
        new = prev_sample_mean.detach() if isinstance(objective, DPPO) else prev_sample_mean
        drift = squared_drift(new, _column(sample, "prev_sample_mean", j), backend=backend)
    if prev_sample_mean_ref is not None:
        reference_drift = squared_drift(prev_sample_mean, prev_sample_mean_ref, backend=backend)
    return log_prob_policy_loss(
        objective,
        log_prob,
        _column(sample, "log_probs", j),
        advantages,
        _std(std_dev_t, sqrt_dt, sde_type),
        dt=None if sqrt_dt is None else -(sqrt_dt**2),
        drift=drift,
        reference_drift=reference_drift,
        log_prob_kind=convention,
        **shared,  # type: ignore[arg-type]
    )


def dppo_loss_from_sample(
    sample: Mapping[str, Tensor],
    j: int,
    prev_sample_mean: Tensor,
    std_dev_t: Tensor,
    sqrt_dt: Tensor | None = None,
    *,
    threshold: float = 1e-5,
    **options: Any,
) -> LossOutput:
    """Flow-DPPO in place of the inline clip loss: :func:`policy_loss_from_sample` with ``DPPO(threshold)``.

    Args:
        threshold: bound on the mean-reduced KL, nats per latent element.
        options: keywords of :func:`policy_loss_from_sample`, which also has the other arguments.
    """
    return policy_loss_from_sample(DPPO(threshold), sample, j, prev_sample_mean, std_dev_t, sqrt_dt, **options)


def ratio_clip_loss_from_sample(
    sample: Mapping[str, Tensor],
    j: int,
    prev_sample_mean: Tensor,
    std_dev_t: Tensor,
    sqrt_dt: Tensor | None = None,
    *,
    clip_range: float | tuple[float, float] = 1e-4,
    **options: Any,
) -> LossOutput:
    """The inline loss as it is (``config.train.clip_range``): :func:`policy_loss_from_sample` with ``RatioClip``.

    Args:
        clip_range: ``c`` or ``(low, high)``.
        options: keywords of :func:`policy_loss_from_sample`, which also has the other arguments.
    """
    objective = RatioClip(*clip_pair(clip_range))
    return policy_loss_from_sample(objective, sample, j, prev_sample_mean, std_dev_t, sqrt_dt, **options)


def grpo_guard_loss_from_sample(
    sample: Mapping[str, Tensor],
    j: int,
    prev_sample_mean: Tensor,
    std_dev_t: Tensor,
    sqrt_dt: Tensor | None = None,
    *,
    clip_range: float | tuple[float, float] = 2e-6,
    bias: Literal["row", "batch"] = "row",
    **options: Any,
) -> LossOutput:
    """The loss of ``train_sd3_GRPO_Guard.py``: :func:`policy_loss_from_sample` with ``GRPOGuard``.

    Args:
        clip_range: ``c`` or ``(low, high)`` on the normalised ratio.
        bias: ``"row"`` (default) is GRPO-Guard as published: each row's own divergence. ``"batch"`` is what the script
            computes: its reduction runs over no dim but ends as one number for the batch; with ``log_prob`` given,
            ``std_dev_t`` and ``sqrt_dt`` are batch means too, as there.
        options: keywords of :func:`policy_loss_from_sample`, which also has the other arguments.
    """
    objective = GRPOGuard(*clip_pair(clip_range), bias)
    return policy_loss_from_sample(objective, sample, j, prev_sample_mean, std_dev_t, sqrt_dt, **options)


def velocity_policy_loss_from_sample(
    objective: Objective,
    sample: Mapping[str, Tensor],
    j: int,
    velocity: Tensor,
    step: SDEStep,
    *,
    velocity_ref: Tensor | None = None,
    beta: float = 0.0,
    adv_clip_max: float | None = 5.0,
    reference_kl: ReferenceKL | None = None,
    backend: BackendName = "auto",
) -> LossOutput:
    """The loss on velocities: half the bytes of float32 means, and the step function is not called at all.

    Args:
        objective: as in :func:`policy_loss_from_sample`.
        sample: read: ``advantages [B, T]``, ``old_velocity [B, T, *latent]`` (model output after guidance, model dtype)
            and ``noise [B, T, *latent]``, or where that is missing ``latents`` and ``next_latents``.
        j: timestep column.
        velocity: ``[B, *latent]`` model output after guidance, with gradient.
        step: :func:`sampler_step` of column ``j``; it says which sampler, and so which conventions.
        velocity_ref, beta, adv_clip_max, reference_kl, backend: as in :func:`policy_loss_from_sample`.

    Raises:
        ValueError: a key that ``sample`` lacks; the message names it.
    """
    old_velocity = _column(sample, "old_velocity", j)
    if "noise" in sample:
        noise = _column(sample, "noise", j)
    else:
        noise = recover_noise(step, _column(sample, "latents", j), _column(sample, "next_latents", j), old_velocity)
    return fused_policy_velocity_loss(
        velocity,
        old_velocity,
        noise,
        step,
        _column(sample, "advantages", j),
        objective=objective,
        reference_velocity=velocity_ref,
        advantage_clip=adv_clip_max,
        log_prob="unnormalized" if step.sampler == "cps" else "gaussian",
        kl_weight=beta,
        reference_kl=reference_kl or ("without_dt" if step.sampler == "flow_sde" else "gaussian"),
        backend=backend,
    )


def dppo_velocity_loss_from_sample(
    sample: Mapping[str, Tensor], j: int, velocity: Tensor, step: SDEStep, *, threshold: float = 1e-5, **options: Any
) -> LossOutput:
    """Flow-DPPO on velocities: :func:`velocity_policy_loss_from_sample` with ``DPPO(threshold)``.

    Args:
        threshold: bound on the mean-reduced KL, nats per latent element.
        options: keywords of :func:`velocity_policy_loss_from_sample`, which also has the other arguments.
    """
    return velocity_policy_loss_from_sample(DPPO(threshold), sample, j, velocity, step, **options)


def training_info(out: LossOutput) -> dict[str, Tensor]:
    """What the scripts append to ``info``, under their names, as 0-d device tensors (no sync).

    ``policy_loss``, ``approx_kl``, ``clipfrac*`` (clip objectives), ``kl_loss`` (with a reference), ``loss``, and every
    metric of the objective that the scripts do not have.

    Args:
        out: result of one of the losses here.
    """
    info = dict(out.metrics())
    if "kl_ref_mean" in info:
        info["kl_loss"] = info.pop("kl_ref_mean")
    info["loss"] = out.loss.detach()
    return info


def _sampler(sde_type: str) -> str:
    if sde_type not in _SAMPLERS:
        raise ValueError(f"sde_type: got {sde_type!r}, expected 'sde', 'cps' or 'wan'")
    return _SAMPLERS[sde_type]


def _std(std_dev_t: Tensor, sqrt_dt: Tensor | None, sde_type: str) -> Tensor:
    """Standard deviation of the step; CPS steps return it as ``std_dev_t``."""
    return std_dev_t if sde_type == "cps" or sqrt_dt is None else std_dev_t * sqrt_dt


def _column(sample: Mapping[str, Tensor], key: str, j: int) -> Tensor:
    """``sample[key][:, j]``, detached."""
    if key not in sample:
        raise ValueError(
            f"sample: got keys {sorted(sample)}, expected {key!r} among them; store it in the sampling loop "
            "(docs/integrations/flow_grpo.md shows where)"
        )
    return sample[key][:, j].detach()
