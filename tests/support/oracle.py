"""The textbook, written out for autograd. Nothing here imports the library.

Plain Gaussian densities of next states, sampler updates in the score and denoised-sample forms of the papers, losses as
the trainers write them. In float64 this is the truth; in float32 it is what a trainer computes today, whose own error
is the yardstick for everybody else's (``tolerance.py``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor


def lift(value: Tensor, like: Tensor) -> Tensor:
    """One number per row, shaped to broadcast against ``[rows, *latent]``."""
    return value.reshape(value.shape + (1,) * (like.ndim - value.ndim))


def sampler_step(
    sampler: str, x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor, eta: float, sigmas: list[float]
) -> tuple[Tensor, Tensor]:
    """Mean ``[rows, *latent]`` and standard deviation ``[rows]`` of the step; the levels are ``[rows]``."""
    s, s_next = lift(sigma, x), lift(sigma_next, x)
    data = x - s * v
    if sampler == "ode":
        return x + (s_next - s) * v, torch.zeros_like(sigma)
    if sampler == "cps":
        # Flow-CPS: the predicted noise is kept up to what fresh noise replaces, on a circle of radius sigma'
        pure_noise = x + (1.0 - s) * v
        angle = eta * math.pi / 2.0
        return (1.0 - s_next) * data + s_next * math.cos(angle) * pure_noise, sigma_next * math.sin(angle)
    if sampler in ("precise", "dance_precise"):
        # as Flow-CPS, with what is kept of the predicted noise as the paper has it: exp(-eta^2/2) to the distance in
        # log(data/noise), or in DanceGRPO's 1/noise
        pure_noise = x + (1.0 - s) * v
        here, there = ((1.0 - sigma) / sigma, (1.0 - sigma_next) / sigma_next)
        distance = torch.log(there) - torch.log(here) if sampler == "precise" else 1.0 / sigma_next - 1.0 / sigma
        kept = torch.exp(-(eta**2) / 2.0 * distance)
        mean = (1.0 - s_next) * data + lift(sigma_next * kept, x) * pure_noise
        return mean, sigma_next * torch.sqrt(1.0 - kept**2)
    if sampler == "flow_sde":
        guarded = torch.where(sigma == 1.0, torch.full_like(sigma, sigmas[1]), sigma)
        diffusion = eta * torch.sqrt(sigma / (1.0 - guarded))
    elif sampler == "dance":
        diffusion = torch.full_like(sigma, eta)
    elif sampler in ("wan", "flash"):
        diffusion = (1.0 if sampler == "wan" else eta) * (sigmas[-1] + (sigmas[1] - sigmas[-1]) * sigma)
    else:
        raise ValueError(sampler)
    # reverse-time SDE: dx = (v - g^2/2 * score) dt + g dW, with the score of N((1-sigma) * data, sigma^2)
    score = -(x - (1.0 - s) * data) / s**2
    dt = sigma_next - sigma
    mean = x + (v - 0.5 * lift(diffusion, x) ** 2 * score) * lift(dt, x)
    return mean, diffusion * torch.sqrt(-dt)


def log_density(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Elementwise log-density of ``N(mean, std**2)``."""
    return -((x - mean) ** 2) / (2.0 * std**2) - torch.log(std) - math.log(math.sqrt(2.0 * math.pi))


@dataclass
class Rule:
    """An objective in words: which rows are bounded, and by what."""

    name: str
    threshold: float = math.inf
    region: str = "kl"
    low: float = math.inf
    high: float = math.inf
    bias: str = "row"
    # of a penalty or a pull back, and of a hinge
    strength: float = 0.0
    margin: float = math.inf


@dataclass
class Answer:
    """Everything a loss call reports, per row; ``row_loss`` carries gradients.

    ``size`` is the sum of the absolute terms that add up to the log-ratio: what its rounding errors are relative to.
    """

    row_loss: Tensor
    log_ratio: Tensor
    ratio: Tensor
    kl: Tensor
    kept: Tensor
    size: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


