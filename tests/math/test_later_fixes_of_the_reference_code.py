"""Mistakes that the reference implementation (UniRL) and other trainers shipped and fixed, each by its number.

What was wrong is computed beside what is right, so that the size of the mistake is on record.
"""

from __future__ import annotations

import math

import pytest
import torch
from support import oracle
from support.problems import ETA, SIGMAS, STOCHASTIC, make_problem

import flowdppo_fast as fast

SCHEDULE = fast.ScheduleLevels.from_sigmas(SIGMAS)


def textbook_kl(problem) -> torch.Tensor:
    """Mean-reduced ``(mu - mu_old)**2 / (2 * S**2)`` in float64."""
    mean, std = problem.mean_of(problem.velocity)
    old_mean, _ = problem.mean_of(problem.old_velocity)
    kl = (mean - old_mean) ** 2 / (2.0 * oracle.lift(std, mean) ** 2)
    return kl.flatten(std.ndim).mean(-1)


def fused_kl(problem, backend) -> torch.Tensor:
    velocity, old, noise = (
        x.float().to(backend.device) for x in (problem.velocity, problem.old_velocity, problem.noise)
    )
    out = fast.fused_dppo_velocity_loss(
        velocity, old, noise, problem.step, problem.advantages.to(velocity), backend=backend.name
    )
    return out.rows.kl.cpu().double()


@pytest.mark.parametrize("sampler", STOCHASTIC)
def test_unirl_38_sigma_of_the_kl_is_the_samplers(backend, sampler):
    """The KL took Flow-SDE's sigma under every sampler."""
    problem = make_problem(sampler=sampler, index=4)
    expected = textbook_kl(problem)
    torch.testing.assert_close(fused_kl(problem, backend), expected, rtol=1e-5, atol=0)
    flow = fast.SDEStep.from_sigmas("flow_sde", SIGMAS[4], SIGMAS[5], eta=ETA, schedule=SCHEDULE)
    mistaken = expected * (problem.step.std / flow.std) ** 2
    assert (sampler == "flow_sde") == bool(((mistaken / expected - 1).abs() < 0.1).all())


def test_unirl_38_sigma_at_the_first_step(backend):
    """``1 - sigma`` clamped at .01 in place of ``1 - sigmas[1]`` made the first step's KL 3.57 times too small."""
    problem = make_problem(index=0)
    assert SIGMAS[0] == 1.0
    expected = textbook_kl(problem)
    torch.testing.assert_close(fused_kl(problem, backend), expected, rtol=1e-5, atol=0)
    right = ETA * math.sqrt(1.0 / (1.0 - SIGMAS[1]))
    clamped = ETA * math.sqrt(0.99 / (1.0 - 0.99))
    # their sigma enters the KL's denominator alone; the means were made with the right one
    assert (clamped / right) ** 2 == pytest.approx(3.54, abs=0.05)


def test_verl_omni_sigma_of_cps_and_dance_is_not_multiplied_by_sqrt_dt_twice(backend):
    """There ``std_dev_t`` is S already; ``* sqrt(-dt)`` makes the KL ``1/|dt|`` too large."""
    for sampler in ("cps", "dance"):
        problem = make_problem(sampler=sampler, index=2)
        torch.testing.assert_close(fused_kl(problem, backend), textbook_kl(problem), rtol=1e-5, atol=0)


