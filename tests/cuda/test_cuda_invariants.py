"""The invariants of every backend (``tests/fuzz``) on the CUDA kernels, run by the host layer."""

from __future__ import annotations

import pytest
from fuzz.invariants import INVARIANTS, hold


@pytest.mark.parametrize("name", INVARIANTS)
def test_it_holds(api, name):
    # "reference" is the kernels here
    hold(name, "reference", 12)
    assert api.launches > 0
