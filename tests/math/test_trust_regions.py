"""What each bound does with a row inside, at and beyond it: the table of the objectives' page, in numbers."""

from __future__ import annotations

import math

import pytest
import torch

import flowdppo_fast as fast

MOVED = 0.25
THRESHOLD, LOG_RATIO = MOVED**2 / 2, MOVED - MOVED**2 / 2
CLIP = math.expm1(LOG_RATIO)
INSIDE, BEYOND = 0.125, 0.5
PULL, WEIGHT = 0.3, 4.0


def push(objective, moved: float, advantage: float = 1.0) -> float:
    """``-dl/dt`` of a row at ``u = t*e`` with ``e = 1``: ``P = t``, ``Q = t**2``, all exact."""
    new = torch.full((1, 4), moved, dtype=torch.float64, requires_grad=True)
    old, state = torch.zeros(1, 4, dtype=torch.float64), torch.ones(1, 4, dtype=torch.float64)
    advantages = torch.tensor([advantage], dtype=torch.float64)
    fast.fused_policy_loss(new, old, state, 1.0, advantages, objective=objective, dt=-1.0).loss.backward()
    return -float(new.grad.sum())


def plain(t: float, advantage: float = 1.0) -> float:
    return advantage * math.exp(t - t * t / 2) * (1.0 - t)


def square(t: float, advantage: float = 1.0) -> float:
    r = math.exp(t - t * t / 2)
    return plain(t, advantage) - abs(advantage) * (r - 1.0) * r * (1.0 - t) / CLIP


