"""Group-relative advantages against numpy, several rewards, and the reward protocol."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from flowdppo_fast.trainer.advantages import RewardHistory, advantages_of, group_advantages, weighted_reward
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
        (["a", 1.0], TypeError, "got list for 'reward'"),
        ({"a": 1.0}, TypeError, "got float for 'a'"),
        (torch.zeros(2, 1), ValueError, r"got shape \[2, 1\] for 'reward', expected \[2\]"),
        ({}, ValueError, "got no rewards"),
    ],
)
def test_rewards_that_break_the_protocol(result, error, message):
    with pytest.raises(error, match=message):
        score(lambda *_: result, None, ["x", "y"], [{}, {}], torch.device("cpu"))


def test_past_rewards_join_their_prompts_statistics():
    rewards = torch.tensor([1.0, 3.0, 5.0, 5.0])
    nan = float("nan")
    past = torch.tensor([[nan, 8.0], [nan, nan]])
    pool = torch.tensor([1.0, 3.0, 8.0])
    expected = (rewards[:2] - pool.mean()) / (pool.std(correction=0) + 1e-4)
    result = group_advantages(rewards, 2, past=past)
    torch.testing.assert_close(result[:2], expected, rtol=1e-6, atol=0)
    # a group without past is what it is without history
    assert torch.equal(result[2:], torch.zeros(2))
    none = torch.full((2, 3), nan)
    torch.testing.assert_close(group_advantages(rewards, 2, past=none), group_advantages(rewards, 2), rtol=1e-6, atol=0)


def test_equal_rewards_count_against_a_different_past():
    rewards = torch.tensor([5.0, 5.0])
    assert (group_advantages(rewards, 2, past=torch.tensor([[1.0, 1.0]])) > 0.9).all()
    assert torch.equal(group_advantages(rewards, 2, past=torch.tensor([[5.0, 5.0]])), torch.zeros(2))


def test_history_keeps_the_last_rewards_of_each_prompt():
    history = RewardHistory(3, 3)
    for rewards, groups in (([1, 2, 3, 4], [2, 0]), ([5, 6, 7, 8], [2, 2])):
        named = {"a": torch.tensor(rewards, dtype=torch.float32)}
        past = history.past(named, groups)["a"]
        history.add(named, groups)
    assert past.nan_to_num(-1).tolist() == [[-1, 1, 2], [-1, 1, 2]]
    assert history.tables["a"].nan_to_num(-1).tolist() == [[-1, 3, 4], [-1, -1, -1], [6, 7, 8]]
    assert RewardHistory(3, None).past(named, groups) is None


@pytest.mark.parametrize("per_reward", [False, True])
def test_history_of_several_rewards(per_reward):
    rewards = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([30.0, 10.0])}
    past = {"a": torch.tensor([[4.0]]), "b": torch.tensor([[20.0]])}
    result = advantages_of(rewards, 2, weights={"b": 0.1}, per_reward=per_reward, past=past)

    def normalised(values: list[float]) -> torch.Tensor:
        pool = torch.tensor(values, dtype=torch.float32)
        return ((pool - pool.mean()) / (pool.std(correction=0) + 1e-4))[:2]

    if per_reward:
        expected = normalised([1, 2, 4]) + 0.1 * normalised([30, 10, 20])
    else:
        expected = normalised([4, 3, 6])
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("std", ["group", "global", "none"])
def test_abstentions_have_no_advantage_and_no_part_in_baselines(std):
    nan = float("nan")
    rewards = torch.tensor([1.0, nan, 2.0, 6.0, nan, 5.0, nan, 5.0])
    kept = torch.tensor([[0, 2, 3], [5, 7, 7]])
    result = group_advantages(rewards, 4, std=std)
    assert result[[1, 4, 6]].tolist() == [0, 0, 0]
    assert result[[5, 7]].tolist() == [0, 0], "what is left of the group is all equal"
    expected = rewards[kept[0]] - 3.0
    if std == "group":
        expected = expected / (rewards[kept[0]].std(correction=0) + 1e-4)
    elif std == "global":
        expected = expected / (rewards[[0, 2, 3, 5, 7]].std(correction=0) + 1e-4)
    torch.testing.assert_close(result[[0, 2, 3]], expected)
    assert torch.equal(group_advantages(torch.full((4,), nan), 4, std=std), torch.zeros(4))


def test_a_sum_abstains_with_any_reward_that_weighs_and_each_reward_for_itself():
    nan = float("nan")
    rewards = {"a": torch.tensor([1.0, nan, 3.0, 8.0]), "b": torch.tensor([1.0, 2.0, 0.0, nan])}
    assert weighted_reward(rewards, {"b": 0.0}).isnan().tolist() == [False, True, False, False]
    assert weighted_reward(rewards, {}).isnan().tolist() == [False, True, False, True]
    each = advantages_of(rewards, 4, weights={}, per_reward=True)
    torch.testing.assert_close(each, group_advantages(rewards["a"], 4) + group_advantages(rewards["b"], 4))
    assert each[3] == group_advantages(rewards["a"], 4)[3], "the other reward still counts"
