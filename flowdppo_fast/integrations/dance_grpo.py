"""DanceGRPO (XueZeyue/DanceGRPO): its ``flux_step`` with the mean returned, and the losses of its ``train_one_step``.

Nothing of DanceGRPO is imported. Its step function returns no mean, and its loops store none: :func:`record` keeps them
while a rollout or a replay runs. ``docs/integrations/dance_grpo.md`` shows the lines.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..backend import BackendName
from ..losses import fused_policy_loss
from ..objectives import DPPO, Objective, RatioClip
from ..results import LossOutput
from ..rows import stats_dtype
from ..samplers import SDEStep
from ..sampling import sde_step
from ._record import Seen, StepRecord
from ._rows import clip_pair, log_prob_policy_loss

__all__ = [
    "dppo_loss_from_sample",
    "flux_step",
    "policy_loss_from_sample",
    "ratio_clip_loss",
    "record",
    "transition_std",
]


def record(*, modules: Sequence[Any] = ()) -> StepRecord:
    """Keeps means of ``flux_step``: ``old = dance_grpo.record()``, and ``@old`` above ``def sample_reference_model(``.

    While the decorated function runs, :func:`flux_step` of this module is in the place of the script's. After a
    rollout ``old.means()`` is ``[B, T, *latent]``, in the order of the prompts. After a replay (``new =
    dance_grpo.record()`` and ``@new`` above ``def grpo_one_step(``) ``new.mean`` is the step's mean with its graph, and
    ``new.std`` its standard deviation.

    Args:
        modules: modules outside the package ``fastvideo`` and the script that call ``flux_step``.
    """
    return StepRecord({"flux_step": _read_flux_step}, "fastvideo", tuple(modules), "means")


def _read_flux_step(step: Callable[..., Any], call: inspect.BoundArguments) -> tuple[Any, Seen | None]:
    return read_dance_step(flux_step, call)


def read_dance_step(step: Callable[..., Any], call: inspect.BoundArguments) -> tuple[Any, Seen | None]:
    """Runs ``step``, of the signature of :func:`flux_step`: what was called for, and the mean."""
    named = call.arguments
    if not named["grpo"]:
        return step(**named), None
    *result, mean = step(**named, return_mean=True)
    index = int(named["index"])
    std = transition_std(named["eta"], named["sigmas"], index)
    return tuple(result), Seen(mean, named["model_output"], std, named["prev_sample"] is None, index)


def transition_std(eta: float, sigmas: Tensor, index: int) -> float:
    """Standard deviation ``eta * sqrt(sigma - sigma_next)`` of step ``index`` of ``sigmas [T+1]``, for the losses."""
    return float(eta) * math.sqrt(float(sigmas[index]) - float(sigmas[index + 1]))


def dance_step(eta: float, sigmas: Tensor, index: int, sde_solver: bool) -> SDEStep:
    """The affine step at ``index``; without ``sde_solver`` the mean is the ODE's, the noise the same."""
    sigma, sigma_next = float(sigmas[index]), float(sigmas[index + 1])
    if sde_solver:
        return SDEStep.from_sigmas("dance", sigma, sigma_next, eta=float(eta))
    dt = sigma_next - sigma
    return SDEStep(1.0, dt, float(eta) * math.sqrt(-dt), dt, "dance", sigma, sigma_next)


def flux_step(
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
    """DanceGRPO's step under its signature (all its ``train_grpo_*.py`` have the same one), fused and differentiable.

    Args:
        model_output, latents: ``[B, *latent]`` of any rank; the result is float32 (float64 for float64 latents).
        eta: diffusion coefficient.
        sigmas: ``[T+1]`` levels, best kept on the CPU (they are read as python numbers).
        index: step index.
        prev_sample: the next state of a recorded step, or None to draw it from torch's global generator.
        grpo: False returns the mean instead of a draw.
        sde_solver: add the score correction to the mean.
        return_mean: append the mean.
        backend: as for the losses.

    Returns:
        ``(prev_sample, pred_original, log_prob [B])`` and the mean if asked; with ``grpo=False``
        ``(mean, pred_original)``. ``pred_original = latents - sigma * model_output`` is what the last step decodes; it
        is detached, and None when ``prev_sample`` was given, where no script reads it.
    """
    step = dance_step(eta, sigmas, index, sde_solver)
    original = None
    if prev_sample is None:
        with torch.no_grad():
            original = latents - float(sigmas[index]) * model_output
    if not grpo:
        # the state itself as the next one: nothing is drawn for a mean
        mean = sde_step(
            latents, model_output, step, prev_sample=latents.detach(), return_mean=True, backend=backend
        ).mean
        return mean, original
    result = sde_step(
        latents,
        model_output,
        step,
        prev_sample=None if prev_sample is None else prev_sample.detach(),
        dtype=stats_dtype(latents),
        return_mean=return_mean,
        log_prob="gaussian",
        backend=backend,
    )
    first = (result.prev_sample, original, result.log_prob)
    return (*first, result.mean) if return_mean else first


def policy_loss_from_sample(
    objective: Objective,
    sample: Mapping[str, Tensor],
    j: int,
    prev_sample_mean: Tensor,
    std: float | Tensor,
    *,
    advantages: str = "advantages",
    adv_clip_max: float | None = 5.0,
    backend: BackendName = "auto",
) -> LossOutput:
    """The loss of one (sample, timestep) from the means; divide it as the script does, by accumulation and timesteps.

    Args:
        objective: :class:`~flowdppo_fast.DPPO`, ``RatioClip``, ``GRPOGuard`` or ``Unclipped``.
        sample: the script's dict after its permutation. Read: the advantages ``[B]``, ``next_latents [B, T, *latent]``
            and ``prev_sample_mean [B, T, *latent]``, which has to be permuted with the other keys.
        j: column after the permutation.
        prev_sample_mean: ``[B, *latent]``, with gradient: ``new.mean`` of a :func:`record`, or from
            ``flux_step(..., return_mean=True)``.
        std: ``new.std``, or :func:`transition_std` at the *permuted* index (``perms[i][j]``).
        advantages: their key; ``"vq_advantages"`` or ``"mq_advantages"`` in HunyuanVideo's script.
        adv_clip_max: clamp on advantages (``args.adv_clip_max``).
        backend: as for :func:`~flowdppo_fast.fused_policy_loss`.

    Raises:
        ValueError: a key that ``sample`` lacks.
    """
    for key in (advantages, "next_latents", "prev_sample_mean"):
        if key not in sample:
            raise ValueError(
                f"sample: got keys {sorted(sample)}, expected {key!r} among them; store it in the sampling loop "
                "(docs/integrations/dance_grpo.md shows where)"
            )
    return fused_policy_loss(
        prev_sample_mean,
        sample["prev_sample_mean"][:, j].detach(),
        sample["next_latents"][:, j].detach(),
        std,
        sample[advantages].detach().reshape(-1),
        objective=objective,
        advantage_clip=adv_clip_max,
        backend=backend,
    )


def dppo_loss_from_sample(
    sample: Mapping[str, Tensor],
    j: int,
    prev_sample_mean: Tensor,
    std: float | Tensor,
    *,
    threshold: float = 1e-5,
    **options: Any,
) -> LossOutput:
    """Flow-DPPO: :func:`policy_loss_from_sample` with ``DPPO(threshold)``.

    Args:
        threshold: bound on the mean-reduced KL, nats per latent element.
        options: keywords of :func:`policy_loss_from_sample`, which also has the other arguments.
    """
    return policy_loss_from_sample(DPPO(threshold), sample, j, prev_sample_mean, std, **options)


def ratio_clip_loss(
    new_log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    *,
    clip_range: float | tuple[float, float] = 1e-4,
    adv_clip_max: float | None = 5.0,
    backend: BackendName = "auto",
) -> LossOutput:
    """The inline clip loss from the script's own log-probs; nothing has to be stored for it.

    Args:
        new_log_probs, old_log_probs, advantages: ``[B]``; the first one with gradient.
        clip_range: ``c`` or ``(low, high)``.
        adv_clip_max: clamp on advantages (``args.adv_clip_max``).
        backend: as for :func:`~flowdppo_fast.fused_policy_loss`.
    """
    return log_prob_policy_loss(
        RatioClip(*clip_pair(clip_range)),
        new_log_probs,
        old_log_probs,
        advantages.reshape(-1),
        1.0,
        advantage_clip=adv_clip_max,
        backend=backend,
    )
