"""An objective of one's own in a few lines of torch, trained beside the built-in one.

    python examples/custom_objective.py

``row_statistics`` gives the two numbers per row, ``P`` and ``Q``, of which everything is a function: the log-ratio
``P - Q/2``, the KL ``Q/2``. Kernels stream over the latents; what you write sees a number per row. Where Flow-DPPO
drops a row that is beyond its threshold, the objective here pulls every row back, the harder the larger its KL.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from loss_in_your_loop import LATENT, STEP, TRAINED, Rollout, Velocity, replay, through_velocities, train
from torch import Tensor

from flowdppo_fast import SDEStep, row_statistics


def smooth_kl_loss(
    velocity: Tensor, old_velocity: Tensor, noise: Tensor, step: SDEStep, advantages: Tensor, strength: float
) -> tuple[Tensor, Tensor]:
    """``mean(-A*r + strength*D)`` over rows ``[B, S]``, and the rows' KL ``D``; differentiable in ``velocity``."""
    p, q = row_statistics(velocity, old_velocity, noise, step, row_dims=2)
    ratio, kl = torch.exp(p - q / 2), q / 2
    return (-advantages * ratio + strength * kl).mean(), kl.detach()


def check_gradient() -> float:
    """The largest difference between the loss's gradient and finite differences, in float64, relative to the largest
    entry."""
    g = torch.Generator().manual_seed(0)
    old, noise, change = (torch.randn(2, len(TRAINED), *LATENT, generator=g, dtype=torch.float64) for _ in range(3))
    advantages = torch.randn(2, len(TRAINED), generator=g, dtype=torch.float64)
    velocity = (old + 0.1 * change).requires_grad_()

    def loss(v: Tensor) -> Tensor:
        return smooth_kl_loss(v, old, noise, STEP, advantages, strength=3.0)[0]

    (gradient,) = torch.autograd.grad(loss(velocity), velocity)
    worst, size = 0.0, 1e-5
    with torch.no_grad():
        for i in range(0, velocity.numel(), 7):
            nudge = torch.zeros(velocity.numel(), dtype=torch.float64)
            nudge[i] = size
            nudge = nudge.view_as(velocity)
            slope = (loss(velocity + nudge) - loss(velocity - nudge)) / (2 * size)
            worst = max(worst, float((slope - gradient.flatten()[i]).abs() / gradient.abs().max()))
    return worst


def main(arguments: Sequence[str] | None = None) -> dict[str, list[dict[str, float]]]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--iterations", type=int, default=60)
    parser.add_argument("--strength", type=float, default=3.0, help="of the pull towards the old policy")
    parser.add_argument("--threshold", type=float, default=2e-3, help="of Flow-DPPO: bound of the mean-reduced KL")
    args = parser.parse_args(arguments)
    print(f"gradient against finite differences: off by {check_gradient():.1e} of its largest entry")

    def smooth(model: Velocity, rollout: Rollout):
        loss, kl = smooth_kl_loss(
            replay(model, rollout), rollout.velocity, rollout.noise, STEP, rollout.advantages, args.strength
        )
        return loss, {"kl_new_old_mean": kl.mean(), "kl_new_old_max": kl.max()}

    def built_in(model: Velocity, rollout: Rollout):
        out = through_velocities(model, rollout, args.threshold)
        return out.loss, out.metrics()

    histories = {"smooth KL": train(smooth, args.iterations), "Flow-DPPO": train(built_in, args.iterations)}
    for name, history in histories.items():
        largest = max(m["kl_new_old_max"] for m in history)
        first, last = history[0]["reward"], history[-1]["reward"]
        print(f"{name}: reward {first:.3f} -> {last:.3f}, largest KL of a row {largest:.1e}")
    return histories


if __name__ == "__main__":
    # matrices this small are slower on several
    torch.set_num_threads(1)
    main()
