"""Short form: hypothesis draws the calls, and shrinks one that is wrong."""

from __future__ import annotations

import os
from collections.abc import Sequence

import pytest
from hypothesis import HealthCheck, assume, given, note, settings
from hypothesis import strategies as st
from support.backends import CPU, REFERENCE, Backend, require
from support.compare import check_backend

from .draws import decidable, draw_call, in_range, seeded

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
    call, words = draw_call(FromHypothesis(data), backend.device, float64=backend.float64)
    note(words)
    assume(in_range(call) and decidable(call))
    check_backend(call, backend.name)


def test_a_seed_repeats_its_call():
    first, second = (draw_call(seeded(11), "cpu", float64=True) for _ in range(2))
    assert first[1] == second[1]
    assert (first[0].first == second[0].first).all()
