"""What each trainer computes, written out eagerly: its transition, its log-prob, its loss and its metrics.

Nothing here imports the library, and every reduction, sign, clamp, standard deviation and inequality is the trainer's.
In float64 these are what the integrations have to equal; in float32 they are what the trainers run today, which also
makes them the eager contenders of a benchmark: ``replay`` is what a training step evaluates per (micro-batch,
timestep), the functions below it are the losses on its result. All return ``(loss, metrics)`` with metrics as detached
0-d tensors under the trainer's names.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

Metrics = dict[str, Tensor]


def lift(row: Tensor | float, like: Tensor) -> Tensor:
    """One number per row, ``[B, 1, ...]``, beside ``[B, *latent]``."""
    row = torch.as_tensor(row, dtype=like.dtype)
    return row.reshape(row.shape + (1,) * (like.ndim - row.ndim))


def per_row_mean(x: Tensor, row_dims: int = 1) -> Tensor:
    return x.mean(dim=tuple(range(row_dims, x.ndim)))


# ---- transitions


class Replay(NamedTuple):
    """A replayed step: mean, mean-reduced log-prob ``[B]``, and the numbers trainers pass along with them.

    ``std_dev_t`` is what the trainer's step function returns under that name: the diffusion for Flow-SDE and Wan, the
    standard deviation for CPS; ``std`` is the standard deviation always. All three are ``[B, 1, ...]``.
    """

    mean: Tensor
    log_prob: Tensor
    std_dev_t: Tensor
    sqrt_dt: Tensor
    std: Tensor


def flow_sde(x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor, eta: float, sigma_max: float):
    """Flow-GRPO's reverse SDE: drift ``v`` plus half the squared diffusion times the noise direction over sigma."""
    guarded = torch.where(sigma == 1.0, torch.full_like(sigma, sigma_max), sigma)
    diffusion = eta * torch.sqrt(sigma / (1.0 - guarded))
    dt = sigma_next - sigma
    noise_estimate = x + (1.0 - sigma) * v
    mean = x + (v + diffusion**2 / (2.0 * sigma) * noise_estimate) * dt
    return mean, diffusion, diffusion * torch.sqrt(-dt)


def dance(x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor, eta: float, sigma_max: float):
    """DanceGRPO: an ODE step, then the score of the noised data estimate with constant diffusion ``eta``."""
    dt = sigma_next - sigma
    data_estimate = x - sigma * v
    score = (data_estimate * (1.0 - sigma) - x) / sigma**2
    mean = x + dt * v - 0.5 * eta**2 * score * dt
    diffusion = torch.full_like(sigma, eta)
    return mean, diffusion, diffusion * torch.sqrt(-dt)


def wan(x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor, first: float, last: float):
    """flow_grpo's Wan sampler: the Flow-SDE update with a diffusion that is linear in sigma."""
    diffusion = last + (first - last) * sigma
    dt = sigma_next - sigma
    mean = x + (v + diffusion**2 / (2.0 * sigma) * (x + (1.0 - sigma) * v)) * dt
    return mean, diffusion, diffusion * torch.sqrt(-dt)


def cps(x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor, eta: float, sigma_max: float):
    """Flow-CPS: mixes the data and noise estimates; fresh noise takes ``sigma' * sin`` of the circle."""
    std = sigma_next * math.sin(eta * math.pi / 2.0)
    data_estimate, noise_estimate = x - sigma * v, x + (1.0 - sigma) * v
    mean = (1.0 - sigma_next) * data_estimate + torch.sqrt(sigma_next**2 - std**2) * noise_estimate
    return mean, std, std


