"""Objectives of the forward process as functions of a row's statistics, against their own formulas, in float64.

The recipes are those of ``docs/concepts/forward_process.md``: with ``e = (noise - x0) - old`` and ``k = 1`` the
matching losses of the new and the old velocity are ``E - 2P + Q`` and ``E``.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.tolerance import check_float64
from torch import Tensor

import flowdppo_fast as fast

ROWS, LATENT = 8, (4, 6, 6)


class Batch:
    """Noised samples, the velocities of three policies, and what comes with a row."""

    def __init__(self, drift: float = 0.05) -> None:
        g = torch.Generator().manual_seed(0)

        def normal() -> Tensor:
            return torch.randn(ROWS, *LATENT, generator=g, dtype=torch.float64)

        self.x0, self.noise = normal(), normal()
        self.target = self.noise - self.x0
        self.old, self.reference = self.target + 0.5 * normal(), self.target + 0.5 * normal()
        self.velocity = self.old + drift * normal()
        self.sigma = 0.05 + 0.9 * torch.rand(ROWS, generator=g, dtype=torch.float64)
        self.advantages = torch.randn(ROWS, generator=g, dtype=torch.float64)
        self.optimality = torch.rand(ROWS, generator=g, dtype=torch.float64)

    def matching(self, velocity: Tensor) -> Tensor:
        return over((velocity - self.target) ** 2)

    def statistics(self, velocity: Tensor, old: Tensor) -> tuple[Tensor, ...]:
        return fast.matching_statistics(velocity, old, self.x0, self.noise)


def over(x: Tensor) -> Tensor:
    return x.flatten(1).mean(1)


def lifted(x: Tensor) -> Tensor:
    return x.reshape(-1, 1, 1, 1)


# AWM, arXiv 2509.25050: PPO's clipped loss on the ratio of matching losses


def awm(b: Batch, v: Tensor, weight: Tensor | float) -> Tensor:
    ratio = torch.exp(-weight * b.matching(v) + weight * b.matching(b.old))
    return torch.maximum(-b.advantages * ratio, -b.advantages * ratio.clamp(1.0 - 1e-3, 1.0 + 1e-3)).mean()


def awm_fused(b: Batch, v: Tensor, weight: Tensor | float, objective=None) -> Tensor:
    objective = objective or fast.RatioClip(1e-3)
    return fast.matching_loss(v, b.old, b.x0, b.noise, b.advantages, objective=objective, weight=weight).loss


def awm_ghuber(b: Batch, v: Tensor) -> Tensor:
    def log_prob(velocity: Tensor) -> Tensor:
        return -(b.sigma / 0.25) * ((b.matching(velocity) + 1e-6) ** 0.25 - 1e-6**0.25)

    return (-b.advantages * torch.exp(log_prob(v) - log_prob(b.old))).mean()


def awm_ghuber_recipe(b: Batch, v: Tensor) -> Tensor:
    p, q, e = b.statistics(v, b.old)
    log_ratio = (b.sigma / 0.25) * ((e + 1e-6) ** 0.25 - (e - 2.0 * p + q + 1e-6) ** 0.25)
    return (-b.advantages * torch.exp(log_ratio)).mean()


# advantage-weighted flow matching (ORW-CFM): regression on the velocity


def regression(b: Batch, v: Tensor) -> Tensor:
    return (b.advantages * b.matching(v)).mean()


def regression_recipe(b: Batch, v: Tensor) -> Tensor:
    p, q, e = b.statistics(v, b.old)
    return (b.advantages * (e - 2.0 * p + q)).mean()


# DiffusionNFT, arXiv 2509.16117: implicit positive and negative policies, in the space of x0


def nft(b: Batch, v: Tensor, beta: float = 0.5, *, weighted: bool = True) -> Tensor:
    sigma = lifted(b.sigma)
    state = (1.0 - sigma) * b.x0 + sigma * b.noise
    terms = []
    for sign, share in ((1.0, b.optimality), (-1.0, 1.0 - b.optimality)):
        predicted = state - sigma * (b.old + sign * beta * (v - b.old))
        error = over((predicted - b.x0) ** 2)
        if weighted:
            error = error / over((predicted - b.x0).abs()).detach()
        terms.append(share * error / beta)
    return (terms[0] + terms[1]).mean()


def nft_recipe(b: Batch, v: Tensor, beta: float = 0.5, *, weighted: bool = True) -> Tensor:
    p, q, e = b.statistics(v, b.old)
    positive, negative = b.optimality * b.sigma**2 / beta, (1.0 - b.optimality) * b.sigma**2 / beta
    if weighted:
        drawn, moved = b.target - b.old, (v - b.old).detach()
        positive = positive / (b.sigma * over((drawn - beta * moved).abs()))
        negative = negative / (b.sigma * over((drawn + beta * moved).abs()))
    total, difference = positive + negative, positive - negative
    return (total * (e + beta**2 * q) - 2.0 * beta * difference * p).mean()


# Diffusion-DPO on online pairs, DGPO (arXiv 2510.08425) and CRD (arXiv 2603.14128) on groups; `old` is the reference


def dpo(b: Batch, v: Tensor, beta: float = 100.0) -> Tensor:
    gain = b.matching(v) - b.matching(b.reference)
    return -F.logsigmoid(-0.5 * beta * (gain[0::2] - gain[1::2])).mean()


def dpo_recipe(b: Batch, v: Tensor, beta: float = 100.0) -> Tensor:
    p, q, _ = b.statistics(v, b.reference)
    gain = q - 2.0 * p
    return -F.logsigmoid(-0.5 * beta * (gain[0::2] - gain[1::2])).mean()


def dgpo(b: Batch, v: Tensor, beta: float = 10.0) -> Tensor:
    gain = b.advantages * beta * (b.matching(v) - b.matching(b.reference))
    weight = torch.sigmoid(gain.reshape(-1, 4).sum(1)).detach().repeat_interleave(4)
    return (weight * b.advantages * b.matching(v)).mean()


def dgpo_recipe(b: Batch, v: Tensor, beta: float = 10.0) -> Tensor:
    p, q, e = b.statistics(v, b.reference)
    weight = torch.sigmoid((b.advantages * beta * (q - 2.0 * p)).reshape(-1, 4).sum(1)).detach().repeat_interleave(4)
    return (weight * b.advantages * (e - 2.0 * p + q)).mean()


def crd(b: Batch, v: Tensor) -> Tensor:
    reward = b.matching(b.old) - b.matching(v)
    return ((reward - reward.mean() - b.advantages + b.advantages.mean()) ** 2).mean()


def crd_recipe(b: Batch, v: Tensor) -> Tensor:
    p, q, _ = b.statistics(v, b.old)
    reward = 2.0 * p - q
    return ((reward - reward.mean() - b.advantages + b.advantages.mean()) ** 2).mean()


# on-policy distillation (arXiv 2605.15055): the KL of a sampler's step to a teacher's


STEP = fast.SDEStep.from_sigmas("flow_sde", 0.6, 0.5)


def distillation(b: Batch, v: Tensor) -> Tensor:
    mean, teacher = (STEP.velocity_coef * x for x in (v, b.reference))
    return over((mean - teacher) ** 2 / (2.0 * STEP.std**2)).mean()


def distillation_fused(b: Batch, v: Tensor) -> Tensor:
    return fast.fused_policy_velocity_loss(
        v, v.detach(), b.noise, STEP, torch.zeros_like(b.advantages), objective=fast.Unclipped(),
        reference_velocity=b.reference, kl_weight=1.0,
    ).loss  # fmt: skip


RECIPES = {
    "AWM, uniform": (lambda b, v: awm(b, v, 1.0), lambda b, v: awm_fused(b, v, 1.0)),
    "AWM, by the noise level": (lambda b, v: awm(b, v, b.sigma), lambda b, v: awm_fused(b, v, b.sigma)),
    "AWM, ghuber": (awm_ghuber, awm_ghuber_recipe),
    "advantage-weighted flow matching": (regression, regression_recipe),
    "DiffusionNFT": (nft, nft_recipe),
    "DiffusionNFT without weights": (
        lambda b, v: nft(b, v, weighted=False), lambda b, v: nft_recipe(b, v, weighted=False),
    ),
    "Diffusion-DPO": (dpo, dpo_recipe),
    "DGPO": (dgpo, dgpo_recipe),
    "CRD": (crd, crd_recipe),
    "on-policy distillation": (distillation, distillation_fused),
}  # fmt: skip


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_the_papers_formula(name):
    theirs, ours = RECIPES[name]
    batch = Batch()
    results = []
    for formula in (theirs, ours):
        velocity = batch.velocity.clone().requires_grad_()
        loss = formula(batch, velocity)
        loss.backward()
        results.append((loss.detach(), velocity.grad))
    (expected, wanted), (loss, gradient) = results
    assert wanted.count_nonzero() > 0
    # theirs subtracts matching losses of order 1
    check_float64("loss", loss, expected, 32.0 if name == "Diffusion-DPO" else 4.0)
    check_float64("gradient", gradient, wanted, 32.0)


def test_every_trust_region_bounds_the_forward_process_too():
    """The mask of Flow-DPPO on AWM's ratio: its KL is ``mean((v - v_old)**2)/2``."""
    batch = Batch()
    drift = over((batch.velocity - batch.old) ** 2) / 2.0
    log_ratio = batch.matching(batch.old) - batch.matching(batch.velocity)
    threshold = float(drift.median())
    away = batch.advantages * log_ratio > 0
    expected = torch.where((drift >= threshold) & away, 0.0, -batch.advantages * torch.exp(log_ratio)).mean()
    assert 0 < int(((drift >= threshold) & away).sum()) < ROWS
    found = awm_fused(batch, batch.velocity, 1.0, fast.DPPO(threshold * (1.0 - 1e-12)))
    check_float64("loss", found, expected, 4.0)


def test_two_subtracted_losses_lose_what_the_statistics_keep():
    """The ratio at a small drift, from float32 inputs: the difference of two losses is mostly rounding."""
    batch = Batch(drift=1e-4)
    new, old, target = (x.float() for x in (batch.velocity, batch.old, batch.target))
    exact = over((old.double() - target.double()) ** 2) - over((new.double() - target.double()) ** 2)
    subtracted = over((old - target) ** 2) - over((new - target) ** 2)
    p, q = fast.row_statistics(new, old, target - old, fast.SDEStep(1.0, 1.0, 1.0, -1.0))
    errors = [float(((value.double() - exact) / exact).abs().max()) for value in (subtracted, 2.0 * p - q)]
    assert errors[1] < 0.1 * errors[0]
