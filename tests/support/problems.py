"""Random recorded steps, the calls made on them, and the same calls answered by the textbook."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import flowdppo_fast as fast

from . import oracle

# ten-step schedule of a rectified-flow model with shift 3, 1 -> 0
SIGMAS = [3.0 * t / (1.0 + 2.0 * t) for t in (1.0 - i / 10 for i in range(11))]
ETA = 0.7
# samplers whose steps have a density
STOCHASTIC = [name for name in fast.SAMPLERS if name != "ode"]
VELOCITY_NAMES = ("velocity", "old_velocity", "noise", "reference_velocity")
MEAN_NAMES = ("prev_sample_mean", "old_prev_sample_mean", "prev_sample", "reference_prev_sample_mean")
ROW_TENSORS = ("row_weights", "old_log_prob", "threshold_weights", "kl_weight")


@dataclass
class Problem:
    """Recorded steps under an old, a new and a reference policy, in float64.

    Rows come in all combinations of advantage sign, direction of the ratio and distance from the old policy, so that
    every branch of every objective is taken. ``index`` holds each row's step in ``sigmas``, shaped to broadcast.
    """

    rows: tuple[int, ...]
    sampler: str
    index: Tensor
    state: Tensor
    velocity: Tensor
    old_velocity: Tensor
    reference_velocity: Tensor
    noise: Tensor
    advantages: Tensor
    row_weights: Tensor
    eta: float = ETA
    sigmas: Sequence[float] = tuple(SIGMAS)

    @property
    def step(self) -> fast.SDEStep:
        """The library's step: scalar where one serves all rows, else stacked in ``index``'s shape."""
        steps = [
            fast.SDEStep.from_sigmas(
                self.sampler,
                self.sigmas[i],
                self.sigmas[i + 1],
                eta=self.eta,
                schedule=fast.ScheduleLevels.from_sigmas(self.sigmas),
            )
            for i in self.index.flatten().tolist()
        ]
        if self.index.ndim == 0:
            return steps[0]
        stacked = fast.SDEStep.stack(steps)
        numbers = {
            name: getattr(stacked, name).reshape(self.index.shape)
            for name in ("sample_coef", "velocity_coef", "std", "dt", "sigma", "sigma_next")
        }
        return dataclasses.replace(stacked, **numbers)

    def levels(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
        """``sigma`` and ``sigma_next`` of each row."""
        table = torch.tensor(self.sigmas, dtype=dtype)
        index = self.index.expand(self.rows)
        return table[index], table[index + 1]

    def mean_of(self, velocity: Tensor) -> tuple[Tensor, Tensor]:
        """Textbook mean and standard deviation of the step, in ``velocity``'s dtype."""
        sigma, sigma_next = self.levels(velocity.dtype)
        state = self.state.to(velocity.dtype)
        return oracle.sampler_step(self.sampler, state, velocity, sigma, sigma_next, self.eta, self.sigmas)


