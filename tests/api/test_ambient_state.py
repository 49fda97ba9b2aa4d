"""What a caller has set for torch as a whole changes no number: default dtype and device, autocast, gradient modes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.ambient import STATES, Schedule, default_device
from support.backends import Backend

import flowdppo_fast as fast
from flowdppo_fast.integrations import flow_grpo

SIGMAS = [1.0 - i / 10 for i in range(11)]
SHAPE = (4, 6, 5, 5)


@pytest.fixture(scope="module")
def given():
    draw = torch.Generator().manual_seed(0)
    old, noise = (torch.randn(SHAPE, generator=draw) for _ in range(2))
    scheduler = Schedule()
    return {
        "old": old,
        "new": old + 0.01,
        "noise": noise,
        "advantages": torch.tensor([1.0, -1.0, 0.5, -0.5]),
        "streams": torch.arange(4),
        "std": torch.full((4, 1, 1, 1), 0.1),
        "scheduler": scheduler,
        "timestep": scheduler.timesteps[3].expand(4),
    }


def everything(given, backend: str) -> dict[str, torch.Tensor]:
    """Losses, statistics and steps by name."""
    old, new, noise, advantages = (given[name] for name in ("old", "new", "noise", "advantages"))
    steps = fast.sde_schedule("flow_sde", SIGMAS)
    seeded = fast.PhiloxNoise(7, given["streams"])
    found = {}
    for name, draw, step in (
        ("stored", noise, steps[3]),
        ("seeded", seeded, steps[3]),
        ("stacked", noise, fast.SDEStep.stack(steps[2:6])),
    ):
        out = fast.fused_dppo_velocity_loss(new, old, draw, step, advantages, backend=backend)
        found[name], found[f"{name} rows"], found[f"{name} summary"] = out.loss, out.rows.kl, out.summary
        found[f"{name} next"] = fast.sde_step(old, new, step, noise=draw, backend=backend).prev_sample
    for name, std in (("number", 0.1), ("tensor", given["std"])):
        found[f"means, {name}"] = fast.fused_dppo_loss(
            new, old, old + 0.1 * noise, std, advantages, backend=backend
        ).loss
    found["P"], found["Q"] = fast.row_statistics(new, old, noise, steps[3], backend=backend)
    found["draws"] = seeded.materialize(SHAPE, device="cpu")
    for kind in ("sde", "cps"):
        arguments = (given["scheduler"], new, given["timestep"], old)
        results = fast.sde_step_with_logprob(*arguments, prev_sample=old + 0.1 * noise, sde_type=kind)
        found |= {f"{kind} {place}": value for place, value in enumerate(results)}
    return {name: value.detach() for name, value in found.items()}


@pytest.mark.parametrize("state", STATES)
def test_the_callers_state_changes_no_number(backend: Backend, given, state):
    if backend.device != "cpu":
        pytest.skip("the state of a caller is the host's; CPU tensors show it")
    expected = everything(given, backend.name)
    with STATES[state]():
        got = everything(given, backend.name)
    differing = {
        name: (value.dtype, got[name].dtype)
        for name, value in expected.items()
        if got[name].dtype != value.dtype or not torch.equal(got[name], value)
    }
    assert differing == {}


def test_a_schedule_made_in_inference_mode_is_read_and_read_again(given):
    """Tensors of inference mode have no version: what is kept of them could be an older schedule."""
    with torch.inference_mode():
        scheduler = Schedule()
        first = flow_grpo.sampler_step(scheduler, scheduler.timesteps[3:4])
        scheduler.sigmas[3] += 0.01
        second = flow_grpo.sampler_step(scheduler, scheduler.timesteps[3:4])
    assert second.sigma - first.sigma == pytest.approx(0.01, rel=1e-4)


def test_a_table_kept_from_inference_mode_serves_a_backward(given):
    step = fast.SDEStep.stack(fast.sde_schedule("flow_sde", SIGMAS)[2:6])
    with torch.inference_mode():
        fast.fused_dppo_velocity_loss(given["new"], given["old"], given["noise"], step, given["advantages"])
    velocity = given["new"].clone().requires_grad_()
    fast.fused_dppo_velocity_loss(velocity, given["old"], given["noise"], step, given["advantages"]).loss.backward()
    assert velocity.grad.abs().sum() > 0


def test_a_step_without_noise_is_told_under_any_default_device(given):
    with default_device("meta"):
        silent = fast.SDEStep(1.0, -0.1, 0.0, -0.1)
        with pytest.raises(ValueError, match="adds no noise"):
            fast.fused_dppo_velocity_loss(given["new"], given["old"], given["noise"], silent, given["advantages"])


@pytest.mark.parametrize("level", [np.float32(0.7), np.float64(0.7), np.int64(1)])
def test_numpys_numbers_are_noise_levels(given, level):
    arguments = (given["scheduler"], given["new"], given["timestep"], given["old"])
    expected = fast.sde_step_with_logprob(*arguments, float(level), given["old"] + 0.1)
    got = fast.sde_step_with_logprob(*arguments, level, given["old"] + 0.1)
    assert all(torch.equal(a, b) for a, b in zip(got, expected))
    assert fast.sde_schedule("flow_sde", SIGMAS, eta=level) == fast.sde_schedule("flow_sde", SIGMAS, eta=float(level))


@pytest.mark.parametrize("number", [np.float32, np.float64])
def test_numpys_numbers_are_bounds_and_deviations(backend: Backend, given, number):
    if backend.device != "cpu":
        pytest.skip("what a number is does not depend on the device")
    old, new, noise = (given[name] for name in ("old", "new", "noise"))
    step, advantages = fast.sde_schedule("flow_sde", SIGMAS)[3], given["advantages"]

    def losses(kind):
        bound, weight, std = kind(0.25), kind(0.5), kind(0.125)
        named = {"threshold": bound, "advantage_clip": weight, "backend": backend.name}
        yield fast.fused_dppo_velocity_loss(new, old, noise, step, advantages, **named).loss
        yield fast.fused_dppo_loss(new, old, old + 0.125 * noise, std, advantages, **named).loss

    assert all(torch.equal(a, b) for a, b in zip(losses(number), losses(float)))


def losses_of(given, velocity, step, backend: str):
    """Scalars that are differentiable in ``velocity``, by name."""
    old, noise, advantages = (given[name] for name in ("old", "noise", "advantages"))
    named = {"backend": backend}
    seeded = fast.PhiloxNoise(7, given["streams"])
    yield "mean", fast.fused_dppo_velocity_loss(velocity, old, noise, step, advantages, **named).loss
    yield "seeded", fast.fused_dppo_velocity_loss(velocity, old, seeded, step, advantages, **named).loss
    for reduction in ("none", "sum"):
        out = fast.fused_dppo_velocity_loss(velocity, old, noise, step, advantages, reduction=reduction, **named)
        yield reduction, out.loss.sum()
    more = {"reference_velocity": given["reference"], "kl_weight": 0.1, "row_weights": given["weights"]}
    yield "reference", fast.fused_dppo_velocity_loss(velocity, old, noise, step, advantages, **more, **named).loss
    for kind in (fast.RatioClip(), fast.GRPOGuard(), fast.Unclipped()):
        out = fast.fused_policy_velocity_loss(velocity, old, noise, step, advantages, objective=kind, **named)
        yield type(kind).__name__, out.loss
    yield "means", fast.fused_dppo_loss(velocity, old, old + 0.1 * noise, given["std"], advantages, **named).loss
    yield "statistics", sum(x.sum() for x in fast.row_statistics(velocity, old, noise, step, **named))
    replayed = fast.sde_step(old, velocity, step, prev_sample=noise, return_mean=True, log_prob="gaussian", **named)
    yield "step", replayed.log_prob.sum() + replayed.mean.sum()


@pytest.mark.parametrize("stacked", [False, True])
def test_what_a_rollout_made_in_inference_mode_serves_a_backward(backend: Backend, given, stacked):
    """Torch saves no such tensors for a backward."""
    if backend.device != "cpu":
        pytest.skip("which tensors autograd saves does not depend on the device")

    def rollout():
        step = fast.sde_schedule("flow_sde", SIGMAS)
        tensors = {name: x.clone() for name, x in given.items() if isinstance(x, torch.Tensor)}
        tensors |= {"reference": given["old"] + 0.02, "weights": torch.ones(4)}
        return tensors, fast.SDEStep.stack(step[2:6]) if stacked else step[3]

    with torch.inference_mode():
        made, made_step = rollout()
    plain, plain_step = rollout()
    assert made["old"].is_inference()
    for number, (name, _) in enumerate(losses_of(plain, plain["new"], plain_step, backend.name)):
        grads = []
        for tensors, step in ((plain, plain_step), (made, made_step)):
            leaf = given["new"].clone().requires_grad_()
            found = list(losses_of(tensors, leaf, step, backend.name))[number][1]
            grads.append(torch.autograd.grad(found, leaf)[0])
        assert torch.equal(*grads), name
        assert grads[0].any(), name
