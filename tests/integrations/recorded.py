"""Random recorded steps under an old, a new and a reference policy, and comparison with the conventions."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from support.tolerance import ULPS, check_float64, check_within, eager_bound
from torch import Tensor

from . import conventions

# ten-step schedule of a rectified-flow model with shift 3, 1 -> 0, in the float32 that schedulers hold
SIGMAS = torch.tensor([3.0 * t / (1.0 + 2.0 * t) for t in (1.0 - i / 10 for i in range(11))]).tolist()
ETA = 0.7
THRESHOLD = 0.01
CLIP = 0.02
LATENTS = {"image": (4, 6, 5), "packed": (30, 4), "video": (4, 2, 4, 4)}
ADVANTAGE_CLIP = 1.2
SURROGATES = ("loss", "policy_loss")
FIELDS = ("loss", "grad")


@dataclass
class Recorded:
    """Rows ``[B, *latent]`` of one call: all advantage signs, ratio directions and distances from the old policy."""

    sampler: str
    index: list[int]
    state: Tensor
    next_state: Tensor
    velocity: Tensor
    old_velocity: Tensor
    reference_velocity: Tensor
    noise: Tensor
    advantages: Tensor
    weights: Tensor

    def to(self, dtype: torch.dtype) -> Recorded:
        tensors = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return Recorded(**{k: v.to(dtype) if isinstance(v, Tensor) else v for k, v in tensors.items()})

    @property
    def levels(self) -> tuple[Tensor, Tensor]:
        table = torch.tensor(SIGMAS, dtype=self.state.dtype)
        return table[self.index], table[[i + 1 for i in self.index]]

    def replay(self, velocity: Tensor) -> conventions.Replay:
        return conventions.replay(self.sampler, self.state, velocity, self.next_state, *self.levels, ETA, SIGMAS)

    @property
    def old(self) -> conventions.Replay:
        return self.replay(self.old_velocity)

    @property
    def reference(self) -> conventions.Replay:
        return self.replay(self.reference_velocity)

    def leaf(self) -> Tensor:
        """The new velocity, to be differentiated in."""
        return self.velocity.detach().clone().requires_grad_()


def record(
    sampler: str, latent: tuple[int, ...], *, rows: int = 8, index: int | list[int] = 2, seed: int = 0
) -> Recorded:
    """Float64 steps; rows differ from the old policy by about 0.5 (far) or 0.05 (near) standard deviations."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    index = [index] * rows if isinstance(index, int) else index
    state, old, noise, other, away = (normal(rows, *latent) for _ in range(5))
    pattern = torch.arange(rows)
    sign = torch.where(pattern % 2 == 0, 1.0, -1.0).double()
    toward = torch.where(pattern // 2 % 2 == 0, 1.0, -1.0).double()
    size = torch.where(pattern // 4 % 2 == 0, 0.5, 0.05).double() * (1.0 + 0.1 * pattern / rows)
    uniform = torch.rand(2, rows, generator=g, dtype=torch.float64)
    recorded = Recorded(
        sampler, index, state, state, old, old, old + 0.3 * away, noise, sign * (0.5 + uniform[0]), 0.5 + uniform[1]
    )
    lift = conventions.lift
    drift = lift(size, state) * (0.8 * lift(toward, state) * noise + 0.6 * other)
    before = recorded.replay(old)
    slope = (recorded.replay(torch.ones_like(old)).mean - recorded.replay(torch.zeros_like(old)).mean).flatten(1)[:, 0]
    recorded.next_state = before.mean + before.std * noise
    recorded.velocity = old + drift * before.std / lift(slope, state)
    return recorded


@dataclass
class Outcome:
    """A loss, its gradient in the velocity and metrics."""

    loss: Tensor
    grad: Tensor
    metrics: dict[str, Tensor]


def outcome(loss: Tensor, leaf: Tensor, metrics: dict) -> Outcome:
    (grad,) = torch.autograd.grad(loss, leaf)
    values = {k: v.detach() if isinstance(v, Tensor) else torch.tensor(v, dtype=leaf.dtype) for k, v in metrics.items()}
    return Outcome(loss.detach(), grad, values)


def check(actual: Outcome, exact: Outcome, eager: Outcome | None = None, *, scale: float = 1.0) -> None:
    """Same loss, gradient and metrics (those of ``exact``): float64 directly, float32 against eager's own error."""
    assert set(exact.metrics) <= set(actual.metrics), set(exact.metrics) - set(actual.metrics)
    assert float(exact.grad.abs().max()) > 0.0
    pairs = [(name, getattr(actual, name), getattr(exact, name), eager and getattr(eager, name)) for name in FIELDS]
    pairs += [(k, actual.metrics[k], v, eager and eager.metrics[k]) for k, v in exact.metrics.items()]
    for name, got, expected, yardstick in pairs:
        if eager is None:
            check_float64(name, got.reshape(expected.shape).double() if got.ndim == 0 else got, expected, scale)
        else:
            bound = eager_bound(expected, yardstick, torch.float32)
            if name in SURROGATES:
                # row losses of size 1 and both signs are summed: their rounding does not shrink with what is left
                bound += ULPS * torch.finfo(torch.float32).eps
            check_within(name, got.reshape(expected.shape), expected, bound, torch.float32)
