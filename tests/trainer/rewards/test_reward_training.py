"""Rewards in a training run: by name, and from a server that dies, lies or hangs."""

from __future__ import annotations

import itertools
import time

import pytest
import torch
from digits_example import PROMPTS, ink

from flowdppo_fast.trainer import FlowDPPOTrainer, checkpoint
from flowdppo_fast.trainer.rewards import HTTPReward, RewardServerError, build_rewards
from flowdppo_fast.trainer.rewards.serve import RewardServer

ITERATIONS = 3


def weights_of(trainer) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in trainer.pipeline.transformer.parameters()]


class Flaky:
    """``ink``, but what the ``fails``-th call gives is up to ``failure``."""

    def __init__(self, failure, fails: int):
        self.failure, self.fails, self.calls = failure, fails, itertools.count(1)

    def __call__(self, images, prompts, metadata):
        values = ink(images, prompts, metadata)
        return self.failure(values) if next(self.calls) == self.fails else values


def dies(values):
    raise MemoryError("killed")


def gives_nan(values):
    return values * float("nan")


def gives_too_few(values):
    return values[1:]


def hangs(values):
    # longer than the client waits
    time.sleep(1.8)
    return values


@pytest.mark.bits(across="process")
@pytest.mark.parametrize("failure", [dies, gives_nan, gives_too_few, hangs])
def test_a_failing_server_stops_the_run_and_a_resume_ends_where_it_would_have(pipes, small_config, tmp_path, failure):
    def make(folder, url):
        config = small_config(run={"iterations": ITERATIONS, "output_dir": str(tmp_path / folder)})
        reward = HTTPReward(url, format="npy", timeout=1.5, deadline=30, retries=0)
        return FlowDPPOTrainer(pipes.digits(), reward, PROMPTS, config)

    with RewardServer(ink) as server:
        whole = make("whole", server.url)
        history = whole.train()
    with RewardServer(Flaky(failure, fails=ITERATIONS)) as server:
        broken = make("broken", server.url)
        with pytest.raises(RewardServerError):
            broken.train()
    saved = checkpoint.checkpoints(tmp_path / "broken" / "checkpoints")
    assert saved[-1].name == f"iteration-{ITERATIONS - 1:06d}"
    with RewardServer(ink) as server:
        resumed = make("broken", server.url)
        again = resumed.train(resume=True)
    assert [metrics["reward"] for metrics in again] == [metrics["reward"] for metrics in history]
    assert all(torch.equal(a, b) for a, b in zip(weights_of(resumed), weights_of(whole)))


def test_rewards_by_name_and_their_weights(pipes, small_config):
    reward, weights = build_rewards([{"name": "jpeg", "weight": 2}, {"callable": "digits_example:ink", "weight": 0.5}])
    config = small_config(advantage={"reward_weights": weights}, run={"iterations": 1})
    (metrics,) = FlowDPPOTrainer(pipes.digits(), reward, PROMPTS, config).train()
    total = 2 * metrics["reward/jpeg"] + 0.5 * metrics["reward/ink"]
    assert metrics["reward"] == pytest.approx(total, rel=1e-5)
    assert metrics["reward/jpeg"] < 0
