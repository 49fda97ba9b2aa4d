"""MixGRPO (Tencent-Hunyuan/MixGRPO): its two step functions and the loss of its ``train_one_step``, fused.

Nothing of MixGRPO is imported. Both steps keep their signatures, and :func:`record` keeps their means. The DPM-Solver
steps after the window are deterministic updates and stay the trainer's own.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..backend import BackendName
from ..epilogue import LOG_SQRT_2PI
from ..objectives import RatioClip
from ..results import LossOutput
from ..samplers import ScheduleLevels, SDEStep
from ..sampling import sde_step
from ._record import Seen, StepRecord
from ._rows import clip_pair, log_prob_policy_loss
from .dance_grpo import dance_step, dppo_loss_from_sample, policy_loss_from_sample, read_dance_step, transition_std

__all__ = [
    "dance_grpo_step",
    "dppo_loss_from_sample",
    "flow_grpo_step",
    "policy_loss_from_sample",
    "ratio_clip_loss",
    "record",
    "transition_std",
]


def record(*, modules: Sequence[Any] = ()) -> StepRecord:
    """Keeps means of MixGRPO's steps, as :func:`flowdppo_fast.integrations.dance_grpo.record` does of DanceGRPO's.

    ``old.means()`` has a column for every step of the schedule, as ``all_log_probs`` has, those outside the window and
    those of DPM-Solver included. They are never trained on. A DPM-Solver step with noise is an error, because a replay
    of it draws another state instead of scoring the recorded one.

    Args:
        modules: modules outside the package ``fastvideo`` and the script that call the steps.
    """
    readers = {"flow_grpo_step": _read_flow_step, "dance_grpo_step": _read_dance_step, "dpm_step": _read_dpm_step}
    return StepRecord(readers, "fastvideo", tuple(modules), "means")


def _read_flow_step(step: Callable[..., Any], call: inspect.BoundArguments) -> tuple[Any, Seen]:
    named = call.arguments
    result = flow_grpo_step(**named)
    mean, std = result[3:]
    return result, Seen(mean, named["model_output"], std, named["prev_sample"] is None, int(named["index"]))  # type: ignore[arg-type]


def _read_dance_step(step: Callable[..., Any], call: inspect.BoundArguments) -> tuple[Any, Seen | None]:
    return read_dance_step(dance_grpo_step, call)


def _read_dpm_step(step: Callable[..., Any], call: inspect.BoundArguments) -> tuple[Any, Seen]:
    named = call.arguments
    if named["sde_solver"]:
        raise ValueError(
            "dpm_apply_strategy: got a DPM-Solver step with noise, expected DPM-Solver after the window alone; its "
            "replay draws a state of its own, so set --dpm_apply_strategy post, or --dpm_algorithm_type null"
        )
    result = step(*call.args, **call.kwargs)
    return result, Seen(result[0], named["model_output"], 0.0, True, int(named["step_index"]))


def flow_grpo_step(
    model_output: Tensor,
    latents: Tensor,
    eta: float,
    sigmas: Tensor,
    index: int,
    prev_sample: Tensor | None,
    generator: torch.Generator | None = None,
    determistic: bool = False,
    *,
    backend: BackendName = "auto",
) -> tuple[Tensor | None, ...]:
    """MixGRPO's Flow-SDE step under its signature (spelling included), fused and differentiable in ``model_output``.

    Args:
        model_output, latents: ``[B, *latent]`` of any rank.
        eta: noise level.
        sigmas: ``[T+1]`` levels; best kept on the CPU.
        index: step index.
        prev_sample: the next state of a recorded step, or None to draw it.
        generator: source of the noise.
        determistic: take the ODE step; the log-prob is the stochastic step's density of it.
        backend: as for the losses.

    Returns:
        ``(prev_sample, pred_original, log_prob [B], mean, std)``; ``std`` is the standard deviation of the step, 0-d.
        ``pred_original`` is detached, and None when ``prev_sample`` was given.

    Raises:
        ValueError: a generator together with ``prev_sample``.
    """
    if prev_sample is not None and generator is not None:
        raise ValueError("generator: got one together with prev_sample, expected one source of the next state")
    levels = [float(level) for level in sigmas.tolist()]
    sigma, sigma_next = levels[index], levels[index + 1]
    schedule = ScheduleLevels.from_sigmas(levels)
    step = SDEStep.from_sigmas("flow_sde", sigma, sigma_next, eta=float(eta), schedule=schedule)
    original = None
    if prev_sample is None:
        with torch.no_grad():
            original = latents - sigma * model_output
    if determistic:
        prev_sample = (latents + (sigma_next - sigma) * model_output).detach()
    result = sde_step(
        latents,
        model_output,
        step,
        generator=generator if prev_sample is None else None,
        prev_sample=None if prev_sample is None else prev_sample.detach(),
        return_mean=True,
        log_prob="gaussian",
        backend=backend,
    )
    std = torch.full((), step.std, device=latents.device, dtype=result.mean.dtype)  # type: ignore[arg-type, union-attr]
    return result.prev_sample, original, result.log_prob, result.mean, std


def dance_grpo_step(
    model_output: Tensor,
    latents: Tensor,
    eta: float,
    sigmas: Tensor,
    index: int,
    prev_sample: Tensor | None,
    grpo: bool,
    sde_solver: bool,
    *,
    return_mean: bool = False,
    backend: BackendName = "auto",
) -> tuple[Tensor | None, ...]:
    """MixGRPO's Dance step under its signature, fused.

    It differs from :func:`flowdppo_fast.integrations.dance_grpo.flux_step` in two ways, both as in MixGRPO: without
    ``sde_solver`` the next state is the mean itself, and log-probs carry no normaliser (it cancels in the ratio).

    Arguments and results are otherwise those of ``flux_step``.
    """
    step = dance_step(eta, sigmas, index, sde_solver)
    original = None
    if prev_sample is None:
        with torch.no_grad():
            original = latents - float(sigmas[index]) * model_output
    action = prev_sample
    if action is None and (not grpo or not sde_solver):
        # the state stands in for an action that is not drawn: only the mean is wanted
        mean = sde_step(
            latents, model_output, step, prev_sample=latents.detach(), return_mean=True, backend=backend
        ).mean
        if not grpo:
            return mean, original
        action = mean.detach()  # type: ignore[union-attr]
    result = sde_step(
        latents,
        model_output,
        step,
        prev_sample=None if action is None else action.detach(),
        return_mean=return_mean,
        log_prob="gaussian",
        backend=backend,
    )
    log_prob = result.log_prob + (math.log(step.std) + LOG_SQRT_2PI)  # type: ignore[arg-type, operator]
    first: tuple[Tensor | None, ...] = (result.prev_sample, original, log_prob)  # type: ignore[assignment]
    return (*first, result.mean) if return_mean else first


def ratio_clip_loss(
    new_log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    *,
    clip_range: float | tuple[float, float] = 1e-4,
    adv_clip_max: float | None = 5.0,
    kl_coeff: float = 0.0,
    backend: BackendName = "auto",
) -> tuple[LossOutput, Tensor]:
    """The inline loss with MixGRPO's penalty on the distance to the *old* policy.

    Args:
        new_log_probs, old_log_probs, advantages: ``[B]``; the first one with gradient.
        clip_range: ``c`` or ``(low, high)``.
        adv_clip_max: clamp on advantages.
        kl_coeff: weight of the penalty.
        backend: as for the losses.

    Returns:
        the clip loss, and ``kl_loss = mean((new - old)**2) / 2``; the script's loss is ``out.loss + kl_coeff *
        kl_loss`` and ``out.loss`` already contains it.
    """
    out = log_prob_policy_loss(
        RatioClip(*clip_pair(clip_range)),
        new_log_probs,
        old_log_probs,
        advantages.reshape(-1),
        1.0,
        advantage_clip=adv_clip_max,
        backend=backend,
    )
    kl_loss = 0.5 * (new_log_probs - old_log_probs.detach()).square().mean()
    return out._replace(loss=out.loss + kl_coeff * kl_loss), kl_loss.detach()