BACK = -2.0
CASES = {
    # inside, at the bound, beyond and moving on, beyond and coming back
    "unclipped": (fast.Unclipped(), plain(INSIDE), plain(MOVED), plain(BEYOND), plain(BEYOND, BACK)),
    "mask": (fast.DPPO(THRESHOLD), plain(INSIDE), 0.0, 0.0, plain(BEYOND, BACK)),
    "symmetric": (fast.DPPO(THRESHOLD, symmetric=True), plain(INSIDE), 0.0, 0.0, 0.0),
    "clip": (fast.RatioClip(0.9, 1.1 * CLIP), plain(INSIDE), plain(MOVED), 0.0, plain(BEYOND, BACK)),
    "mask and loose clip": (
        fast.DPPO(THRESHOLD, low=0.9, high=9.0), plain(INSIDE), 0.0, 0.0, plain(BEYOND, BACK),
    ),
    "clip and loose mask": (fast.DPPO(9.0, low=0.9, high=1e-3), 0.0, 0.0, 0.0, plain(BEYOND, BACK)),
    "pull": (
        fast.DPPO(THRESHOLD, pull=PULL), plain(INSIDE), -PULL * MOVED / THRESHOLD, -PULL * BEYOND / THRESHOLD,
        plain(BEYOND, BACK) - PULL * abs(BACK) * BEYOND / THRESHOLD,
    ),
    "KL penalty": (
        fast.KLPenalty(WEIGHT), plain(INSIDE) - WEIGHT * INSIDE, plain(MOVED) - WEIGHT * MOVED,
        plain(BEYOND) - WEIGHT * BEYOND, plain(BEYOND, BACK) - WEIGHT * BEYOND,
    ),
    "DRPO": (
        fast.DRPO(1.0 / WEIGHT), plain(INSIDE) - WEIGHT * INSIDE, plain(MOVED) - WEIGHT * MOVED,
        plain(BEYOND) - WEIGHT * BEYOND, plain(BEYOND, BACK) - WEIGHT * abs(BACK) * BEYOND,
    ),
    "DRPO on the ratio": (
        fast.DRPO(CLIP, "ratio"), square(INSIDE), 0.0, square(BEYOND), square(BEYOND, BACK),
    ),
    "hinge": (fast.LogHinge(LOG_RATIO), 1.0 - INSIDE, 0.0, 0.0, BACK * (1.0 - BEYOND)),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_push_on_a_row(name):
    objective, inside, at, beyond, back = CASES[name]
    found = [push(objective, INSIDE), push(objective, MOVED), push(objective, BEYOND), push(objective, BEYOND, BACK)]
    assert found == pytest.approx([inside, at, beyond, back], rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
def test_where_drpo_lets_a_row_rest_does_not_depend_on_the_scale_of_advantages(scale):
    assert push(fast.DRPO(0.2, "ratio"), LOG_RATIO, scale) == pytest.approx(
        scale * push(fast.DRPO(0.2, "ratio"), LOG_RATIO)
    )
    assert push(fast.DRPO(0.2), MOVED, scale) == pytest.approx(scale * push(fast.DRPO(0.2), MOVED))


@pytest.mark.parametrize("kind", [fast.DPPO, fast.DRPO])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("numel", [16, 1000])
def test_a_threshold_in_nats_is_the_sum_over_the_latent(backend, kind, reduction, numel):
    g = torch.Generator().manual_seed(0)
    old, noise, change = (torch.randn(6, numel, generator=g).to(backend.device) for _ in range(3))
    advantages = torch.randn(6, generator=g).to(backend.device)
    step = fast.SDEStep.from_sigmas("dance", 0.7, 0.6)
    size = torch.linspace(0.01, 0.2, 6)[:, None].to(backend.device)
    in_nats, of_mean = (
        fast.fused_policy_velocity_loss(
            old + size * change, old, noise, step, advantages, objective=objective, latent_reduction=reduction,
            backend=backend.name, single_pass=True,
        )
        for objective in (kind(threshold_nats=0.5), kind(0.5 if reduction == "sum" else 0.5 / numel))
    )  # fmt: skip
    assert torch.equal(in_nats.row_results, of_mean.row_results)
    assert torch.equal(in_nats.grad, of_mean.grad)


def test_weights_of_thresholds_are_other_thresholds(backend):
    """A row with a weight is the row of a call with that threshold, of every kind of bound that has one."""
    g = torch.Generator().manual_seed(1)
    old, noise, change = (torch.randn(4, 40, generator=g).to(backend.device) for _ in range(3))
    advantages = torch.tensor([1.0, -1.0, 2.0, -0.5], device=backend.device)
    step = fast.SDEStep.from_sigmas("dance", 0.7, 0.6)
    new, weights = old + 0.1 * change, torch.tensor([0.5, 1.0, 2.0, 4.0], device=backend.device)
    for make in (fast.DPPO, lambda bound: fast.DPPO(bound, pull=0.2), fast.DRPO, lambda b: fast.KLPenalty(1.0 / b)):
        together = fast.fused_policy_velocity_loss(
            new, old, noise, step, advantages, objective=make(0.004), threshold_weights=weights, reduction="sum",
            backend=backend.name, single_pass=True,
        )  # fmt: skip
        for row in range(4):
            part = slice(row, row + 1)
            alone = fast.fused_policy_velocity_loss(
                new[part], old[part], noise[part], step, advantages[part], objective=make(0.004 * float(weights[row])),
                reduction="sum", backend=backend.name, single_pass=True,
            )  # fmt: skip
            torch.testing.assert_close(together.row_results[:, part], alone.row_results)
            torch.testing.assert_close(together.grad[part], alone.grad)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fast.DPPO(threshold_nats=0.0), "threshold_nats: got 0.0, expected a number > 0"),
        (lambda: fast.DPPO(high=1e-4), r"low: got None, expected a number in \(0, 1\)"),
        (lambda: fast.DPPO(pull=-1.0), "pull: got -1.0, expected a number > 0"),
        (lambda: fast.DPPO(low=1e-4, pull=1.0), "low, pull: got them together, expected one of them"),
        (lambda: fast.DPPO(symmetric=True, pull=1.0), "symmetric, pull: got them together"),
        (lambda: fast.KLPenalty(0.0), "weight: got 0.0"),
        (lambda: fast.DRPO(-1.0), "threshold: got -1.0"),
        (lambda: fast.DRPO(1.0, "loss"), "on: got 'loss', expected one of 'kl', 'ratio'"),
        (lambda: fast.LogHinge(0.0), "margin: got 0.0"),
    ],
)
def test_numbers_that_bound_nothing_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
