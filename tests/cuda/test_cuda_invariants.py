"""The invariants of every backend (``tests/fuzz``) on the CUDA kernels, run by the emulator."""

from __future__ import annotations

import pytest
from fuzz.invariants import INVARIANTS, hold
from kernel_checks import some


@pytest.mark.parametrize("examples", some([2], [12]))
@pytest.mark.parametrize("name", INVARIANTS)
def test_it_holds(api, name, examples):
    hold(name, "cuda", examples)
    assert api.launches > 0
