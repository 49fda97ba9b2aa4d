"""The example scripts are imported as they import each other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(autouse=True)
def ordinary_memory(poisoned_memory):
    """Whole models allocate uninitialised memory for good reasons; the kernels' own tests poison it."""
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def example_modules(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
