"""The differentiable primitive (P, Q): accuracy, objectives written on top of it, gradients."""

from __future__ import annotations

import pytest
import torch
from support.cases import bounded_call
from support.problems import library, make_problem
from support.tolerance import check_within, sum_bound

import flowdppo_fast as fast

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def tensors(problem, dtype, device):
    return [x.to(device=device, dtype=dtype) for x in (problem.velocity, problem.old_velocity, problem.noise)]


@pytest.mark.parametrize("rows", [(8,), (4, 2)], ids=str)
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("numel", [1, 105, 4096, 65536])
@pytest.mark.parametrize("index", [2, "per row"])
def test_accuracy(backend, rows, dtype, numel, index):
    """No cancellation: relative to their own terms, P and Q are as good as a sum of N float32 products can be."""
    index = torch.arange(1, 9).reshape(rows).tolist() if index == "per row" else index
    problem = make_problem(rows, (numel,), drift=0.01, index=index)
    velocity, old, noise = tensors(problem, dtype, backend.device)
    p, q = fast.row_statistics(velocity, old, noise, problem.step, rows=len(rows), backend=backend.name)
    assert p.shape == q.shape == rows
    assert p.dtype == q.dtype == F32
    step = problem.step
    k = torch.as_tensor(step.velocity_coef / step.std, dtype=torch.float64).expand(rows)[..., None]
    u = k * (velocity.cpu().double() - old.cpu().double())
    for value, terms in ((p, noise.cpu().double() * u), (q, u * u)):
        error = (value.cpu().double() - terms.mean(-1)).abs()
        assert bool((error <= sum_bound(terms, F32)).all()), (error / sum_bound(terms, F32)).max()


@pytest.mark.parametrize("rows", [(8,), (4, 2)], ids=str)
def test_an_objective_in_plain_torch_equals_the_fused_one(backend, rows):
    problem = make_problem(rows)
    velocity, old, noise = tensors(problem, F32, backend.device)
    advantages = problem.advantages.float().to(backend.device)
    velocity.requires_grad_()
    p, q = fast.row_statistics(velocity, old, noise, problem.step, rows=len(rows), backend=backend.name)
    (plain,) = torch.autograd.grad((-advantages * torch.exp(p - 0.5 * q)).mean(), velocity)
    out = fast.fused_velocity_policy_loss(
        fast.Unclipped(), velocity, old, noise, problem.step, advantages, backend=backend.name
    )
    (fused,) = torch.autograd.grad(out.loss, velocity)
    check_within("gradient", plain, fused, 16 * torch.finfo(F32).eps * float(fused.abs().max()), F32)


def test_statistics_are_those_of_the_losses(backend):
    problem = make_problem()
    velocity, old, noise = tensors(problem, F32, backend.device)
    p, q = fast.row_statistics(velocity, old, noise, problem.step, backend=backend.name)
    out = fast.fused_dppo_velocity_loss(
        velocity, old, noise, problem.step, problem.advantages.to(p), backend=backend.name
    )
    assert torch.equal(out.rows.kl, 0.5 * q)
    assert torch.equal(out.rows.log_ratio, p - 0.5 * q)


def test_only_what_is_used_gets_a_gradient(backend):
    problem = make_problem()
    velocity, old, noise = tensors(problem, F32, backend.device)
    velocity.requires_grad_()
    step = problem.step
    k = step.velocity_coef / step.std
    p, q = fast.row_statistics(velocity, old, noise, step, backend=backend.name)
    (of_p,) = torch.autograd.grad(p.sum(), velocity, retain_graph=True)
    (of_q,) = torch.autograd.grad(q[2], velocity)
    numel = velocity[0].numel()
    eps = torch.finfo(F32).eps
    check_within("dP", of_p, k / numel * noise, 4 * eps * float(of_p.abs().max()), F32)
    expected = torch.zeros_like(velocity)
    expected[2] = (2 * k**2 / numel * (velocity - old)[2]).detach()
    check_within("dQ", of_q, expected, 4 * eps * float(of_q.abs().max()), F32)
    assert of_q[3:].count_nonzero() == 0


def test_seeded_noise_with_stacked_rows(backend):
    problem = make_problem((4, 2), index=[3, 5])
    velocity, old, _ = tensors(problem, F32, backend.device)
    noise = fast.PhiloxNoise(7, 100)
    stored = noise.materialize(tuple(velocity.shape), row_dims=2, device=backend.device)
    seeded = fast.row_statistics(velocity, old, noise, problem.step, rows=2, backend=backend.name)
    from_tensor = fast.row_statistics(velocity, old, stored, problem.step, rows=2, backend=backend.name)
    torch.testing.assert_close(seeded[0], from_tensor[0], rtol=0, atol=1e-6 * float(from_tensor[1].max()) ** 0.5)
    torch.testing.assert_close(seeded[1], from_tensor[1], rtol=1e-6, atol=0)


@pytest.mark.bits(across="again")
def test_results_are_bitwise_repeatable(backend):
    call = bounded_call(make_problem((8,), (3, 33, 35)), "velocity", "dppo", dtypes=BF16, device=backend.device)
    first, second = library(call, backend.name), library(call, backend.name)
    assert torch.equal(first.loss, second.loss)
    assert torch.equal(first.grad, second.grad)
    for name, value in first.rows.items():
        assert torch.equal(value, second.rows[name])


@pytest.mark.bits(across="rows")
def test_a_row_does_not_depend_on_its_neighbours(backend):
    """Bitwise where all rows are aligned alike: reordered, or taken alone, they give what they gave in the batch."""
    problem = make_problem((8,), (4, 8, 13))
    velocity, old, noise = tensors(problem, BF16, backend.device)
    advantages = problem.advantages.float().to(backend.device)

    def run(which):
        out = fast.fused_dppo_velocity_loss(
            velocity[which], old[which], noise[which], problem.step, advantages[which], threshold=1e-2,
            reduction="sum", single_pass=True, backend=backend.name,
        )  # fmt: skip
        return out.row_results, out.grad

    rows, grad = run(slice(None))
    order = torch.tensor([3, 0, 7, 5, 1, 6, 2, 4], device=backend.device)
    shuffled_rows, shuffled_grad = run(order)
    assert torch.equal(shuffled_rows, rows[:, order])
    assert torch.equal(shuffled_grad, grad[order])
    alone_rows, alone_grad = run(slice(5, 6))
    assert torch.equal(alone_rows, rows[:, 5:6])
    assert torch.equal(alone_grad, grad[5:6])
