"""Optimizer steps that are taken, left out, scaled and stopped, against plain AdamW."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator

from flowdppo_fast.trainer.config import OptimizerConfig
from flowdppo_fast.trainer.weights.distributed import Workers
from flowdppo_fast.trainer.weights.optimizer import PolicyOptimizer


def make(scaled: bool = False, **settings) -> PolicyOptimizer:
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(5)), torch.nn.Parameter(torch.randn(2, 3))]
    workers = Workers(Accelerator(cpu=True))
    optimizer = PolicyOptimizer(parameters, OptimizerConfig(**settings), workers, scaled=scaled)
    give(optimizer, 0.0)
    return optimizer


def give(optimizer: PolicyOptimizer, factor: float) -> None:
    generator = torch.Generator().manual_seed(1)
    for parameter in optimizer.parameters:
        parameter.grad = factor * torch.randn(parameter.shape, generator=generator)


def values(optimizer: PolicyOptimizer) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in optimizer.parameters])


def step(optimizer: PolicyOptimizer, loss: float = 0.0, kl: float = 0.0) -> dict[str, float]:
    return {name: float(value) for name, value in optimizer.step(torch.tensor(loss), torch.tensor(kl)).items()}


def test_a_step_is_adamw_on_clipped_gradients():
    ours, theirs = make(max_grad_norm=0.5), make()
    plain = torch.optim.AdamW(theirs.parameters, lr=3e-4, weight_decay=1e-4)
    for factor in (1.0, 0.01):
        give(ours, factor)
        give(theirs, factor)
        norm = torch.nn.utils.clip_grad_norm_(theirs.parameters, 0.5)
        plain.step()
        assert step(ours)["grad_norm"] == float(norm)
    # one fused kernel and several: roundings of two steps
    torch.testing.assert_close(values(ours), values(theirs), rtol=4e-7, atol=0)
    assert all(parameter.grad.count_nonzero() == 0 for parameter in ours.parameters)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing(what):
    optimizer = make()
    give(optimizer, 1.0)
    step(optimizer)
    before, state = values(optimizer), [dict(s) for s in optimizer.adamw.state.values()]
    counts = [s["step"].item() for s in state]
    give(optimizer, float("inf") if what == "gradient" else 1.0)
    assert step(optimizer, loss=float("nan") if what == "loss" else 0.0)["skipped"] == 1
    assert torch.equal(values(optimizer), before)
    assert [s["step"].item() for s in optimizer.adamw.state.values()] == counts
    give(optimizer, 1.0)
    assert step(optimizer)["skipped"] == 0
    assert not torch.equal(values(optimizer), before)


def test_beyond_the_target_the_rest_of_a_rollout_is_left_out():
    optimizer = make(target_kl=1e-3)
    seen = []
    for kl in (0.0, 2e-3, 0.0):
        before = values(optimizer)
        give(optimizer, 1.0)
        stopped = step(optimizer, kl=kl)["stopped"]
        seen.append((stopped, torch.equal(values(optimizer), before)))
    assert seen == [(0.0, False), (1.0, True), (1.0, True)]
    optimizer.begin_rollout()
    give(optimizer, 1.0)
    before = values(optimizer)
    assert step(optimizer)["stopped"] == 0.0
    assert not torch.equal(values(optimizer), before)


def test_the_loss_scale_is_taken_off_and_halved_by_overflows():
    scaled, plain = make(scaled=True, max_grad_norm=None), make(max_grad_norm=None)
    first = float(scaled.scale)
    give(scaled, first)
    give(plain, 1.0)
    assert step(scaled)["grad_norm"] == pytest.approx(step(plain)["grad_norm"], rel=1e-6)
    # powers of two: bit for bit
    assert torch.equal(values(scaled), values(plain))
    give(scaled, float("inf"))
    # too large a scale is no fault of the run
    assert step(scaled)["skipped"] == 0
    assert float(scaled.scale) == first / 2
    assert torch.equal(values(scaled), values(plain))
    for _ in range(40):
        give(scaled, float("nan"))
        last = step(scaled)
    assert float(scaled.scale) == 1.0
    assert last["skipped"] == 1


def test_the_loss_scale_grows_after_a_long_run_and_is_kept():
    optimizer = make(scaled=True)
    first = float(optimizer.scale)
    for _ in range(1000):
        give(optimizer, 1.0)
        step(optimizer)
    assert float(optimizer.scale) == 2 * first
    other = make(scaled=True)
    other.load_state({name: value.clone() for name, value in optimizer.state().items()})
    assert float(other.scale) == 2 * first


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.25, 0.5, 0.75, 1.0, 0.8, 0.6, 0.4, 0.2]),
        ("cosine", [0.25, 0.5, 0.75, 1.0, 0.9045, 0.6545, 0.3455, 0.0955]),
    ],
)
def test_the_learning_rate_follows_its_schedule_and_knows_where_a_run_continues(schedule, expected):
    settings = {"learning_rate": 0.1, "warmup_updates": 3, "schedule": schedule, "updates_per_rollout": 2}

    def rates(first: int) -> list[float]:
        optimizer, found = make(**settings), []
        for iteration in range(first, 4):
            optimizer.begin_rollout(iteration, 4)
            for _ in range(2):
                give(optimizer, 1.0)
                before = values(optimizer)
                step(optimizer)
                found.append(optimizer.learning_rate)
                if len(found) == 1:
                    # Adam's first step is as long as the rate
                    moved = (values(optimizer) - before).abs().max().item()
                    assert moved == pytest.approx(found[0], rel=1e-2)
        return found

    assert rates(0) == pytest.approx([0.1 * share for share in expected], rel=1e-3)
    assert rates(2) == rates(0)[4:]
