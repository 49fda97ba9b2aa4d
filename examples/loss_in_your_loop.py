"""Flow-DPPO in a training loop of one's own: sample, score, update, with nothing of the trainer.

    python examples/loss_in_your_loop.py --door velocity    # or means

A small network draws 4x4 patches of two channels and learns to draw one that is asked for. Both doors of the loss
compute the same; the first stores the model's output and the noise, the second the steps' means and the next states.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from flowdppo_fast import (
    LossOutput,
    Metrics,
    SDEStep,
    fused_dppo_loss,
    fused_dppo_velocity_loss,
    sde_schedule,
    sde_step,
)

SEED = 0
LATENT = (2, 4, 4)
SIGMAS = [1.0 - i / 10 for i in range(11)]
# the steps that draw noise and are trained; the others follow the flow
TRAINED = range(1, 6)
NOISY, PLAIN = (sde_schedule(sampler, SIGMAS, eta=0.7) for sampler in ("flow_sde", "ode"))
# the trained steps as one, for rows [B, S]
STEP = SDEStep.stack([NOISY[i] for i in TRAINED])
# what is asked for: a checkerboard of 1 and -1, and its opposite in the second channel
STRIPES = torch.tensor([1.0, -1.0, 1.0, -1.0])
PATTERN = torch.stack([STRIPES.outer(STRIPES), -STRIPES.outer(STRIPES)])


class Velocity(nn.Module):
    """The exact flow from noise to ``N(0, I)``, and a network that starts at zero and bends it."""

    def __init__(self, width: int = 64):
        super().__init__()
        size = PATTERN.numel()
        self.bend = nn.Sequential(nn.Linear(size + 1, width), nn.SiLU(), nn.Linear(width, size))
        nn.init.zeros_(self.bend[2].weight)
        nn.init.zeros_(self.bend[2].bias)

    def forward(self, state: Tensor, sigma: Tensor) -> Tensor:
        """Velocities like the states ``[B, *LATENT]`` at levels ``sigma [B]``."""
        s = sigma.view(-1, 1, 1, 1)
        exact = (2 * s - 1) / (s**2 + (1 - s) ** 2) * state
        return exact + self.bend(torch.cat([state.flatten(1), sigma[:, None]], 1)).view_as(state)


class Rollout(NamedTuple):
    """What an update needs; ``[B, S, *LATENT]`` for the S trained steps, ``rewards [B]``, ``advantages [B, S]``."""

    states: Tensor
    velocity: Tensor
    noise: Tensor
    next_states: Tensor
    rewards: Tensor
    advantages: Tensor


@torch.no_grad()
def sample(model: Velocity, count: int, generator: torch.Generator) -> Rollout:
    """``count`` patches, scored by how close they come to the pattern."""
    state, kept = torch.randn(count, *LATENT, generator=generator), []
    for i, (noisy, plain) in enumerate(zip(NOISY, PLAIN)):
        velocity = model(state, torch.full((count,), SIGMAS[i]))
        taken = sde_step(state, velocity, noisy if i in TRAINED else plain, generator=generator)
        if i in TRAINED:
            kept.append((state, velocity, taken.noise, taken.prev_sample))
        state = taken.prev_sample
    rewards = -(state - PATTERN).square().flatten(1).mean(1)
    advantages = (rewards - rewards.mean()) / rewards.std()
    recorded = (torch.stack(part, 1) for part in zip(*kept))
    return Rollout(*recorded, rewards, advantages[:, None].expand(-1, len(TRAINED)))


def replay(model: Velocity, rollout: Rollout) -> Tensor:
    """Velocities of all recorded steps in one call, with gradients."""
    count = len(rollout.rewards)
    sigma = torch.tensor([SIGMAS[i] for i in TRAINED]).repeat(count)
    return model(rollout.states.flatten(0, 1), sigma).view_as(rollout.velocity)


def through_velocities(model: Velocity, rollout: Rollout, threshold: float) -> LossOutput:
    velocity = replay(model, rollout)
    return fused_dppo_velocity_loss(
        velocity, rollout.velocity, rollout.noise, STEP, rollout.advantages, threshold=threshold
    )


def through_means(model: Velocity, rollout: Rollout, threshold: float) -> LossOutput:
    a, b, std = (torch.as_tensor(x).float() for x in (STEP.sample_coef, STEP.velocity_coef, STEP.std))

    def mean(velocity: Tensor) -> Tensor:
        return a.view(-1, 1, 1, 1) * rollout.states + b.view(-1, 1, 1, 1) * velocity

    return fused_dppo_loss(
        mean(replay(model, rollout)), mean(rollout.velocity), rollout.next_states, std, rollout.advantages,
        threshold=threshold,
    )  # fmt: skip


DOORS: dict[str, Callable[[Velocity, Rollout, float], LossOutput]] = {
    "velocity": through_velocities,
    "means": through_means,
}


def train(
    loss: Callable[[Velocity, Rollout], tuple[Tensor, dict[str, Tensor]]], iterations: int
) -> list[dict[str, float]]:
    """Metrics of every iteration: one rollout of 128 patches and four updates on it.

    Args:
        loss: a scalar to be differentiated, and metrics that stay on the device.
    """
    torch.manual_seed(SEED)
    model, generator = Velocity(), torch.Generator().manual_seed(SEED)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    history = []
    for _ in range(iterations):
        rollout = sample(model, 128, generator)
        for _ in range(4):
            value, metrics = loss(model, rollout)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
        # the last update's, all read from the device at once
        history.append(Metrics(reward=rollout.rewards.mean(), **metrics).to_floats())
    return history


def main(arguments: Sequence[str] | None = None) -> list[dict[str, float]]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--door", choices=DOORS, default="velocity")
    parser.add_argument("--iterations", type=int, default=60)
    parser.add_argument("--threshold", type=float, default=2e-3, help="bound of the mean-reduced KL")
    args = parser.parse_args(arguments)

    def loss(model: Velocity, rollout: Rollout) -> tuple[Tensor, dict[str, Tensor]]:
        out = DOORS[args.door](model, rollout, args.threshold)
        return out.loss, out.metrics()

    history = train(loss, args.iterations)
    for number, m in enumerate(history, 1):
        if number % 10 == 0 or number == 1:
            kl, dropped = m["kl_new_old_mean"], m["masked_fraction"]
            print(f"iteration {number:3d}  reward {m['reward']:.3f}  KL {kl:.1e}  dropped {dropped:.1%}")
    return history


if __name__ == "__main__":
    # matrices this small are slower on several
    torch.set_num_threads(1)
    main()
