"""Triton kernels against the float64 reference: compiled where there is a GPU, else in Triton's interpreter.

The interpreter has to be chosen before Triton is first imported, because Triton decorates its own library at import.
Run alone, this folder chooses it here. In a process where something else (diffusers does) came first, the tests are
left to ``test_own_process.py``, which runs this folder in a process of its own. The variable is set around the imports
and around each test here only, so that the rest of a test run does not see it.
"""

from __future__ import annotations

import importlib
import os
import sys

import pytest
import torch

# compiled for a GPU that is there or that tests/ptx emulates
INTERPRETED = not torch.cuda.is_available() and "ptx.triton_driver" not in sys.modules


def _choose_interpreter() -> bool:
    """Imports Triton and the kernels for interpretation; False if Triton has been imported without."""
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        language = importlib.import_module("triton.language")
        chosen = type(language.sum).__name__ == "InterpretedFunction"
        if chosen:
            importlib.import_module("kernels_of_device_functions")
        return chosen
    finally:
        if before is None:
            del os.environ["TRITON_INTERPRET"]
        else:
            os.environ["TRITON_INTERPRET"] = before


collect_ignore_glob = ["test_own_process.py"]
if INTERPRETED and not _choose_interpreter():
    collect_ignore_glob = ["test_triton_*.py"]


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    """Triton looks at the variable while interpreted kernels run, too."""
    if INTERPRETED:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
