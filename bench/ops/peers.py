"""What a trainer computes today, in eager torch: sampler step, log-prob, KL, bounded loss, metrics.

Own code from the published formulas (Flow-GRPO 2505.05470; Flow-DPPO 2606.11025, Eq. 14 and 18). It keeps the order of
work and the numeric habits that the trainers in use share: everything in float32 after an upcast of the model's output,
full-size log-prob and KL tensors that are then averaged, an old log-prob that is subtracted, old step *means* in
float32, and one python float per metric. ``torch.compile`` of the same functions is the opponent that counts.

All functions take latents ``[*rows, *latent]`` and per-row numbers shaped ``[*rows, 1, ...]``, as trainers hold them.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

LOG_SQRT_2PI = 0.5 * math.log(2.0 * math.pi)


class Levels(NamedTuple):
    """Noise levels of the rows' steps, float32 ``[*rows, 1, ...]``."""

    sigma: Tensor
    sigma_next: Tensor
    eta: float


class PeerOutput(NamedTuple):
    """``loss`` 0-d, differentiable in the velocity; ``log_ratio`` and ``kl`` per row (``kl`` None where the method
    has none); ``metrics`` 0-d tensors, or floats."""

    loss: Tensor
    log_ratio: Tensor
    kl: Tensor | None
    metrics: dict[str, Any]


def step_mean(velocity: Tensor, sample: Tensor, levels: Levels) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the Flow-SDE step, in the dtype of ``levels``."""
    sigma, dt = levels.sigma, levels.sigma_next - levels.sigma
    velocity, sample = velocity.to(sigma.dtype), sample.to(sigma.dtype)
    diffusion = levels.eta * torch.sqrt(sigma / (1.0 - sigma))
    mean = sample * (1.0 + diffusion**2 / (2.0 * sigma) * dt)
    mean = mean + velocity * (1.0 + diffusion**2 * (1.0 - sigma) / (2.0 * sigma)) * dt
    return mean, diffusion * torch.sqrt(-dt)


def log_prob(prev_sample: Tensor, mean: Tensor, std: Tensor, row_dims: int) -> Tensor:
    """Mean-reduced Gaussian log-density with normaliser, per row."""
    density = -((prev_sample.to(mean.dtype) - mean) ** 2) / (2.0 * std**2) - torch.log(std) - LOG_SQRT_2PI
    return density.mean(dim=tuple(range(row_dims, density.ndim)))


def dppo(
    velocity: Tensor,
    sample: Tensor,
    prev_sample: Tensor,
    old_mean: Tensor,
    old_log_prob: Tensor,
    advantages: Tensor,
    levels: Levels,
    threshold: float,
) -> PeerOutput:
    """Flow-DPPO: drop a row whose mean-reduced KL is at or over ``threshold`` while its ratio moves away from 1."""
    mean, std = step_mean(velocity, sample, levels)
    log_ratio = log_prob(prev_sample, mean, std, advantages.ndim) - old_log_prob
    divergence = (mean - old_mean) ** 2 / (2.0 * std**2)
    kl = divergence.mean(dim=tuple(range(advantages.ndim, divergence.ndim)))
    ratio = torch.exp(log_ratio)
    far = (kl >= threshold).detach()
    pos_removed = far & (advantages > 0) & (ratio > 1.0)
    neg_removed = far & (advantages < 0) & (ratio < 1.0)
    kept = ~(pos_removed | neg_removed)
    loss = torch.where(kept, -advantages * ratio, torch.zeros_like(ratio)).mean()
    with torch.no_grad():
        metrics = {
            "policy_loss": loss.detach(),
            "ratio_mean": ratio.mean(),
            "ratio_std": ratio.std(),
            "ratio_min": ratio.min(),
            "ratio_max": ratio.max(),
            "approx_kl": 0.5 * (log_ratio**2).mean(),
            "kl_new_old_mean": kl.mean(),
            "kl_new_old_max": kl.max(),
            "kl_mask_fraction": far.float().mean(),
            "pos_rm_fraction": pos_removed.float().mean(),
            "neg_rm_fraction": neg_removed.float().mean(),
            "masked_fraction": (~kept).float().mean(),
            "unmasked_fraction": kept.float().mean(),
        }
    return PeerOutput(loss, log_ratio.detach(), kl.detach(), metrics)


def ratio_clip(
    velocity: Tensor,
    sample: Tensor,
    prev_sample: Tensor,
    old_mean: Tensor,
    old_log_prob: Tensor,
    advantages: Tensor,
    levels: Levels,
    clip_range: float,
) -> PeerOutput:
    """Flow-GRPO's clipped surrogate; ``old_mean`` is not read, it only keeps the two signatures alike."""
    mean, std = step_mean(velocity, sample, levels)
    log_ratio = log_prob(prev_sample, mean, std, advantages.ndim) - old_log_prob
    ratio = torch.exp(log_ratio)
    clipped = torch.clamp(ratio, 1.0 - clip_range, 1.0 + clip_range)
    loss = torch.maximum(-advantages * ratio, -advantages * clipped).mean()
    with torch.no_grad():
        metrics = {
            "policy_loss": loss.detach(),
            "approx_kl": 0.5 * (log_ratio**2).mean(),
            "clipfrac": (torch.abs(ratio - 1.0) > clip_range).float().mean(),
            "clipfrac_gt_one": (ratio - 1.0 > clip_range).float().mean(),
            "clipfrac_lt_one": (1.0 - ratio > clip_range).float().mean(),
        }
    return PeerOutput(loss, log_ratio.detach(), None, metrics)


def synced(output: PeerOutput) -> PeerOutput:
    """The same with every metric read on its own, one device sync each."""
    return output._replace(metrics={name: value.item() for name, value in output.metrics.items()})