def policy_loss(
    rule: Rule,
    mean: Tensor,
    old_mean: Tensor,
    next_state: Tensor,
    std: Tensor,
    dt: Tensor,
    advantages: Tensor,
    *,
    velocities: tuple[Tensor, Tensor, Tensor | None] | None = None,
    reference_mean: Tensor | None = None,
    kl_weight: Tensor | float = 0.0,
    reference_kl: str = "gaussian",
    latent_reduction: str = "mean",
    log_prob: str = "gaussian",
    old_log_prob: Tensor | None = None,
    advantage_clip: float | None = None,
    row_weights: Tensor | None = None,
    threshold_weights: Tensor | float = 1.0,
) -> Answer:
    """Row losses of a policy-gradient objective on step means ``[rows, *latent]``; ``std``, ``dt`` are ``[rows]``."""
    latent_dims = tuple(range(advantages.ndim, mean.ndim))
    numel = math.prod(mean.shape[advantages.ndim :])
    s = lift(std, mean)

    def over_latents(x: Tensor) -> Tensor:
        return x.sum(latent_dims) if latent_reduction == "sum" else x.mean(latent_dims)

    def density(center: Tensor) -> Tensor:
        if log_prob == "unnormalized":
            return -((next_state - center) ** 2)
        return log_density(next_state, center, s)

    if old_log_prob is None:
        rollout_log_prob = over_latents(density(old_mean)).detach()
        size = over_latents((density(mean) - density(old_mean)).abs())
    else:
        rollout_log_prob = old_log_prob * (numel if latent_reduction == "sum" else 1)
        size = over_latents(density(mean).abs())
    log_ratio = over_latents(density(mean)) - rollout_log_prob
    gaussian_kl = over_latents((mean - old_mean) ** 2 / (2.0 * s**2))
    if rule.region == "kl":
        divergence = gaussian_kl
    elif rule.region == "mean_drift":
        divergence = over_latents((mean - old_mean) ** 2 / 2.0)
    else:
        divergence = over_latents((velocities[0] - velocities[1]) ** 2)

    adv = advantages if advantage_clip is None else advantages.clamp(-advantage_clip, advantage_clip)
    if rule.name == "grpo_guard":
        bias = gaussian_kl.mean() if rule.bias == "batch" else gaussian_kl
        ratio = torch.exp((log_ratio + bias) * std)
    else:
        ratio = torch.exp(log_ratio)
    above, below = ratio - 1.0 > rule.high, 1.0 - ratio > rule.low
    threshold = rule.threshold * threshold_weights
    far = divergence >= threshold
    moving_away = ((adv > 0) & (ratio > 1.0)) | ((adv < 0) & (ratio < 1.0))
    if rule.name in ("ratio_clip", "grpo_guard"):
        dropped = ((adv > 0) & above) | ((adv < 0) & below)
        policy = torch.maximum(-adv * ratio, -adv * ratio.clamp(1.0 - rule.low, 1.0 + rule.high))
        if rule.name == "grpo_guard":
            policy = policy / -dt
    elif rule.name == "log_hinge":
        policy = torch.clamp_min(adv.abs() * rule.margin - adv * log_ratio, 0.0)
        dropped = (policy == 0.0) & (adv != 0.0)
    else:
        clipped = ((adv > 0) & above) | ((adv < 0) & below)
        dropped = {
            "dppo": far & moving_away,
            "dppo_symmetric": far,
            "dppo_clipped": (far & moving_away) | clipped,
            "dppo_pulled": far & moving_away,
        }.get(rule.name, torch.zeros_like(far))
        penalty = {
            "dppo_pulled": rule.strength * adv.abs() * torch.clamp_min(divergence / threshold - 1.0, 0.0),
            "kl_penalty": rule.strength * divergence / threshold_weights,
            "drpo": adv.abs() * divergence / threshold,
            "drpo_ratio": adv.abs() * (ratio - 1.0) ** 2 / (2.0 * threshold),
        }.get(rule.name, torch.zeros_like(ratio))
        policy = torch.where(dropped, torch.zeros_like(ratio), -adv * ratio) + penalty
    weights = torch.ones_like(std) if row_weights is None else row_weights
    policy = weights * policy
    row_loss = policy
    kl_ref = torch.zeros_like(std)
    if reference_mean is not None:
        variance = s**2 / lift(-dt, mean) if reference_kl == "without_dt" else s**2
        kl_ref = penalty_ref = over_latents((mean - reference_mean) ** 2 / (2.0 * variance))
        if reference_kl == "mean_mse":
            penalty_ref = over_latents((mean - reference_mean) ** 2)
        elif reference_kl == "velocity_mse":
            penalty_ref = over_latents((velocities[0] - velocities[2]) ** 2)
        row_loss = policy + kl_weight * weights * penalty_ref

    def fraction(flags: Tensor) -> Tensor:
        return flags.to(std.dtype).mean()

    metrics = {
        "policy_loss": policy.mean(),
        "ratio_mean": ratio.mean(),
        "ratio_std": ratio.std() if ratio.numel() > 1 else torch.zeros_like(ratio.sum()),
        "ratio_min": ratio.min(),
        "ratio_max": ratio.max(),
        "approx_kl": 0.5 * (log_ratio**2).mean(),
        "kl_new_old_mean": divergence.mean(),
        "kl_new_old_max": divergence.max(),
        "kl_mask_fraction": fraction(far),
        "pos_rm_fraction": fraction(dropped & (adv > 0)),
        "neg_rm_fraction": fraction(dropped & (adv < 0)),
        "masked_fraction": fraction(dropped),
        "unmasked_fraction": fraction(~dropped),
        "drift_mean": ((mean - old_mean) ** 2).mean(latent_dims).mean(),
        "nonfinite_rows": (~torch.isfinite(row_loss)).to(std.dtype).sum(),
        "clipfrac": fraction(above | below),
        "clipfrac_gt_one": fraction(above),
        "clipfrac_lt_one": fraction(below),
        "kl_ref_mean": kl_ref.mean(),
    }
    detached = (x.detach() for x in (log_ratio, ratio, divergence, ~dropped, size))
    return Answer(row_loss, *detached, {name: value.detach() for name, value in metrics.items()})
