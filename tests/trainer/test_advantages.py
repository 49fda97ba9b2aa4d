"""Group-relative advantages against numpy, several rewards, and the reward protocol."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from flowdppo_fast.trainer import group_advantages
from flowdppo_fast.trainer.advantages import advantages_of
from flowdppo_fast.trainer.rewards import score

GROUP = 12


@pytest.fixture
def rewards() -> torch.Tensor:
    values = torch.randn(6 * GROUP) * 3 + 1
    # all equal, to a number whose mean over a dozen is not quite itself in float32
    values[GROUP : 2 * GROUP] = 0.7
    assert values[GROUP : 2 * GROUP].mean() != values[GROUP]
    return values


@pytest.mark.parametrize("std", ["group", "global", "none"])
def test_against_numpy(rewards, std):
    values = rewards.double().numpy().reshape(-1, GROUP)
    expected = values - values.mean(1, keepdims=True)
    if std == "group":
        expected = expected / (values.std(1, keepdims=True) + 1e-4)
    elif std == "global":
        expected = expected / (values.std() + 1e-4)
    actual = group_advantages(rewards, GROUP, std=std)
    # differences of numbers up to 10 keep an absolute error of 10 eps, over a std of at least 0.1
    np.testing.assert_allclose(actual.numpy(), expected.reshape(-1), rtol=1e-5, atol=100 * 1.2e-7)
    assert torch.equal(actual[GROUP : 2 * GROUP], torch.zeros(GROUP))


def test_several_rewards(rewards):
    named = {"a": rewards, "b": rewards.flip(0) ** 2}
    weights = {"b": 0.5}
    total = advantages_of(named, GROUP, weights=weights)
    torch.testing.assert_close(total, group_advantages(named["a"] + 0.5 * named["b"], GROUP))
    each = advantages_of(named, GROUP, weights=weights, per_reward=True)
    torch.testing.assert_close(each, group_advantages(named["a"], GROUP) + 0.5 * group_advantages(named["b"], GROUP))


def test_refused():
    with pytest.raises(ValueError, match="expected names of rewards"):
        advantages_of({"a": torch.zeros(4)}, 4, weights={"c": 1.0})
    with pytest.raises(ValueError, match=r"got shape \[6\], expected \[groups \* 4\]"):
        group_advantages(torch.zeros(6), 4)
    with pytest.raises(ValueError, match="std: got 'batch'"):
        group_advantages(torch.zeros(4), 4, std="batch")


@pytest.mark.parametrize(
    ("result", "error", "message"),
    [
        ([0.0, 1.0], TypeError, "got list for 'reward'"),
        ({"a": 1.0}, TypeError, "got float for 'a'"),
        (torch.zeros(2, 1), ValueError, r"got shape \[2, 1\] for 'reward', expected \[2\]"),
        ({}, ValueError, "got no rewards"),
    ],
)
def test_rewards_that_break_the_protocol(result, error, message):
    with pytest.raises(error, match=message):
        score(lambda *_: result, None, ["x", "y"], [{}, {}], torch.device("cpu"))
