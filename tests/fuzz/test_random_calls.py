"""Short form: hypothesis draws the calls, and shrinks one that is wrong."""

from __future__ import annotations

import os
from collections.abc import Sequence

import pytest
import torch
from hypothesis import HealthCheck, assume, given, note, settings
from hypothesis import strategies as st
from support import given_rows
from support.backends import CPU, REFERENCE, Backend, require
from support.compare import check_backend
from support.steps import check_statistics, check_step

from flowdppo_fast.backend import operator

from .draws import draw_call, draw_given_rows, draw_statistics, draw_step, seeded, yardstick_of

CASES = int(os.environ.get("FLOWDPPO_FUZZ_CASES", "150"))


class FromHypothesis:
    """Choices that hypothesis makes."""

    def __init__(self, data: st.DataObject):
        self.data = data

    def choice(self, options: Sequence):
        return self.data.draw(st.sampled_from(list(options)))

    def randint(self, low: int, high: int) -> int:
        return self.data.draw(st.integers(low, high))

    def uniform(self, low: float, high: float) -> float:
        return self.data.draw(st.floats(low, high))


@pytest.mark.parametrize("backend", [REFERENCE, CPU], ids=lambda backend: backend.name)
@settings(
    max_examples=CASES, deadline=None, derandomize=True, database=None,
    # fixtures of the session hold nothing that a case changes
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)  # fmt: skip
@given(data=st.data())
def test_random_calls_agree_with_the_reference(backend: Backend, data):
    require(backend)
    drawn = draw_call(FromHypothesis(data), backend.device, float64=backend.float64)
    note(str(drawn))
    yardstick, _ = yardstick_of(drawn.call)
    assume(yardstick is not None)
    check_backend(drawn.call, backend.name, yardstick)


@pytest.mark.parametrize("backend", [REFERENCE, CPU], ids=lambda backend: backend.name)
@pytest.mark.parametrize(("draw", "check"), [(draw_step, check_step), (draw_statistics, check_statistics)])
def test_random_steps_and_statistics_agree_with_the_textbook(backend: Backend, draw, check):
    require(backend)
    for seed in range(CASES // 3):
        drawn = draw(seeded(seed), backend.device, float64=backend.float64)
        try:
            check(drawn.call, backend.name)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {drawn}") from error


@pytest.mark.parametrize("backend", [REFERENCE, CPU], ids=lambda backend: backend.name)
def test_random_given_rows_agree_with_the_reference(backend: Backend):
    require(backend)
    compared = 0
    for seed in range(2 * CASES):
        call = draw_given_rows(seeded(seed), float64=backend.float64)
        if not given_rows.is_decidable(call):
            continue
        compared += 1
        try:
            given_rows.check(operator("log_prob_loss", backend.name, backend.device), call)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {call}") from error
    assert compared > CASES


@pytest.mark.parametrize("draw", [draw_call, draw_step, draw_statistics])
def test_a_seed_repeats_its_call(draw):
    first, second = (draw(seeded(11), "cpu", float64=True) for _ in range(2))
    assert str(first) == str(second)
    velocity = (lambda call: call.first) if draw is draw_call else (lambda call: call.velocity)
    assert torch.equal(velocity(first.call), velocity(second.call))
