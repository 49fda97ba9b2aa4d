"""One recorded step whose exact KL is known, answered from what different trainers store of it.

The truth is the model's own output: old and new velocities are numbers of the dtype the model computes in, noise is
float32, and KL, log-ratio and gradient follow from them in float64. A method gets what it stores and nothing else; its
error is against that truth, storage included.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import flowdppo_fast as fast
from bench.ops import peers

# an early step of SD3's ten-step schedule (shift 3)
SIGMA, SIGMA_NEXT, ETA = 0.9643, 0.9231, 0.7
# of the rows of a record; the longest are measured one at a time
ADVANTAGES = (1.0, -1.0, 0.5, -0.5)
THRESHOLD = 1e-5
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class Recorded:
    """What happened, in the numbers that happened: velocities in the model's dtype, everything else derived."""

    step: fast.SDEStep
    state: Tensor
    new: Tensor
    old: Tensor
    noise: fast.PhiloxNoise
    advantages: Tensor

    def drawn(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.noise.materialize(tuple(self.old.shape), device=self.old.device, dtype=dtype)


@dataclass
class Answer:
    """KL, log-ratio and mask per row, the loss, and its gradient in the velocity."""

    kl: Tensor
    log_ratio: Tensor
    loss: Tensor
    grad: Tensor
    kept: Tensor
    # mean of the absolute row losses, for the truth
    size: Tensor | None = None


def record(divergence: float, numel: int, dtype: torch.dtype, device: str, seed: int) -> Recorded:
    """Rows whose KL is about ``divergence``; exactly what follows from velocities that were rounded to ``dtype``."""
    g = torch.Generator().manual_seed(seed)
    step = fast.SDEStep.from_sigmas("flow_sde", SIGMA, SIGMA_NEXT, eta=ETA)
    rows = len(ADVANTAGES) if numel < 10**7 else 1
    normal = [torch.randn(rows, numel, generator=g, dtype=torch.float64) for _ in range(3)]
    state, old, away = normal
    old = old.to(dtype)
    # KL = mean(u*u)/2 with u = k*(new - old)
    new = (old.double() + math.sqrt(2.0 * divergence) / abs(step.kl_scale) * away).to(dtype)
    advantages = torch.tensor(ADVANTAGES[:rows])
    moved = [x.to(device) for x in (state, new, old, advantages)]
    return Recorded(step, moved[0], moved[1], moved[2], fast.PhiloxNoise(seed, 0), moved[3])


def exact(recorded: Recorded) -> Answer:
    """The formulas in float64 on the model's own numbers."""
    k = recorded.step.kl_scale
    u = k * (recorded.new.double() - recorded.old.double())
    # the action is the float32 noise that the sampler drew
    e = recorded.drawn().double()
    q, p = u.square().mean(1), (e * u).mean(1)
    log_ratio = p - 0.5 * q
    advantages = recorded.advantages.double()
    surrogate = -advantages * log_ratio.exp()
    away = advantages * log_ratio > 0
    kept = ~((0.5 * q >= THRESHOLD) & away)
    slope = torch.where(kept, surrogate, 0.0) / len(advantages)
    grad = (slope * k / u.shape[1])[:, None] * (e - u)
    return Answer(0.5 * q, log_ratio, torch.where(kept, surrogate, 0.0).mean(), grad, kept, surrogate.abs().mean())


Method = Callable[[Recorded], Answer]


def velocities(backend: str, *, seeded: bool = False, noise: torch.dtype = torch.float32) -> Method:
    """This library on velocities as the model gave them."""

    def answer(recorded: Recorded) -> Answer:
        drawn: Any = recorded.noise if seeded else recorded.drawn().to(noise)
        out = fast.fused_dppo_velocity_loss(
            recorded.new, recorded.old, drawn, recorded.step, recorded.advantages,
            threshold=THRESHOLD, single_pass=True, backend=backend,
        )  # fmt: skip
        assert out.grad is not None
        return Answer(out.rows.kl, out.rows.log_ratio, out.loss, out.grad, out.rows.kept)

    return answer


def means(backend: str, dtype: torch.dtype) -> Method:
    """This library on step means: the old one and the next state stored in ``dtype``, the new one in float32."""

    def answer(recorded: Recorded) -> Answer:
        step = recorded.step
        a, b, std = float(step.sample_coef), float(step.velocity_coef), float(step.std)
        state = recorded.state.float()
        old = (a * state + b * recorded.old.float()).to(dtype)
        following = (a * state + b * recorded.old.float() + std * recorded.drawn()).to(dtype)
        new = (a * state + b * recorded.new.float()).requires_grad_()
        out = fast.fused_dppo_loss(new, old, following, std, recorded.advantages, threshold=THRESHOLD, backend=backend)
        (grad,) = torch.autograd.grad(out.loss, new)
        return Answer(out.rows.kl, out.rows.log_ratio, out.loss.detach(), b * grad, out.rows.kept)

    return answer


def peer(dtype: torch.dtype) -> Method:
    """The trainers' own formulas in eager float32: old means stored in ``dtype``, old log-probs in float32."""

    def answer(recorded: Recorded) -> Answer:
        device = recorded.new.device
        levels = peers.Levels(*(torch.tensor(x, device=device) for x in (SIGMA, SIGMA_NEXT, ETA)))
        state = recorded.state.float()
        old_mean, std = peers.step_mean(recorded.old, state, levels)
        following = old_mean + std * recorded.drawn()
        old_log_prob = peers.log_prob(following, old_mean, std, 1)
        velocity = recorded.new.float().requires_grad_()
        out = peers.dppo(
            velocity, state, following, old_mean.to(dtype), old_log_prob, recorded.advantages, levels, THRESHOLD
        )
        (grad,) = torch.autograd.grad(out.loss, velocity)
        assert out.kl is not None
        away = recorded.advantages * out.log_ratio > 0
        kl = out.kl.detach()
        return Answer(kl, out.log_ratio, out.loss.detach(), grad, ~((kl >= THRESHOLD) & away))

    return answer


def methods(backends: list[str]) -> dict[str, Method]:
    """What is compared, by name."""
    found: dict[str, Method] = {}
    for backend in backends:
        found[f"{backend}: velocities"] = velocities(backend)
        found[f"{backend}: velocities, seeded noise"] = velocities(backend, seeded=True)
        found[f"{backend}: velocities, bfloat16 noise"] = velocities(backend, noise=torch.bfloat16)
        for name, dtype in DTYPES.items():
            found[f"{backend}: {name} means"] = means(backend, dtype)
    for name, dtype in DTYPES.items():
        found[f"peers: {name} means"] = peer(dtype)
    return found


def compare(answer: Answer, truth: Answer) -> dict[str, float]:
    """Errors of one answer: of the worst row, relative where a row is compared with itself."""

    def off(a: Tensor, b: Tensor) -> Tensor:
        return (a.double() - b).abs()

    ratio, true_ratio = answer.log_ratio.double().exp(), truth.log_ratio.exp()
    norm = torch.linalg.vector_norm
    return {
        "kl_quotient": float((answer.kl.double() / truth.kl).median()),
        "kl_error": float((off(answer.kl, truth.kl) / truth.kl).max()),
        "log_ratio_error": float(off(answer.log_ratio, truth.log_ratio).max()),
        "ratio_error": float((off(ratio, true_ratio) / true_ratio).max()),
        # rows of both signs cancel in the loss: relative to their size
        "loss_error": float(off(answer.loss, truth.loss) / truth.size),
        "grad_error": float(norm(answer.grad.double() - truth.grad) / norm(truth.grad)),
        "mask_differs": int((answer.kept != truth.kept).sum()),
    }


def sweep(
    divergences: list[float], sizes: list[int], model_dtypes: list[str], backends: list[str], device: str, seeds: int
) -> Iterator[dict[str, Any]]:
    """A record per model dtype, size, KL, seed and method."""
    for name in model_dtypes:
        for numel in sizes:
            # the large sizes take gigabytes and minutes
            for divergence in divergences if numel < 10**6 else divergences[::3]:
                for seed in range(seeds if numel < 10**6 else 1):
                    recorded = record(divergence, numel, DTYPES[name], device, seed)
                    truth = exact(recorded)
                    if not bool((truth.kl > 0).all()):
                        # the model's dtype has no room for so small a change in so few elements
                        continue
                    true_kl = float(truth.kl.median())
                    for method, run in methods(backends).items():
                        if method.startswith("triton") and numel > 5000 and device == "cpu":
                            continue
                        yield {
                            "model_dtype": name, "elements": numel, "nominal_kl": divergence, "seed": seed,
                            "method": method, "true_kl": true_kl, **compare(run(recorded), truth),
                        }  # fmt: skip