def gaussian_log_prob(x_next: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Mean-reduced log-density with normaliser, what every trainer takes for its SDE samplers."""
    density = -((x_next.detach() - mean) ** 2) / (2.0 * std**2) - torch.log(std) - math.log(math.sqrt(2.0 * math.pi))
    return per_row_mean(density)


def squared_log_prob(x_next: Tensor, mean: Tensor) -> Tensor:
    """The CPS log-prob of every trainer: factor and normaliser dropped."""
    return per_row_mean(-((x_next.detach() - mean) ** 2))


def replay(
    sampler: str,
    x: Tensor,
    v: Tensor,
    x_next: Tensor,
    sigma: Tensor,
    sigma_next: Tensor,
    eta: float,
    sigmas: list[float],
) -> Replay:
    """One recorded step ``x -> x_next`` under velocity ``v``; levels are ``[B]``."""
    now, after = lift(sigma, x), lift(sigma_next, x)
    if sampler == "wan":
        mean, std_dev_t, std = wan(x, v, now, after, sigmas[1], sigmas[-1])
    else:
        transition = {"flow_sde": flow_sde, "dance": dance, "cps": cps}[sampler]
        mean, std_dev_t, std = transition(x, v, now, after, eta, sigmas[1])
    log_prob = squared_log_prob(x_next, mean) if sampler == "cps" else gaussian_log_prob(x_next, mean, std)
    return Replay(mean, log_prob, std_dev_t, torch.sqrt(now - after), std)


# ---- ratio clipping


def _clip(ratio: Tensor, advantages: Tensor, low: float, high: float) -> Tensor:
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1.0 - low, 1.0 + high))


def flow_grpo_clip(
    log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor, *, clip_range: float, adv_clip_max: float = 5.0
) -> tuple[Tensor, Metrics]:
    """flow_grpo's inline loss (every ``train_*.py``): advantages clamped, approx_kl half the mean squared log-ratio."""
    adv = advantages.clamp(-adv_clip_max, adv_clip_max)
    log_ratio = log_prob - old_log_prob
    ratio = torch.exp(log_ratio)
    loss = _clip(ratio, adv, clip_range, clip_range).mean()
    metrics = {
        "approx_kl": 0.5 * (log_ratio**2).mean(),
        "clipfrac": ((ratio - 1.0).abs() > clip_range).to(ratio.dtype).mean(),
        "clipfrac_gt_one": (ratio - 1.0 > clip_range).to(ratio.dtype).mean(),
        "clipfrac_lt_one": (1.0 - ratio > clip_range).to(ratio.dtype).mean(),
        "policy_loss": loss,
    }
    return loss, _detach(metrics)


def flow_grpo_reference_kl(mean: Tensor, mean_ref: Tensor, std_dev_t: Tensor) -> Tensor:
    """The scripts' KL to the reference: over ``std_dev_t``, which lacks the ``-dt`` of the variance for ``sde``."""
    return per_row_mean((mean - mean_ref) ** 2 / (2.0 * std_dev_t**2)).mean()


def flow_grpo_wan_reference_kl(mean: Tensor, mean_ref: Tensor, std_dev_t: Tensor, sqrt_dt: Tensor) -> Tensor:
    """The Wan script's: over the variance."""
    return per_row_mean((mean - mean_ref) ** 2 / (2.0 * (std_dev_t * sqrt_dt) ** 2)).mean()


def flow_grpo_guard(
    log_prob: Tensor,
    old_log_prob: Tensor,
    mean: Tensor,
    old_mean: Tensor,
    std_dev_t: Tensor,
    sqrt_dt: Tensor,
    advantages: Tensor,
    *,
    clip_range: float,
    adv_clip_max: float = 5.0,
    bias: str = "batch",
) -> tuple[Tensor, Metrics]:
    """``train_sd3_GRPO_Guard.py``: numbers of the step and, as written there, the bias are means over the batch.

    ``bias="row"`` is the published formula: each row its own divergence and its own step.
    """
    adv = advantages.clamp(-adv_clip_max, adv_clip_max)
    log_ratio = log_prob - old_log_prob
    if bias == "batch":
        root, std = sqrt_dt.mean(), std_dev_t.mean() * sqrt_dt.mean()
        divergence = (mean - old_mean).pow(2).mean() / (2.0 * std**2)
    else:
        root, std = sqrt_dt.flatten(), (std_dev_t * sqrt_dt).flatten()
        divergence = per_row_mean((mean - old_mean).pow(2)) / (2.0 * std**2)
    ratio = torch.exp((log_ratio + divergence) * std)
    loss = (_clip(ratio, adv, clip_range, clip_range) / root**2).mean()
    metrics = {
        "approx_kl": 0.5 * (log_ratio**2).mean(),
        "clipfrac": ((ratio - 1.0).abs() > clip_range).to(ratio.dtype).mean(),
        "policy_loss": loss,
    }
    return loss, _detach(metrics)


def dance_grpo_clip(
    log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor, *, clip_range: float = 1e-4, adv_clip_max: float = 5.0
) -> tuple[Tensor, Metrics]:
    """DanceGRPO's ``train_one_step`` before it divides by accumulation and timesteps; it logs no metric."""
    adv = advantages.clamp(-adv_clip_max, adv_clip_max)
    return _clip(torch.exp(log_prob - old_log_prob), adv, clip_range, clip_range).mean(), {}


def mix_grpo_clip(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantages: Tensor,
    *,
    clip_range: float = 1e-4,
    adv_clip_max: float = 5.0,
    kl_coeff: float = 0.0,
) -> tuple[Tensor, Metrics]:
    """MixGRPO's ``train_one_step``: the clip and a penalty on the squared log-ratio to the *old* policy."""
    adv = advantages.clamp(-adv_clip_max, adv_clip_max)
    log_ratio = log_prob - old_log_prob
    ratio = torch.exp(log_ratio)
    policy_loss = _clip(ratio, adv, clip_range, clip_range).mean()
    kl_loss = 0.5 * (log_ratio**2).mean()
    clip_frac = ((ratio - 1.0).abs() > clip_range).to(ratio.dtype).mean()
    metrics = {"policy_loss": policy_loss, "kl_loss": kl_loss, "clip_frac": clip_frac}
    return policy_loss + kl_coeff * kl_loss, _detach(metrics)


def verl_omni_flow_grpo(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantages: Tensor,
    *,
    clip_ratio: float = 1e-4,
    adv_clip_max: float = 5.0,
    weights: Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """verl-omni's ``flow_grpo``: rollout weights on row losses, unbiased ratio_std, ppo_kl minus the mean log-ratio."""
    adv = advantages.clamp(-adv_clip_max, adv_clip_max)
    log_ratio = log_prob - old_log_prob
    ratio = torch.exp(log_ratio)
    rows = _clip(ratio, adv, clip_ratio, clip_ratio)
    loss = (rows if weights is None else rows * weights).mean()
    return loss, _detach(_verl_clip_metrics(log_ratio, ratio, clip_ratio))


def verl_omni_grpo_guard(
    log_prob: Tensor,
    old_log_prob: Tensor,
    mean: Tensor,
    old_mean: Tensor,
    std_dev_t: Tensor,
    sqrt_dt: Tensor,
    advantages: Tensor,
    *,
    clip_ratio: float,
    adv_clip_max: float = 5.0,
    weights: Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """verl-omni's ``grpo_guard``: bias per row, numbers of the step as batch means, ``std_dev_t * sqrt_dt`` always."""
    adv = advantages.clamp(-adv_clip_max, adv_clip_max)
    root = sqrt_dt.mean()
    std = std_dev_t.mean() * root
    log_ratio = log_prob - old_log_prob
    ratio = torch.exp((log_ratio + per_row_mean((mean - old_mean).pow(2)) / (2.0 * std**2)) * std)
    rows = _clip(ratio, adv, clip_ratio, clip_ratio)
    loss = (rows if weights is None else rows * weights).mean() / root**2
    return loss, _detach(_verl_clip_metrics(log_ratio, ratio, clip_ratio))


def _verl_clip_metrics(log_ratio: Tensor, ratio: Tensor, clip_ratio: float) -> Metrics:
    return {
        "actor/ppo_kl": (-log_ratio).mean(),
        "actor/pg_clipfrac": ((ratio - 1.0).abs() > clip_ratio).to(ratio.dtype).mean(),
        "actor/pg_clipfrac_higher": (ratio - 1.0 > clip_ratio).to(ratio.dtype).mean(),
        "actor/pg_clipfrac_lower": (1.0 - ratio > clip_ratio).to(ratio.dtype).mean(),
        "actor/ratio_mean": ratio.mean(),
        "actor/ratio_std": ratio.std(),
    }


# ---- the KL mask


def _masked(log_ratio: Tensor, divergence: Tensor, advantages: Tensor, threshold: float) -> tuple[Tensor, Metrics]:
    """Row losses of the asymmetric mask, and the metrics that all three Flow-DPPO trainers share."""
    ratio = torch.exp(log_ratio)
    far = divergence >= threshold
    rising, falling = far & (ratio > 1.0) & (advantages > 0), far & (ratio < 1.0) & (advantages < 0)
    dropped = rising | falling
    surrogate = -advantages * ratio
    rows = torch.where(dropped.detach(), torch.zeros_like(surrogate), surrogate)

    def fraction(flags: Tensor) -> Tensor:
        return flags.to(ratio.dtype).mean()

    return rows, {
        "ratio_mean": ratio.mean(),
        "ratio_min": ratio.min(),
        "ratio_max": ratio.max(),
        "approx_kl": 0.5 * (log_ratio**2).mean(),
        "kl_new_old_mean": divergence.mean(),
        "kl_new_old_max": divergence.max(),
        "kl_mask_fraction": fraction(far),
        "pos_rm_fraction": fraction(rising),
        "neg_rm_fraction": fraction(falling),
        "masked_fraction": fraction(dropped),
        "unmasked_fraction": fraction(~dropped),
    }


def unirl_flow_dppo(
    log_prob: Tensor,
    old_log_prob: Tensor,
    mean: Tensor,
    old_mean: Tensor,
    std: Tensor,
    advantages: Tensor,
    *,
    threshold: float = 1e-5,
    add_kl_coefficient: bool = True,
) -> tuple[Tensor, Metrics]:
    """UniRL's ``FlowDPPO`` on ``[B, S]`` rows: no clamp, mean over all rows, unbiased ratio_std, the sampler's std."""
    scale = lift(std, mean) if add_kl_coefficient else 1.0
    divergence = per_row_mean((mean - old_mean) ** 2 / (2.0 * scale**2), 2)
    log_ratio = log_prob - old_log_prob
    adv = advantages[:, None].expand_as(log_ratio)
    rows, metrics = _masked(log_ratio, divergence, adv, threshold)
    ratio = torch.exp(log_ratio)
    metrics["ratio_std"] = ratio.std() if ratio.numel() > 1 else torch.zeros_like(ratio.sum())
    metrics["policy_loss"] = rows.mean()
    return rows.mean(), _detach(metrics)


def unirl_reference_kl(mean: Tensor, mean_ref: Tensor, std: Tensor) -> Tensor:
    """UniRL's ``beta`` term: the exact Gaussian KL, mean over all ``[B, S]`` rows."""
    return per_row_mean((mean - mean_ref) ** 2 / (2.0 * lift(std, mean) ** 2), 2).mean()


def verl_omni_flow_dppo(
    log_prob: Tensor,
    old_log_prob: Tensor,
    mean: Tensor,
    old_mean: Tensor,
    std_dev_t: Tensor,
    sqrt_dt: Tensor,
    advantages: Tensor,
    *,
    kl_mask_threshold: float = 1e-5,
    add_kl_coefficient: bool = True,
    weights: Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """verl-omni's ``flow_dppo``: no clamp, ``std_dev_t * sqrt_dt`` whatever the sampler, the population's ratio_std."""
    std = std_dev_t * lift(sqrt_dt, std_dev_t) if add_kl_coefficient else 1.0
    divergence = per_row_mean((mean - old_mean) ** 2 / (2.0 * std**2))
    log_ratio = log_prob - old_log_prob
    rows, metrics = _masked(log_ratio, divergence, advantages, kl_mask_threshold)
    metrics["ppo_kl"] = (-log_ratio).mean()
    metrics["ratio_std"] = torch.exp(log_ratio).std(unbiased=False)
    loss = (rows if weights is None else rows * weights).mean()
    return loss, {f"actor/{name}": value for name, value in _detach(metrics).items()}


def verl_omni_kl(mean: Tensor, mean_ref: Tensor, std_dev_t: Tensor) -> tuple[Tensor, Metrics]:
    """verl-omni's ``kl``: over ``std_dev_t**2``, so without dt for ``sde``."""
    loss = per_row_mean((mean - mean_ref) ** 2 / (2.0 * std_dev_t**2)).mean()
    return loss, _detach({"actor/kl_loss": loss})


def flow_factory_dppo(
    log_prob: Tensor,
    old_log_prob: Tensor,
    new: Tensor,
    old: Tensor,
    std: Tensor,
    advantages: Tensor,
    *,
    threshold: float = 1e-6,
    mask: str = "x-based",
    adv_clip_range: tuple[float, float] = (-5.0, 5.0),
) -> tuple[Tensor, dict[str, Tensor]]:
    """Flow-Factory's ``dppo``: clamped advantages; ``new`` and ``old`` are means under an x-based mask, scaled by the
    variance, and velocities under a v-based one, neither scaled nor halved. Metrics are per row where theirs are."""
    adv = advantages.clamp(*adv_clip_range)
    difference = (new - old) ** 2
    divergence = per_row_mean(difference if mask == "v-based" else difference / (2.0 * std**2))
    log_ratio = log_prob - old_log_prob
    rows, metrics = _masked(log_ratio, divergence, adv, threshold)
    ratio = torch.exp(log_ratio)
    info = {
        "ratio": ratio,
        "kl_new_old": divergence,
        "unclipped_loss": -adv * ratio,
        "policy_loss": rows.mean(),
        "keep_ratio": metrics["unmasked_fraction"],
        "masked_ratio": metrics["masked_fraction"],
    }
    return rows.mean(), _detach(info)


def flow_factory_reference(new: Tensor, reference: Tensor) -> Tensor:
    """Flow-Factory's ``kl_div``: the plain mean squared difference, in the space of ``kl_type``."""
    return ((new - reference) ** 2).mean()


def _detach(metrics: Metrics) -> Metrics:
    return {name: value.detach() for name, value in metrics.items()}
