"""The kernels as compiled, on the emulator, under the library's own binding, and the public API on top of them.

``make test`` runs what is not marked ``full``; ``FLOWDPPO_PTX=full`` (``make ptx``) runs everything.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from kernel_checks import loaded
from ptx import cuda_runtime, tally
from ptx.cuda_runtime import Cuda
from ptx.numbers import Approximation

_FULL = os.environ.get("FLOWDPPO_PTX") == "full"


def pytest_collection_modifyitems(config, items):
    if _FULL:
        return
    left = [item for item in items if "full" in item.keywords]
    items[:] = [item for item in items if "full" not in item.keywords]
    config.hook.pytest_deselected(items=left)


@pytest.fixture
def cuda(request, monkeypatch) -> Iterator[Cuda]:
    """The operators; by its name a test gets errors of approximations, an order of blocks, how many run at a time."""
    runtime = loaded()
    draw = np.random.default_rng(zlib.crc32(request.node.nodeid.encode()))
    values: dict[str, Any] = {
        "approximation": list(Approximation)[draw.integers(4)],
        "seed": int(draw.integers(1, 1000)),
        "resident": int(draw.integers(1, 5)) if draw.integers(4) == 0 else None,
        "races": True,
        "launches": 0,
    }
    if _FULL:
        values["gpus"] = dict.fromkeys(cuda_runtime.SPREAD, str(draw.choice(cuda_runtime.GPUS)))
    for name, value in values.items():
        monkeypatch.setattr(runtime, name, value)
    yield runtime
    runtime.stream()
    tally.FACTS["launches"] = dict(runtime.counts)


@pytest.fixture
def api(cuda) -> Iterator[Cuda]:
    """``cuda``, serving the public API's backend of that name."""
    with cuda_runtime.serving(cuda):
        yield cuda
