"""The fused sampler step and the primitive (P, Q): calls of them, and the same answered by the textbook."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

import flowdppo_fast as fast

from . import oracle
from .problems import Problem
from .tolerance import check_within, eager_bound, sum_bound

# bounds on the error of a seeded normal, by noise.py: of GPUs, and 4 float32 ulp of the largest one
NORMAL_SLACK = dict.fromkeys(("triton", "cuda"), 1e-5) | {"": 4 * torch.finfo(torch.float32).eps * 6.8}


def compute_dtype(x: Tensor) -> torch.dtype:
    """What a backend computes in for ``x``."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def as_tensor(noise: Tensor | fast.PhiloxNoise, like: Tensor, row_dims: int) -> Tensor:
    """The noise in float64, drawn if it is seeded."""
    if isinstance(noise, fast.PhiloxNoise):
        noise = noise.materialize(tuple(like.shape), row_dims=row_dims, device=like.device, dtype=torch.float64)
    return noise.cpu().double()


def eager_step(
    problem: Problem, sample: Tensor, velocity: Tensor, noise: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The textbook's step in ``dtype``: mean, next state, standard deviation."""
    sigma, sigma_next = problem.levels(dtype)
    mean, std = oracle.sampler_step(
        problem.sampler, sample.cpu().to(dtype), velocity.cpu().to(dtype), sigma, sigma_next, problem.eta,
        list(problem.sigmas),
    )  # fmt: skip
    return mean, mean + oracle.lift(std, mean) * noise.cpu().to(dtype), std


def log_prob_of(state: Tensor, mean: Tensor, std: Tensor, kind: str) -> Tensor:
    """Mean-reduced log-density ``[rows]``, with the normaliser or as trainers of Flow-CPS have it."""
    density = -((state - mean) ** 2)
    if kind == "gaussian":
        density = oracle.log_density(state, mean, oracle.lift(std, mean))
    return density.flatten(std.ndim).mean(-1)


@dataclass
class StepCall:
    """One call of ``sde_step``: either ``noise`` or ``prev_sample``; ``log_prob`` None where a step has no density."""

    problem: Problem
    sample: Tensor
    velocity: Tensor
    noise: Tensor | fast.PhiloxNoise | None = None
    prev_sample: Tensor | None = None
    log_prob: str | None = "gaussian"
    dtype: torch.dtype | None = None


def check_step(call: StepCall, backend: str) -> None:
    """Next state, mean, log-prob and both gradients, in one comparison with the textbook."""
    problem, row_dims = call.problem, len(call.problem.rows)
    velocity = call.velocity.detach().requires_grad_()
    source = {"noise": call.noise} if call.prev_sample is None else {"prev_sample": call.prev_sample}
    result = fast.sde_step(
        call.sample, velocity, problem.step, return_mean=True, log_prob=call.log_prob, row_dims=row_dims,
        dtype=call.dtype, backend=backend, **source,
    )  # fmt: skip
    compute = compute_dtype(call.sample)
    noise = problem.noise if call.noise is None else as_tensor(call.noise, call.sample, row_dims)
    # no cancellation in sums of it
    upstream = 1.0 + problem.noise
    answers = {}
    for precision in (torch.float64, compute):
        leaf = call.velocity.detach().cpu().to(precision).requires_grad_()
        mean, state, std = eager_step(problem, call.sample, leaf, noise, precision)
        if call.prev_sample is not None:
            state = call.prev_sample.cpu().to(precision)
        (of_mean,) = torch.autograd.grad((mean * upstream.to(precision)).sum(), leaf, retain_graph=True)
        answer = {"mean": mean.detach(), "state": state.detach(), "of_mean": of_mean}
        if call.log_prob is not None:
            density = log_prob_of(state.detach(), mean, std, call.log_prob)
            answer["log_prob"] = density.detach()
            (answer["of_density"],) = torch.autograd.grad(density.sum(), leaf)
        answers[precision] = answer
    (of_mean,) = torch.autograd.grad((result.mean * upstream.to(result.mean)).sum(), velocity, retain_graph=True)
    actual = {"mean": result.mean, "state": result.prev_sample, "of_mean": of_mean}
    if call.log_prob is not None:
        actual["log_prob"] = result.log_prob
        (actual["of_density"],) = torch.autograd.grad(result.log_prob.sum(), velocity)
        assert actual["log_prob"].dtype == compute
        assert actual["of_density"].dtype == velocity.dtype
    assert result.mean.dtype == compute
    assert actual["of_mean"].dtype == velocity.dtype
    if call.prev_sample is None:
        assert result.prev_sample.dtype == (call.sample.dtype if call.dtype is None else call.dtype)
    else:
        assert result.prev_sample is call.prev_sample
    assert actual.keys() == answers[compute].keys()
    for name, value in actual.items():
        exact, eager = answers[torch.float64][name], answers[compute][name]
        slack = eager_bound(exact, eager, compute)
        if name == "log_prob" and call.log_prob == "gaussian":
            # terms of a log-density cancel: it is exact to ulps of the largest of them
            size = 0.5 * exact.abs() + std.double().log().abs() + 1.0
            slack += eager_bound(size, size, compute)
        if compute == torch.float64:
            # nothing here is more exact than float64: the terms of a mean cancel, and z = (x' - mu) / S loses digits
            slack *= 16.0 * max(1.0, 1.0 / float(std.min())) if float(std.min()) > 0.0 else 16.0
        check_within(name, value.cpu(), exact, slack, compute)


@dataclass
class StatisticsCall:
    """One call of ``row_statistics``."""

    problem: Problem
    velocity: Tensor
    old_velocity: Tensor
    noise: Tensor | fast.PhiloxNoise


def check_statistics(call: StatisticsCall, backend: str) -> None:
    """P, Q, and the gradient of a mixture of them that differs from row to row; rows have one dim or two."""
    rows = call.problem.rows
    velocity = call.velocity.detach().requires_grad_()
    p, q = fast.row_statistics(
        velocity, call.old_velocity, call.noise, call.problem.step, row_dims=len(rows), backend=backend
    )
    compute = compute_dtype(velocity)
    assert p.shape == q.shape == rows
    assert p.dtype == q.dtype == compute
    step = call.problem.step
    k = torch.as_tensor(step.velocity_coef / step.std, dtype=torch.float64).expand(rows)[..., None]
    new, old = (x.detach().cpu().double().flatten(len(rows)) for x in (velocity, call.old_velocity))
    e = as_tensor(call.noise, velocity, len(rows)).flatten(len(rows))
    u = k * (new - old)
    slack = {"P": sum_bound(e * u, compute), "Q": sum_bound(u * u, compute)}
    if isinstance(call.noise, fast.PhiloxNoise) and compute == torch.float32:
        slack["P"] += NORMAL_SLACK.get(backend, NORMAL_SLACK[""]) * u.abs().mean(-1)
    for name, value, exact in (("P", p, (e * u).mean(-1)), ("Q", q, (u * u).mean(-1))):
        off = (value.detach().cpu().double() - exact).abs() - slack[name]
        assert bool((off <= 0.0).all()), f"{name}: beyond its bound by {float(off.max()):.3e}"
    count = math.prod(rows)
    of_p = torch.linspace(-1.0, 2.0, count, dtype=torch.float64).reshape(rows)
    of_q = torch.linspace(1.5, -0.5, count, dtype=torch.float64).reshape(rows)
    (grad,) = torch.autograd.grad((of_p.to(p) * p + of_q.to(q) * q).sum(), velocity)
    assert grad.dtype == velocity.dtype

    def expected(dtype: torch.dtype) -> Tensor:
        a, b, scale = (x.to(dtype) for x in (of_p[..., None], of_q[..., None], k))
        difference = scale * (new.to(dtype) - old.to(dtype))
        return (scale / new.shape[-1] * (a * e.to(dtype) + 2.0 * b * difference)).reshape(velocity.shape)

    exact = expected(torch.float64)
    check_within("gradient", grad.cpu(), exact, eager_bound(exact, expected(compute), compute), compute)