def test_unirl_112_reference_kl(backend):
    """Equation 17 has a KL to the reference policy: off by default, with a gradient when asked for."""
    problem = make_problem()
    velocity, old, noise, reference = (
        x.float().to(backend.device)
        for x in (problem.velocity, problem.old_velocity, problem.noise, problem.reference_velocity)
    )
    advantages = torch.zeros(8, device=backend.device)

    def run(**options):
        leaf = velocity.clone().requires_grad_()
        out = fast.fused_dppo_velocity_loss(leaf, old, noise, problem.step, advantages, backend=backend.name, **options)
        out.loss.backward()
        return out, leaf.grad

    out, grad = run()
    assert "kl_ref_mean" not in out.metrics()
    assert grad.count_nonzero() == 0
    out, grad = run(reference_velocity=reference)
    assert out.loss.item() == 0.0
    assert out.metrics()["kl_ref_mean"] > 0.0
    out, grad = run(reference_velocity=reference, kl_weight=0.04)
    k = problem.step.velocity_coef / problem.step.std
    w = k * (velocity - reference).double()
    torch.testing.assert_close(out.loss.double(), 0.04 * 0.5 * w.square().mean(), rtol=1e-5, atol=0)
    torch.testing.assert_close(grad.double(), 0.04 * k * w / w.numel(), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(("threshold", "inflation"), [(1e-5, 1.2), (1e-6, 2.5)])
def test_unirl_444_bfloat16_means_inflate_the_kl_and_bfloat16_velocities_do_not(backend, threshold, inflation):
    """At the thresholds in use the rounding of a mean is as large as the drift it is meant to measure."""
    problem = make_problem((4,), (4, 32, 32), index=4)
    scale = math.sqrt(2.0 * threshold) / (problem.velocity - problem.old_velocity).square().mean().sqrt()
    step = problem.step
    # two bf16 model outputs whose KL is about the threshold; they are what the policies are
    old = problem.old_velocity.bfloat16()
    drift = (problem.velocity - problem.old_velocity) * scale * abs(step.std / step.velocity_coef)
    new = (old.double() + drift).bfloat16()
    x, e = problem.state, problem.noise

    def mean(velocity):
        return step.sample_coef * x + step.velocity_coef * velocity.double()

    expected = ((mean(new) - mean(old)) ** 2).flatten(1).mean(1) / (2 * step.std**2)
    assert bool((expected < 3 * threshold).all())
    assert bool((expected > 0.1 * threshold).all())
    advantages = torch.ones(4, device=backend.device)
    by_velocity = fast.fused_dppo_velocity_loss(
        new.to(backend.device), old.to(backend.device), e.float().to(backend.device), step, advantages,
        backend=backend.name,
    )  # fmt: skip
    torch.testing.assert_close(by_velocity.rows.kl.cpu().double(), expected, rtol=1e-5, atol=0)

    def kl_of_means(dtype):
        new_mean, old_mean = mean(new).to(dtype).to(backend.device), mean(old).to(dtype).to(backend.device)
        next_state = (mean(old) + step.std * e).float().to(backend.device)
        out = fast.fused_dppo_loss(new_mean, old_mean, next_state, step.std, advantages, backend=backend.name)
        return out.rows.kl.cpu().double() / expected

    assert bool((kl_of_means(torch.bfloat16) > inflation).all())
    torch.testing.assert_close(kl_of_means(torch.float32), torch.ones(4).double(), rtol=1e-2, atol=0)


@pytest.mark.parametrize(
    ("batch", "latent"),
    [(1, (6, 5)), (3, (6, 5)), (1, (2, 3, 4, 5)), (3, (2, 3, 4, 5)), (1, (3, 4, 5))],
    ids=["packed, batch of one", "packed", "video, batch of one", "video", "image, batch of one"],
)
@pytest.mark.parametrize("shape", ["[S]", "[1, S, 1, 1, 1]"])
def test_unirl_496_sigma_is_broadcast_to_rows_and_never_into_latents(backend, batch, latent, shape):
    """``[1, S, 1, 1, 1]`` raised on video and met the tokens of packed latents, silently when the batch was one."""
    problem = make_problem((batch, 2), latent, index=[3, 6])
    mean, std = problem.mean_of(problem.velocity)
    old_mean, _ = problem.mean_of(problem.old_velocity)
    next_state = old_mean + oracle.lift(std, old_mean) * problem.noise
    given = std[0] if shape == "[S]" else std[:1].reshape(1, 2, 1, 1, 1)
    tensors = [x.float().to(backend.device) for x in (mean, old_mean, next_state, given, problem.advantages)]
    out = fast.fused_dppo_loss(*tensors, backend=backend.name)
    torch.testing.assert_close(out.rows.kl.cpu().double(), textbook_kl(problem), rtol=2e-4, atol=0)


@pytest.mark.bits(across="rows")
def test_unirl_144_steps_replayed_in_one_batch_equal_steps_replayed_alone(backend):
    """Batched replay: rows ``[B, S]`` in one call are the S calls of ``[B]``, and ratio 1 is 1.

    To the bit, because all rows are aligned alike: each starts at a multiple of 16 elements.
    """
    problem = make_problem((3, 2), (3, 4, 8), index=[3, 6])
    velocity, old, noise = (
        x.bfloat16().to(backend.device) for x in (problem.velocity, problem.old_velocity, problem.noise)
    )
    advantages = problem.advantages.float().to(backend.device)

    def run(new, s, step):
        return fast.fused_dppo_velocity_loss(
            new[:, s], old[:, s], noise[:, s], step, advantages[:, s], threshold=0.01, reduction="sum",
            single_pass=True, backend=backend.name,
        )  # fmt: skip

    together = run(velocity, slice(None), problem.step)
    for s, i in enumerate((3, 6)):
        # a stack of one: the same float32 table as in the stacked call
        alone = run(velocity, s, fast.SDEStep.stack([make_problem(index=i).step]))
        assert torch.equal(alone.rows.kl, together.rows.kl[:, s])
        assert torch.equal(alone.rows.ratio, together.rows.ratio[:, s])
        assert torch.equal(alone.grad, together.grad[:, s])
    same = run(old, slice(None), problem.step)
    assert bool((same.rows.ratio == 1.0).all())
    assert same.rows.kl.count_nonzero() == 0


def test_flow_factory_dropped_row_is_not_multiplied_by_zero(backend):
    """``(-A*r) * keep`` is ``inf * 0 = NaN`` where the ratio overflows."""
    new = torch.full((2, 4), 200.0, device=backend.device)
    new[1] = 0.1
    out = fast.fused_dppo_loss(
        new, torch.zeros_like(new), new.clone(), 1.0, torch.ones(2, device=backend.device), backend=backend.name
    )
    assert out.rows.ratio[0] == math.inf
    assert out.rows.loss.tolist() == [0.0, 0.0]
    assert out.loss.item() == 0.0


def test_mask_needs_a_second_update(backend):
    """With one optimizer step per rollout every ratio is 1 and every KL 0: mask, clip and guard all do nothing."""
    problem = make_problem()
    old, noise = (x.float().to(backend.device) for x in (problem.old_velocity, problem.noise))
    advantages = problem.advantages.to(old)
    losses = [
        fast.fused_policy_velocity_loss(
            old.clone(), old, noise, problem.step, advantages, objective=objective, backend=backend.name
        )
        for objective in (fast.DPPO(1e-30), fast.DPPO(1e-30, symmetric=True), fast.RatioClip(1e-30, 1e-30))
    ]
    for out in losses:
        assert out.metrics()["masked_fraction"] == 0.0
        assert out.loss.item() == pytest.approx(-advantages.mean().item(), rel=1e-6)
