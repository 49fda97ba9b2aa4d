"""What a reward may return, and how what it may not is reported."""

from __future__ import annotations

import pytest
import torch

from flowdppo_fast.trainer.rewards import Reward, move_reward, score

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
