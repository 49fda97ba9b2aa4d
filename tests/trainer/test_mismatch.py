"""Rollout against training at unchanged weights: what is told of it, and what stops a run."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from digits_example import PROMPTS, ink

from flowdppo_fast import DPPO, GRPOGuard, RatioClip, Unclipped
from flowdppo_fast.objectives import OwnRule
from flowdppo_fast.rules import dppo
from flowdppo_fast.trainer import FlowDPPOConfig, FlowDPPOTrainer
from flowdppo_fast.trainer.mismatch import kl_bound

THRESHOLD = 2e-5


class Apart(FlowDPPOTrainer):
    """A trainer whose rollout ran on other kernels: recorded velocities are off by up to ``shift`` of themselves."""

    shift = 0.0

    def _verify(self, rollout):
        super()._verify(rollout)
        for trajectory in rollout.trajectories:
            size = torch.linspace(0, 1, len(trajectory)).view(-1, *[1] * (trajectory.velocity.dim() - 1))
            trajectory.velocity = trajectory.velocity * (1 + self.shift * size)


@pytest.fixture
def apart(pipes, small_config):
    def make(shift: float, **run) -> Apart:
        config = small_config(objective={"threshold": THRESHOLD}, run={"iterations": 1, **run})
        trainer = Apart(pipes.digits(), ink, PROMPTS, config)
        trainer.shift = shift
        return trainer

    return make


def exact(trainer: Apart) -> torch.Tensor:
    """Mean-reduced KL of the first update's rows: ``(k*(new-old))**2/2`` with the velocities before the shift."""
    rollout = trainer.sample(0)
    rows = []
    for trajectory, local, _ in rollout.locate(trainer.updates[0]):
        size = torch.linspace(0, 1, len(trajectory)).view(-1, *[1] * (trajectory.velocity.dim() - 1))
        scale = trajectory.sde_step.kl_scale.double().view(1, -1, *[1] * (trajectory.velocity.dim() - 2))
        u = scale * trajectory.velocity.double() * trainer.shift * size
        rows.append(u.square().flatten(2).mean(2)[list(local)] / 2)
    return torch.cat(rows).flatten()


def test_the_mismatch_of_the_first_update_is_its_exact_kl(apart):
    trainer = apart(0.05)
    kl = exact(trainer)
    (metrics,) = trainer.train()
    assert metrics["mismatch_kl_mean"] == pytest.approx(kl.mean().item(), rel=1e-3)
    assert metrics["mismatch_kl_max"] == pytest.approx(kl.max().item(), rel=1e-3)
    near, far = ((kl >= bound).double().mean().item() for bound in (THRESHOLD / 10, THRESHOLD))
    # some rows on each side, or the numbers would say nothing
    assert 0 < far < near < 1
    assert metrics["mismatch_near_fraction"] == pytest.approx(near, abs=1e-6)
    assert metrics["mismatch_far_fraction"] == pytest.approx(far, abs=1e-6)


@pytest.mark.parametrize("shift", [0.0, 0.05])
def test_a_mismatch_near_the_bound_is_told_once(apart, caplog, shift):
    trainer = apart(shift)
    with caplog.at_level(logging.WARNING):
        trainer.train()
        trainer._gate.warn({"mismatch_near_fraction": shift, "mismatch_kl_max": 1.0})
    told = [record.getMessage() for record in caplog.records if "at unchanged weights" in record.getMessage()]
    assert len(told) == (shift > 0)
    assert all("DPPO(threshold=2e-05" in text and "%" in text for text in told)


def test_a_run_that_is_asked_to_stop_does_so_before_its_weights_move(apart):
    trainer = apart(0.05, stop_on_mismatch=True)
    before = [p.clone() for p in trainer.weights.parameters]
    with pytest.raises(RuntimeError, match=r"rows have a KL of up to \S+ per element, expected less than the bound"):
        trainer.train()
    assert all(map(torch.equal, trainer.weights.parameters, before))


def test_a_run_that_is_asked_to_stop_goes_on_where_both_agree(pipes, small_config):
    config = small_config(objective={"threshold": THRESHOLD}, run={"iterations": 1, "stop_on_mismatch": True})
    (metrics,) = FlowDPPOTrainer(pipes.digits(), ink, PROMPTS, config).train()
    assert metrics["mismatch_far_fraction"] == metrics["mismatch_near_fraction"] == 0
    assert metrics["mismatch_kl_max"] < THRESHOLD / 100


@pytest.mark.parametrize(
    ("objective", "bound"),
    [
        (DPPO(1e-5), 1e-5),
        (RatioClip(1e-4, 2e-4), 1e-8 * 512 / 2),
        (OwnRule(dppo, threshold=2e-5), 2e-5),
        (OwnRule(dppo), None),
        (DPPO(1e-5, trust_region="mean_drift"), None),
        (GRPOGuard(), None),
        (Unclipped(), None),
    ],
)
def test_the_kl_at_which_an_objective_begins_to_act(objective, bound):
    assert kl_bound(objective, 512) == (None if bound is None else pytest.approx(bound))


def test_without_a_bound_on_the_kl_shares_are_not_told(pipes, small_config):
    config = small_config(objective={"name": "unclipped"}, run={"iterations": 1})
    (metrics,) = FlowDPPOTrainer(pipes.digits(), ink, PROMPTS, config).train()
    assert math.isnan(metrics["mismatch_far_fraction"])
    assert metrics["mismatch_kl_max"] >= 0


@pytest.mark.parametrize("name", ["dppo", "dppo_symmetric", "ratio_clip", "grpo_guard"])
def test_a_run_in_which_no_bound_can_act_is_refused(name):
    sections = {"objective": {"name": name}, "optimizer": {"updates_per_rollout": 1}}
    message = f"optimizer.updates_per_rollout: got 1, expected 2 or more, .* so {name} bounds nothing"
    with pytest.raises(ValueError, match=message):
        FlowDPPOConfig.from_dict(sections)
    FlowDPPOConfig.from_dict({**sections, "objective": {"name": name, "allow_idle": True}})
    FlowDPPOConfig.from_dict({**sections, "optimizer": {"updates_per_rollout": 1, "inner_epochs": 2}})
    FlowDPPOConfig.from_dict({**sections, "objective": {"name": "unclipped"}})
