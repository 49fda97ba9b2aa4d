"""The invariants of every backend (``tests/fuzz``) on the Triton kernels."""

from __future__ import annotations

import pytest
from fuzz.invariants import INVARIANTS, hold
from problems_for_kernels import MARKS

pytestmark = MARKS


@pytest.mark.parametrize("name", INVARIANTS)
def test_it_holds(name):
    hold(name, "triton", 4)
