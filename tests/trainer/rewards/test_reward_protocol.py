"""What a reward may return, and how what it may not is reported."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from flowdppo_fast.trainer.rewards import Reward, build_rewards, move_reward, score

CPU = torch.device("cpu")


def scored(result, count=3):
    return score(lambda *_: result, None, [f"prompt {n}" for n in range(count)], [{}] * count, CPU)


def test_one_tensor_or_several_become_float32_by_name():
    assert scored(torch.tensor([1, 2, 3])) == {"reward": pytest.approx([1.0, 2.0, 3.0])}
    named = scored({"a": torch.tensor([True, False, True]), "b": torch.tensor([1.0, 2.0, 3.0]).double()})
    assert list(named) == ["a", "b"]
    assert all(value.dtype == torch.float32 for value in named.values())
    assert named["a"].tolist() == [1.0, 0.0, 1.0]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e39])
def test_a_number_that_is_not_finite_names_reward_sample_and_prompt(value):
    # 1e39 is finite in float64 alone
    wrong = {"fine": torch.zeros(3), "clip": torch.tensor([0.0, 1.0, value], dtype=torch.float64)}
    with pytest.raises(ValueError, match=r"got (nan|inf) for 'clip' of sample 2 out of 3 \(prompt 'prompt 2'\)"):
        scored(wrong)


def test_several_bad_samples_are_counted_and_long_prompts_cut():
    values = torch.full((4,), float("nan"))
    values[0] = 0
    with pytest.raises(ValueError, match=r"of sample 1 and 2 others out of 4 \(prompt 'x{76}\.\.\.\)"):
        score(lambda *_: values, None, ["x" * 200] * 4, [{}] * 4, CPU)


@pytest.mark.parametrize("make", [list, tuple, np.array, torch.tensor])
def test_lists_and_arrays_are_taken(make):
    assert scored(make([1.0, 2.0, 3.0]))["reward"].tolist() == [1.0, 2.0, 3.0]
    with pytest.raises(TypeError, match="expected one number per image in a tensor, an array or a list"):
        scored(["a", "b", "c"])


def test_none_is_an_abstention_and_nan_only_where_the_reward_says_so():
    assert scored({"a": [1.0, None, 3.0], "b": torch.ones(3)})["a"].isnan().tolist() == [False, True, False]
    with pytest.raises(ValueError, match=r"got nan for 'reward' of sample 0 out of 3"):
        scored([float("nan"), None, 3.0])

    class Judge:
        def __init__(self, may_abstain, *values):
            self.may_abstain, self.values = may_abstain, values

        def __call__(self, images, prompts, metadata):
            return {name: torch.tensor([value, 1.0]) for name, value in zip("ab", self.values)}

    def judge(*arguments):
        return score(Judge(*arguments), None, ["", ""], [{}, {}], CPU)

    assert judge(True, float("nan"), 0.0)["a"].isnan().tolist() == [True, False]
    assert judge(["a"], float("nan"), 0.0)["a"].isnan().tolist() == [True, False]
    for arguments in ((["b"], float("nan"), 0.0), (True, float("inf"), 0.0), (["a"], 0.0, float("nan"))):
        with pytest.raises(ValueError, match="expected finite numbers"):
            judge(*arguments)


def test_a_combination_allows_what_its_rewards_allow():
    class Judge:
        may_abstain = True

        def __call__(self, images, prompts, metadata):
            return torch.tensor([float("nan"), 1.0])

    class Two(Judge):
        may_abstain = ("x",)

        def __call__(self, images, prompts, metadata):
            return {"x": torch.tensor([float("nan"), 1.0]), "y": torch.ones(2)}

    own = {"callable": f"{__name__}:placeholder"}
    settings = [{**own, "label": "plain"}, {**own, "label": "own"}, {**own, "label": "two", "weight": {"x": 1, "y": 1}}]
    combined, _ = build_rewards(settings)
    combined = type(combined)(
        [replace(term, reward=reward) for term, reward in zip(combined._terms, (placeholder, Judge(), Two()))]
    )
    assert combined.may_abstain == {"own", "two/x"}
    named = score(combined, None, ["", ""], [{}, {}], CPU)
    assert named["own"].isnan().tolist() == named["two/x"].isnan().tolist() == [True, False]
    broken = type(combined)([replace(combined._terms[0], reward=lambda *_: torch.tensor([float("nan"), 1.0]))])
    with pytest.raises(ValueError, match="got nan for 'plain'"):
        score(broken, None, ["", ""], [{}, {}], CPU)


def placeholder(images, prompts, metadata):
    return torch.zeros(len(prompts))


def test_complex_numbers_are_no_rewards():
    with pytest.raises(TypeError, match=r"got a torch.complex64 tensor for 'reward'"):
        scored(torch.zeros(3, dtype=torch.complex64))


def test_rewards_run_without_gradients():
    weight = torch.ones(3, requires_grad=True)
    seen = []

    def reward(images, prompts, metadata):
        seen.append(torch.is_grad_enabled())
        return weight * 2

    assert not score(reward, None, ["a", "b", "c"], [{}] * 3, CPU)["reward"].requires_grad
    assert seen == [False]


def test_moving_goes_to_rewards_that_can_be_moved():
    class Movable:
        place = None

        def to(self, device):
            self.place = device

    movable = Movable()
    move_reward(movable, "meta")
    assert movable.place == "meta"
    move_reward(lambda *_: torch.zeros(1), "meta")


def test_old_import_path():
    from flowdppo_fast.trainer import Reward as exported

    assert exported is Reward