def make_problem(
    rows: tuple[int, ...] = (8,),
    latent: tuple[int, ...] = (3, 5, 7),
    *,
    sampler: str = "flow_sde",
    index: int | list = 2,
    drift: float = 1.0,
    seed: int = 0,
    eta: float = ETA,
    sigmas: Sequence[float] = tuple(SIGMAS),
) -> Problem:
    """Rows that differ from the old policy by ``drift * 0.5`` (far) or ``drift * 0.05`` (near) standard deviations."""
    g = torch.Generator().manual_seed(seed)

    def normal() -> Tensor:
        return torch.randn((*rows, *latent), generator=g, dtype=torch.float64)

    numel, count = math.prod(latent), math.prod(rows)
    state, old, noise, other, away = (normal() for _ in range(5))
    pattern = torch.arange(count).reshape(rows)
    sign = torch.where(pattern % 2 == 0, 1.0, -1.0).double()
    toward = torch.where(pattern // 2 % 2 == 0, 1.0, -1.0).double()
    size = drift * torch.where(pattern // 4 % 2 == 0, 0.5, 0.05).double() * (1.0 + 0.1 * pattern / count)
    step_index = torch.tensor(index)
    problem = Problem(
        rows, sampler, step_index, state, old, old, old, noise,
        sign * (0.5 + torch.rand(rows, generator=g, dtype=torch.float64)),
        0.5 + torch.rand(rows, generator=g, dtype=torch.float64), eta, sigmas,
    )  # fmt: skip
    # u = size * (toward * 0.8 * e + 0.6 * other), so that log-ratios have the sign of `toward`
    u = oracle.lift(size, noise) * (0.8 * oracle.lift(toward, noise) * noise + (0.6 if numel > 4 else 0.0) * other)
    zero, std = problem.mean_of(torch.zeros_like(old))
    slope = problem.mean_of(torch.ones_like(old))[0] - zero
    velocity = old + u * oracle.lift(std, u) / slope
    reference = old + drift * 0.3 * away
    return dataclasses.replace(problem, velocity=velocity, reference_velocity=reference)


@dataclass
class Call:
    """One loss call: tensors as the user holds them, and everything the textbook needs to answer it.

    ``upstream`` is what flows into a scalar loss from above, the factor of a gradient scaler; 1 is the loss as it is.
    """

    problem: Problem
    form: str
    objective: Any
    rule: oracle.Rule
    tensors: dict[str, Tensor | fast.PhiloxNoise | None]
    advantages: Tensor
    options: dict[str, Any]
    std: float | Tensor | None = None
    dt: float | Tensor | None = None
    step: fast.SDEStep | None = None
    upstream: float = 1.0

    @property
    def first(self) -> Tensor:
        return next(iter(self.tensors.values()))

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Call:
        """The same call with every tensor changed: moved, upcast, laid out anew."""

        def apply(value: Any) -> Any:
            return change(value) if isinstance(value, Tensor) else value

        return dataclasses.replace(
            self,
            tensors={name: apply(x) for name, x in self.tensors.items()},
            advantages=apply(self.advantages),
            options={name: apply(x) for name, x in self.options.items()},
            std=apply(self.std),
            dt=apply(self.dt),
        )

    def upcast(self) -> Call:
        """The same numbers in float64 on the CPU, contiguous."""
        moved = self.mapped(lambda x: x.detach().cpu().double().contiguous())
        for name, x in moved.tensors.items():
            if isinstance(x, fast.PhiloxNoise) and isinstance(x.stream, Tensor):
                moved.tensors[name] = fast.PhiloxNoise(x.seed, x.stream.cpu())
        return moved


@dataclass
class Outcome:
    """What came out of a call, on the CPU, in the dtypes it came in (``size``: see :class:`oracle.Answer`)."""

    loss: Tensor
    rows: dict[str, Tensor]
    metrics: dict[str, Tensor]
    grad: Tensor
    backend: str = "textbook"
    size: Tensor | None = None


def make_call(
    problem: Problem,
    form: str,
    objective: Any,
    rule: oracle.Rule,
    *,
    dtypes: torch.dtype | tuple[torch.dtype, ...] = torch.float64,
    layout: Callable[[Tensor, int], Tensor] | dict[str, Callable] | None = None,
    with_reference: bool = False,
    with_old_log_prob: bool = False,
    with_weights: bool = False,
    with_row_bounds: bool = False,
    std_shape: str = "rows",
    noise: fast.PhiloxNoise | None = None,
    device: str = "cpu",
    **options: Any,
) -> Call:
    """The call on ``problem``.

    ``dtypes`` are of (new, old, noise or next state, reference); ``layout`` (for all, or by name) lays a tensor out in
    memory; ``noise`` stands in for the noise tensor.
    """
    dtypes = dtypes if isinstance(dtypes, tuple) else (dtypes,) * 4
    row_dtype = torch.float64 if dtypes[0] == torch.float64 else torch.float32
    old_mean, std = problem.mean_of(problem.old_velocity)
    if form == "velocity":
        names = VELOCITY_NAMES
        values = (problem.velocity, problem.old_velocity, problem.noise, problem.reference_velocity)
    else:
        names = MEAN_NAMES
        next_state = old_mean + oracle.lift(std, old_mean) * problem.noise
        values = (
            problem.mean_of(problem.velocity)[0],
            old_mean,
            next_state,
            problem.mean_of(problem.reference_velocity)[0],
        )
    tensors: dict[str, Tensor | fast.PhiloxNoise | None] = {}
    for name, value, dtype in zip(names, values, dtypes):
        x = value.to(device=device, dtype=dtype)
        lay = layout.get(name) if isinstance(layout, dict) else layout
        tensors[name] = x if lay is None else lay(x, len(problem.rows))
    if not with_reference:
        tensors[names[3]] = None
    if noise is not None:
        tensors["noise"] = noise
    sigma, sigma_next = problem.levels()
    advantages = problem.advantages.to(device=device, dtype=row_dtype)
    call = Call(problem, form, objective, rule, tensors, advantages, options)
    if form == "velocity":
        call.step = problem.step
    else:
        call.std, call.dt = _as_held(std, std_shape, row_dtype), _as_held(sigma_next - sigma, std_shape, row_dtype)
    if with_weights:
        options["row_weights"] = problem.row_weights.to(row_dtype)
    if with_row_bounds:
        # numbers of rows that are no powers of each other, a weight of either sign
        options["threshold_weights"] = (2.0 - problem.row_weights).to(row_dtype)
        options["kl_weight"] = (0.4 * (problem.row_weights - 0.8)).to(row_dtype)
    if with_old_log_prob:
        options["old_log_prob"] = _rollout_log_prob(call).to(row_dtype)
    for name in ROW_TENSORS:
        if isinstance(options.get(name), Tensor):
            options[name] = options[name].to(device)
    call.std, call.dt = (x.to(device) if isinstance(x, Tensor) else x for x in (call.std, call.dt))
    return call


def _as_held(value: Tensor, shape: str, dtype: torch.dtype) -> float | Tensor:
    """A row-wise number the way trainers hold it."""
    if shape == "float":
        return value.flatten()[0].item()
    if shape == "0-d":
        return value.flatten()[0].to(dtype)
    if shape == "singleton":
        return value.to(dtype).reshape(*value.shape, 1, 1, 1)
    return value.to(dtype)


def _textbook_means(call: Call, dtype: torch.dtype, grad: bool) -> tuple[Tensor, ...]:
    """``first`` (with grad if asked), the means of the three policies, next state, std and dt, all in ``dtype``."""
    rows = call.problem.rows

    def plain(x: Tensor | fast.PhiloxNoise | None) -> Tensor | None:
        if isinstance(x, fast.PhiloxNoise):
            x = x.materialize(call.first.shape, row_dims=len(rows), device=call.first.device, dtype=torch.float64)
        return None if x is None else x.detach().cpu().to(dtype)

    new, old, third, reference = map(plain, call.tensors.values())
    first = new.clone().requires_grad_(grad)
    sigma, sigma_next = call.problem.levels(dtype)
    if call.form == "velocity":
        mean, std = call.problem.mean_of(first)
        old_mean, _ = call.problem.mean_of(old)
        reference_mean = None if reference is None else call.problem.mean_of(reference)[0]
        return (
            first,
            mean,
            old_mean,
            reference_mean,
            old_mean + oracle.lift(std, old_mean) * third,
            std,
            (sigma_next - sigma),
        )

    def per_row(value: float | Tensor) -> Tensor:
        value = torch.as_tensor(value, dtype=dtype, device="cpu").detach()
        return value.reshape(value.shape[: len(rows)]).expand(rows)

    return first, first, old, reference, third, per_row(call.std), per_row(call.dt)


def _rollout_log_prob(call: Call) -> Tensor:
    """The rollout's log-probs of the recorded next states, mean-reduced, in float64."""
    _, _, old_mean, _, next_state, std, _ = _textbook_means(call, torch.float64, grad=False)
    if call.options.get("log_prob") == "unnormalized":
        density = -((next_state - old_mean) ** 2)
    else:
        density = oracle.log_density(next_state, old_mean, oracle.lift(std, old_mean))
    return density.flatten(len(call.problem.rows)).mean(-1)


def textbook(call: Call, dtype: torch.dtype = torch.float64) -> Outcome:
    """The call answered by :mod:`support.oracle` and autograd, everything computed in ``dtype``."""
    first, mean, old_mean, reference_mean, next_state, std, dt = _textbook_means(call, dtype, grad=True)
    options = dict(call.options)
    reduction = options.pop("reduction", "mean")
    options.pop("single_pass", None)
    for name in ROW_TENSORS:
        if isinstance(options.get(name), Tensor):
            options[name] = options[name].detach().cpu().to(dtype)
    velocities = None
    if call.form == "velocity":
        third = call.tensors["reference_velocity"]
        third = None if third is None else third.detach().cpu().to(dtype)
        velocities = (first, call.tensors["old_velocity"].detach().cpu().to(dtype), third)
    answer = oracle.policy_loss(
        call.rule, mean, old_mean, next_state, std, dt, call.advantages.detach().cpu().to(dtype),
        velocities=velocities, reference_mean=reference_mean, **options,
    )  # fmt: skip
    loss = {
        "mean": answer.row_loss.mean(), "sum": answer.row_loss.sum(), "none": answer.row_loss,
        "kept": answer.row_loss.sum() / answer.kept.sum().clamp_min(1),
    }[reduction]  # fmt: skip
    (grad,) = torch.autograd.grad((loss * upstream_of(loss, call.upstream)).sum(), first)
    rows = {name: getattr(answer, name) for name in ("log_ratio", "ratio", "kl", "kept")}
    rows["loss"] = answer.row_loss.detach()
    return Outcome(loss.detach(), rows, answer.metrics, grad, size=answer.size)


def library(call: Call, backend: str) -> Outcome:
    """The call answered by the library; the gradient is the raw one, as the backward returned it."""
    first, old, third, reference = call.tensors.values()
    needs_dt = call.rule.name == "grpo_guard" or call.options.get("reference_kl") == "without_dt"
    first = first.detach()
    if not call.options.get("single_pass"):
        first.requires_grad_()
    if call.form == "velocity":
        out = fast.fused_policy_velocity_loss(
            first, old, third, call.step, call.advantages, objective=call.objective,
            reference_velocity=reference, backend=backend, **call.options,
        )  # fmt: skip
    else:
        out = fast.fused_policy_loss(
            first, old, third, call.std, call.advantages, objective=call.objective, dt=call.dt if needs_dt else None,
            reference_prev_sample_mean=reference, backend=backend, **call.options,
        )  # fmt: skip
    grad = out.grad
    if grad is None:
        # a scalar loss is differentiated as it is: that is the path trainers take
        plain = out.loss.ndim == 0 and call.upstream == 1.0
        upstream = None if plain else upstream_of(out.loss, call.upstream).to(out.loss)
        (grad,) = torch.autograd.grad(out.loss, first, upstream)
    return Outcome(
        out.loss.detach().cpu(),
        {name: x.cpu() for name, x in out.rows._asdict().items()},
        {name: x.cpu() for name, x in out.metrics().items()},
        grad.cpu() if grad.device.type != "cpu" else grad,
        out.backend,
    )


def upstream_of(loss: Tensor, scalar: float = 1.0) -> Tensor:
    """What flows into the loss from above: ``scalar`` for a scalar, different numbers for a vector of row losses."""
    if loss.ndim == 0:
        return torch.full((), scalar, dtype=loss.dtype)
    return (torch.arange(loss.numel(), dtype=loss.dtype) * 0.3 - 0.7).reshape(loss.shape)
