"""The gradient that is made together with the loss: the same one, whatever comes from above and however often."""

from __future__ import annotations

import math

import pytest
import torch
from support.backends import CPU, require
from support.problems import make_problem
from torch._subclasses.fake_tensor import FakeTensorMode

import flowdppo_fast as fast
from flowdppo_fast import autograd

PROBLEM = make_problem((6,), (3, 5, 7))
STEP = PROBLEM.step


def loss(velocity, backend="cpu", **options):
    old, noise = (x.detach().to(velocity) for x in (PROBLEM.old_velocity, PROBLEM.noise))
    advantages = PROBLEM.advantages.to(velocity.device, torch.float64 if velocity.dtype == torch.float64 else None)
    advantages = advantages.float() if velocity.dtype != torch.float64 else advantages
    return fast.fused_dppo_velocity_loss(
        velocity, old, noise, STEP, advantages, threshold=1e-2, backend=backend, **options
    )


def leaf(dtype=torch.float32):
    return PROBLEM.velocity.detach().to(dtype).requires_grad_()


@pytest.fixture
def asked(monkeypatch) -> list[str]:
    """The operators of a call."""
    require(CPU)
    names, operator = [], autograd.operator
    monkeypatch.setattr(autograd, "operator", lambda op, *where: names.append(op) or operator(op, *where))
    return names


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_default_reads_the_latents_once_on_a_cpu(asked, dtype, reduction):
    one, two = leaf(dtype), leaf(dtype)
    out = loss(one, reduction=reduction)
    out.loss.backward()
    assert asked == ["policy_loss_and_grad"]
    assert out.grad is None
    plain = loss(two, reduction=reduction, single_pass=False)
    plain.loss.backward()
    assert asked[1:] == ["policy_loss", "row_grad"]
    assert torch.equal(out.loss, plain.loss)
    assert torch.equal(one.grad, two.grad)
    assert one.grad.abs().max() > 0


@pytest.mark.parametrize(
    ("options", "dtype"),
    [({"reduction": "none"}, torch.float32), ({}, torch.float16)],
    ids=["row losses", "float16"],
)
def test_where_it_stays_two_passes(asked, options, dtype):
    loss(leaf(dtype), **options).loss.sum().backward()
    assert asked == ["policy_loss", "row_grad"]


def test_a_batch_bias_stays_two_passes(asked):
    velocity, old, noise = leaf(), PROBLEM.old_velocity.float(), PROBLEM.noise.float()
    objective = fast.GRPOGuard(0.1, bias="batch")
    out = fast.fused_policy_velocity_loss(
        velocity, old, noise, STEP, PROBLEM.advantages.float(), objective=objective, backend="cpu"
    )
    out.loss.backward()
    assert asked == ["policy_loss", "row_grad"]


def test_no_gradient_is_made_for_nobody(asked):
    assert not loss(leaf().detach()).loss.requires_grad
    with torch.no_grad():
        loss(leaf())
    assert asked == ["policy_loss", "policy_loss"]


