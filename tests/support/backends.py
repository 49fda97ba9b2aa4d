"""The backends under test and where each one runs."""

from __future__ import annotations

import os
from typing import NamedTuple

import pytest

from flowdppo_fast.backend import problem


class Backend(NamedTuple):
    """A backend's name and the device its tensors live on."""

    name: str
    device: str

    @property
    def float64(self) -> bool:
        """Whether float64 stays float64: the reference and the CPU library promise it."""
        return self.device == "cpu"


REFERENCE = Backend("reference", "cpu")
CPU = Backend("cpu", "cpu")
TRITON = Backend("triton", "cuda")
CUDA = Backend("cuda", "cuda")
GPU_BACKENDS = [
    pytest.param(TRITON, id="triton", marks=pytest.mark.gpu),
    pytest.param(CUDA, id="cuda", marks=pytest.mark.gpu),
]
BACKENDS = [pytest.param(REFERENCE, id="reference"), pytest.param(CPU, id="cpu"), *GPU_BACKENDS]


def require(backend: Backend) -> Backend:
    """``backend`` if it can run; skips with the library's own reason, or fails where the build is meant to be there."""
    reason = problem(backend.name, backend.device)
    if reason is None:
        return backend
    variable = f"FLOWDPPO_REQUIRE_{backend.name.upper()}"
    if os.environ.get(variable) == "1":
        pytest.fail(f"{variable}=1 and the {backend.name} backend cannot run: {reason}")
    pytest.skip(f"backend {backend.name!r} cannot run: {reason}")
