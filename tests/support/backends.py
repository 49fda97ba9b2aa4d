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
        return self.name != "triton"


REFERENCE = Backend("reference", "cpu")
CPU = Backend("cpu", "cpu")
TRITON = Backend("triton", "cuda")
BACKENDS = [
    pytest.param(REFERENCE, id="reference"),
    pytest.param(CPU, id="cpu"),
    pytest.param(TRITON, id="triton", marks=pytest.mark.gpu),
]


def require(backend: Backend) -> Backend:
    """``backend`` if it can run; skips with the library's own reason, or fails where the build is meant to be there."""
    reason = problem(backend.name, backend.device)
    if reason is None:
        return backend
    if backend == CPU and os.environ.get("FLOWDPPO_REQUIRE_CPU") == "1":
        pytest.fail(f"FLOWDPPO_REQUIRE_CPU=1 and the cpu backend cannot run: {reason}")
    pytest.skip(f"backend {backend.name!r} cannot run: {reason}")