@pytest.mark.parametrize("single_pass", [None, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("upstream", [1.0, 0.25, 1.0 / 3.0, -2.0, 0.0])
def test_what_comes_from_above_multiplies(upstream, dtype, single_pass):
    require(CPU)
    one, two = leaf(dtype), leaf(dtype)
    (upstream * loss(one, single_pass=single_pass).loss).backward()
    (upstream * loss(two, single_pass=False).loss).backward()
    if math.frexp(upstream)[0] in (0.5, -0.5, 0.0):
        assert torch.equal(one.grad, two.grad)
    else:
        # of the largest, because an element is a sum that may cancel
        slack = 2 * torch.finfo(dtype).eps * float(two.grad.abs().max())
        torch.testing.assert_close(one.grad, two.grad, rtol=0.0, atol=slack)


@pytest.mark.parametrize("single_pass", [None, True, False])
@pytest.mark.parametrize("upstream", [math.inf, math.nan, 2.0**16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dropped_rows_stay_zero_and_scaled_gradients_finite(upstream, dtype, single_pass):
    """A scaler's 65,536 is no overflow for gradients of a mean, and a scaler that overflows is none of dropped rows."""
    require(CPU)
    velocity = leaf(dtype)
    out = loss(velocity, single_pass=single_pass)
    dropped = ~out.rows.kept
    assert dropped.any()
    assert not dropped.all()
    (upstream * out.loss).backward()
    assert torch.equal(velocity.grad[dropped], torch.zeros_like(velocity.grad[dropped]))
    assert velocity.grad[~dropped].isfinite().all() == math.isfinite(upstream)


def test_small_gradients_survive_in_float16_where_they_are_scaled():
    """Rounded to float16 before they are scaled, gradients of a mean over many numbers would be nothing."""
    require(CPU)
    old, noise = torch.randn(2, 4, 128, 128), torch.randn(2, 4, 128, 128)
    velocity = (old + 1e-3 * noise).half().requires_grad_()
    rows = torch.full((2,), 1e-3)
    out = fast.fused_dppo_velocity_loss(velocity, old.half(), noise.half(), STEP, rows, threshold=1.0, backend="cpu")
    (2.0**16 * out.loss).backward()
    wide = velocity.detach().double().requires_grad_()
    exact = fast.fused_dppo_velocity_loss(
        wide, old.half().double(), noise.half().double(), STEP, rows.double(), threshold=1.0, backend="reference"
    )
    (2.0**16 * exact.loss).backward()
    torch.testing.assert_close(velocity.grad.double(), wide.grad, rtol=2e-3, atol=2.0**-24)


@pytest.mark.parametrize("single_pass", [None, True, False])
def test_again_and_again(single_pass):
    """A graph that is kept, and a ``.grad`` that others change between, as gradient clipping does."""
    require(CPU)
    velocity = leaf()
    out = loss(velocity, single_pass=single_pass)
    out.loss.backward(retain_graph=True)
    once = velocity.grad.clone()
    for _ in range(2):
        velocity.grad.mul_(3.0)
        out.loss.backward(retain_graph=True)
    out.loss.backward()
    torch.testing.assert_close(velocity.grad, 14.0 * once)
    if single_pass:
        assert torch.equal(out.grad, once)


@pytest.mark.parametrize("single_pass", [None, True, False])
def test_what_is_handed_out_is_the_callers_own(single_pass):
    """A gradient of a graph that is kept may be changed in place."""
    require(CPU)
    velocity = leaf()
    out = loss(velocity, single_pass=single_pass)
    (first,) = torch.autograd.grad(out.loss, velocity, retain_graph=True)
    once = first.clone()
    first.zero_()
    (second,) = torch.autograd.grad(out.loss, velocity)
    assert torch.equal(second, once)
    second.zero_()
    if single_pass:
        assert torch.equal(out.grad, once)


def test_the_single_pass_form_needs_nothing_that_requires_grad():
    require(CPU)
    velocity = leaf()
    out = loss(velocity.detach(), single_pass=True)
    assert not out.loss.requires_grad
    loss(velocity).loss.backward()
    assert torch.equal(out.grad, velocity.grad)


def test_gradients_are_first_order():
    require(CPU)
    velocity = leaf()
    for single_pass in (None, False):
        one = torch.ones((), requires_grad=True)
        out = loss(velocity, single_pass=single_pass)
        (grad,) = torch.autograd.grad(out.loss, velocity, one, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiate twice"):
            grad.sum().backward()


def test_tensors_without_values_go_through():
    require(CPU)
    with FakeTensorMode(allow_non_fake_inputs=True):
        velocity = torch.empty(6, 3, 5, 7).requires_grad_()
        out = fast.fused_dppo_velocity_loss(
            velocity, velocity.detach(), torch.empty(6, 3, 5, 7), STEP, torch.empty(6), backend="cpu"
        )
        out.loss.backward()
        assert velocity.grad.shape == velocity.shape
