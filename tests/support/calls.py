"""Right calls of the public API on small zeros, each with arguments that a test changes."""

from __future__ import annotations

import torch

import flowdppo_fast as fast

B, SHAPE = 4, (4, 3, 5)
STEP = fast.SDEStep.from_sigmas("dance", 0.7, 0.6)
META = torch.device("meta")


def latents(*shape: int, **options) -> torch.Tensor:
    return torch.zeros(shape or SHAPE, **options)


def velocity_loss(loss=fast.fused_dppo_velocity_loss, **changes):
    arguments = {
        "velocity": latents(),
        "old_velocity": latents(),
        "noise": latents(),
        "step": STEP,
        "advantages": torch.zeros(B),
        "backend": "reference",
    }
    return loss(**{**arguments, **changes})


def mean_loss(loss=fast.fused_dppo_loss, **changes):
    arguments = {
        "prev_sample_mean": latents(),
        "old_prev_sample_mean": latents(),
        "prev_sample": latents(),
        "std": 0.1,
        "advantages": torch.zeros(B),
        "backend": "reference",
    }
    return loss(**{**arguments, **changes})


def statistics(**changes):
    arguments = {"velocity": latents(), "old_velocity": latents(), "noise": latents(), "step": STEP}
    return fast.row_statistics(**{**arguments, **changes}, backend="reference")


def step(**changes):
    return fast.sde_step(**{"sample": latents(), "velocity": latents(), "step": STEP, **changes}, backend="reference")


def guard_loss(**changes):
    return mean_loss(fast.fused_policy_loss, objective=fast.GRPOGuard(), **changes)


def silent_step(sampler: str, sigma_next: float, **options) -> fast.SDEStep:
    return fast.SDEStep.from_sigmas(sampler, 0.7, sigma_next, **options)
