"""Which steps a rollout trains on."""

from __future__ import annotations

import pytest

from flowdppo_fast.trainer import FlowDPPOConfig
from flowdppo_fast.trainer.row_plan import choose_steps


def windows(choice: str, count: int = 2) -> list[tuple[int, ...]]:
    return [choose_steps((1, 3, 4, 6), count, choice, position=place, seed=place) for place in range(40)]


def test_all_candidates_without_a_count():
    assert choose_steps((1, 3, 4), None, "random", position=5, seed=9) == (1, 3, 4)


def test_a_window_moves_by_one_and_starts_again():
    assert windows("window")[:5] == [(1, 3), (3, 4), (4, 6), (1, 3), (3, 4)]
    assert windows("window", 4)[:2] == [(1, 3, 4, 6)] * 2


def test_random_windows_are_neighbours_and_reach_every_place():
    assert set(windows("random_window")) == {(1, 3), (3, 4), (4, 6)}


def test_random_steps_are_any_in_schedule_order():
    found = windows("random")
    assert all(first < second for first, second in found)
    assert len(set(found)) == 6


def test_unknown_choice():
    with pytest.raises(ValueError, match="step_choice: got 'all'"):
        choose_steps((0, 1), 1, "all", position=0, seed=0)


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        ({"num_steps": 10}, (0, 1, 2, 3, 4)),
        ({"num_steps": 10, "sde_fraction": 0.6}, (0, 1, 2, 3, 4, 5)),
        ({"num_steps": 10, "sde_fraction": 1.0}, tuple(range(9))),
        ({"num_steps": 10, "sde_fraction": 0.01}, (0,)),
        ({"num_steps": 10, "sde_steps": [4, 2]}, (2, 4)),
    ],
)
def test_candidates(sampling, expected):
    assert FlowDPPOConfig.from_dict({"sampling": sampling}).sampling.candidate_steps == expected
