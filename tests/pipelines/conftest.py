"""All cases recorded once for the whole folder."""

from __future__ import annotations

import pytest
import torch

from .cases import CASES, Recording, record


@pytest.fixture(autouse=True)
def ordinary_memory(poisoned_memory):
    """Whole models allocate uninitialised memory for good reasons; the kernels' own tests poison it."""
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def recorded():
    """``recorded(name)`` is the recording of a case; weights must be left as they are."""
    kept: dict[str, Recording] = {}

    def get(name: str) -> Recording:
        if name not in kept:
            kept[name] = record(CASES[name])
        return kept[name]

    return get
