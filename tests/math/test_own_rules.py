"""Objectives of one's own: a rule, written once, that torch and Triton run; C++ refuses it by name."""

from __future__ import annotations

import math

import pytest
import torch

import flowdppo_fast as fast
from flowdppo_fast.objectives import OwnRule
from flowdppo_fast.rules import dppo, register, unclipped

STEP = fast.SDEStep.from_sigmas("dance", 0.7, 0.6)
BETA = 0.3


def pull(row):
    """The derivative of a penalty by the divergence is its factor."""
    return row.threshold * row.kl, row.threshold


def capped(row):
    """Ratios above 1 count as 1."""
    return row.ratio > 1.0, -row.advantage, -row.advantage * row.ratio, -row.advantage * row.ratio


def rows(dtype=torch.float64):
    g = torch.Generator().manual_seed(3)
    old, noise, change = (torch.randn(6, 3, 5, generator=g, dtype=torch.float64) for _ in range(3))
    advantages = torch.tensor([1.5, -1.0, 0.5, -0.25, 2.0, -2.0], dtype=torch.float64)
    new = old + 0.4 * change
    return (*(x.to(dtype) for x in (new, old, noise)), advantages.to(dtype))


def textbook(new, old, noise, advantages, region="kl"):
    """Ratio and divergence of every row, for autograd."""
    k = STEP.velocity_coef / STEP.std
    u = (k * (new - old)).flatten(1)
    q = u.square().mean(1)
    ratio = torch.exp((noise.flatten(1) * u).mean(1) - 0.5 * q)
    return ratio, 0.5 * q * {"kl": 1.0, "mean_drift": STEP.std**2, "velocity_drift": 2.0 / k**2}[region]


@pytest.mark.parametrize("region", ["kl", "mean_drift", "velocity_drift"])
def test_a_penalty_is_that_of_the_textbook(region):
    new, old, noise, advantages = rows()
    new.requires_grad_()
    ratio, kl = textbook(new, old, noise, advantages, region)
    expected = (-advantages * ratio + BETA * kl).mean()
    (wanted,) = torch.autograd.grad(expected, new)
    objective = OwnRule(unclipped, pull, threshold=BETA, trust_region=region)
    out = fast.fused_policy_velocity_loss(new, old, noise, STEP, advantages, objective=objective)
    out.loss.backward()
    assert out.backend == "reference"
    torch.testing.assert_close(out.loss, expected)
    torch.testing.assert_close(new.grad, wanted)


def test_a_function_alone_is_an_objective():
    new, old, noise, advantages = rows()
    new.requires_grad_()
    ratio, _ = textbook(new, old, noise, advantages)
    assert 0 < int((ratio > 1.0).sum()) < 6
    expected = (-advantages * ratio.clamp(max=1.0)).mean()
    (wanted,) = torch.autograd.grad(expected, new)
    out = fast.fused_policy_velocity_loss(new, old, noise, STEP, advantages, objective=capped)
    out.loss.backward()
    torch.testing.assert_close(out.loss, expected)
    torch.testing.assert_close(new.grad, wanted)
    assert out.metrics()["masked_fraction"] == float((ratio > 1.0).double().mean())


def test_a_built_in_rule_is_the_same_as_ones_own():
    new, old, noise, advantages = rows(torch.float32)
    results = [
        fast.fused_policy_velocity_loss(new, old, noise, STEP, advantages, objective=objective, backend="reference")
        for objective in (fast.DPPO(0.02), OwnRule(dppo, threshold=0.02))
    ]
    assert torch.equal(results[0].row_results, results[1].row_results)
    assert 0.0 < float(results[0].metrics()["masked_fraction"]) < 1.0


def test_the_same_functions_are_one_rule():
    assert register(capped) == register(capped)
    assert register(capped) != register(capped, pull)
    assert OwnRule(capped).rule == OwnRule(capped, threshold=1.0).rule


@pytest.mark.parametrize("backend", ["cpu", "cuda"])
def test_cxx_backends_refuse_it_and_say_what_runs_it(backend, monkeypatch):
    monkeypatch.setattr("flowdppo_fast.backend.problem", lambda name, device: None)
    new, old, noise, advantages = rows(torch.float32)
    with pytest.raises(RuntimeError, match=rf"backend='{backend}' cannot run: .*'triton' runs it fused"):
        fast.fused_policy_velocity_loss(new, old, noise, STEP, advantages, objective=capped, backend=backend)


@pytest.mark.parametrize("wrong", [3, fast.DPPO, math.exp, None])
def test_what_is_no_objective_is_refused(wrong):
    new, old, noise, advantages = rows()
    with pytest.raises(TypeError, match=r"objective: got .*, expected an instance of DPPO"):
        fast.fused_policy_velocity_loss(new, old, noise, STEP, advantages, objective=wrong)
    with pytest.raises(TypeError, match="rule: got"):
        OwnRule(wrong)
