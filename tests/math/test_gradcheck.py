"""Hand-written backwards against finite differences in float64."""

from __future__ import annotations

import pytest
import torch
from support.cases import FORM_OBJECTIVES, bounded_call
from support.problems import make_problem

import flowdppo_fast as fast


@pytest.fixture
def exact_backend(backend):
    if not backend.float64:
        pytest.skip(f"{backend.name} makes no promise for float64")
    return backend


@pytest.mark.parametrize(("form", "objective"), FORM_OBJECTIVES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("option", ["plain", "reference_kl", "old_log_prob", "unnormalized"])
def test_losses(exact_backend, form, objective, reduction, option):
    if objective == "grpo_guard_batch" and reduction == "none":
        reduction = "sum"
    options = {
        "plain": {},
        "reference_kl": {"with_reference": True, "kl_weight": 0.3, "reference_kl": "without_dt"},
        "old_log_prob": {"with_old_log_prob": True, "with_weights": True},
        "unnormalized": {"log_prob": "unnormalized", "latent_reduction": "sum"},
    }[option]
    call = bounded_call(make_problem((8,), (3,), drift=0.3), form, objective, reduction=reduction, **options)
    first, old, third, reference = call.tensors.values()

    def loss(new):
        if form == "velocity":
            return fast.fused_policy_velocity_loss(
                new, old, third, call.step, call.advantages, objective=call.objective, reference_velocity=reference,
                backend=exact_backend.name, **call.options,
            ).loss  # fmt: skip
        return fast.fused_policy_loss(
            new, old, third, call.std, call.advantages, objective=call.objective, dt=call.dt,
            reference_prev_sample_mean=reference, backend=exact_backend.name, **call.options,
        ).loss  # fmt: skip

    assert torch.autograd.gradcheck(loss, first.clone().requires_grad_())


@pytest.mark.parametrize("rows", [(3,), (2, 2)], ids=str)
@pytest.mark.parametrize("seeded", [False, True])
def test_row_statistics(exact_backend, rows, seeded):
    problem = make_problem(rows, (2, 3), index=[1, 4] if len(rows) == 2 else 3)
    noise = fast.PhiloxNoise(5, 9) if seeded else problem.noise

    def statistics(velocity):
        return fast.row_statistics(
            velocity, problem.old_velocity, noise, problem.step, row_dims=len(rows), backend=exact_backend.name
        )

    assert torch.autograd.gradcheck(statistics, problem.velocity.clone().requires_grad_())


@pytest.mark.parametrize("source", ["noise", "seed", "prev_sample"])
@pytest.mark.parametrize("log_prob", [None, "gaussian", "unnormalized"])
@pytest.mark.parametrize("index", [3, [1, 4, 8]], ids=["one step", "step per row"])
def test_sde_step(exact_backend, source, log_prob, index):
    problem = make_problem((3,), (2, 3), index=index)
    mean, std = problem.mean_of(problem.old_velocity)
    given = mean + std.reshape(-1, 1, 1) * problem.noise
    chosen = {
        "noise": {"noise": problem.noise},
        "seed": {"noise": fast.PhiloxNoise(5, 9)},
        "prev_sample": {"prev_sample": given},
    }[source]

    def step(velocity):
        # finite differences see a fixed action: what was drawn moves with the mean
        options = dict(chosen)
        if source != "prev_sample" and log_prob is not None:
            with torch.no_grad():
                drawn = fast.sde_step(problem.state, problem.velocity, problem.step, backend="reference", **chosen)
            options = {"prev_sample": drawn.prev_sample}
        result = fast.sde_step(
            problem.state, velocity, problem.step, return_mean=True, log_prob=log_prob, backend=exact_backend.name,
            **options,
        )  # fmt: skip
        return result.mean if log_prob is None else (result.mean, result.log_prob)

    assert torch.autograd.gradcheck(step, problem.velocity.clone().requires_grad_())


@pytest.mark.parametrize("seeded", [False, True])
@pytest.mark.parametrize("log_prob", ["gaussian", "unnormalized"])
def test_log_prob_of_a_drawn_state_has_the_gradient_of_the_same_state_given(exact_backend, seeded, log_prob):
    problem = make_problem((3,), (2, 3), index=[1, 4, 8])
    noise = fast.PhiloxNoise(5, 9) if seeded else problem.noise

    def gradient(**source):
        velocity = problem.velocity.clone().requires_grad_()
        result = fast.sde_step(
            problem.state, velocity, problem.step, log_prob=log_prob, backend=exact_backend.name, **source
        )
        (grad,) = torch.autograd.grad(result.log_prob, velocity, torch.tensor([1.0, -2.0, 3.0]).double())
        return grad, result.prev_sample

    drawn, state = gradient(noise=noise)
    given, _ = gradient(prev_sample=state)
    torch.testing.assert_close(drawn, given, rtol=1e-10, atol=1e-12)
