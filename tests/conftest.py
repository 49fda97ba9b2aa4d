"""What every test gets: poisoned memory, its own seeds, the backends that can run here, and loud GPU skips."""

from __future__ import annotations

import os
import random
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from support import gpu_report
from support.backends import BACKENDS, GPU_BACKENDS, Backend, require

# cuBLAS is only deterministic with a fixed workspace; has to be set before the first CUDA call
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# threads cost more than they bring on tensors this small; thread-count invariance has its own tests
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fresh memory is NaN: an element that a kernel forgets to write cannot look like a result."""
    fill = torch.utils.deterministic.fill_uninitialized_memory
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
    torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.fixture(autouse=True)
def seeds(request):
    """Each test draws from seeds made of its own name, whatever ran before it."""
    seed = zlib.crc32(request.node.nodeid.encode())
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@pytest.fixture(params=BACKENDS)
def backend(request) -> Backend:
    """Each backend on the device it serves."""
    return require(request.param)


@pytest.fixture(params=GPU_BACKENDS)
def gpu_backend(request) -> Backend:
    """Each backend of the GPU."""
    return require(request.param)


def pytest_configure(config):
    # workers of pytest-xdist tell the process that has started them
    path = os.environ.get("FLOWDPPO_GPU_TESTS_REPORT")
    if path and not hasattr(config, "workerinput"):
        backends = tuple(name for name in gpu_report.BACKENDS if tests_of() in (None, name))
        config.pluginmanager.register(gpu_report.GpuReport(Path(path), "not slow" in config.getoption("-m"), backends))


def tests_of() -> str | None:
    """The backend whose tests alone are wanted, ``"others"`` for those of none, None for all."""
    return os.environ.get("FLOWDPPO_GPU_TESTS_OF")


def pytest_collection_modifyitems(config, items):
    if wanted := tests_of():
        kept = [item for item in items if (gpu_report.backend_of(item.nodeid) or "others") == wanted]
        config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
        items[:] = kept
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device and torch.cuda.is_available() is False")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


def pytest_terminal_summary(terminalreporter):
    skipped = [report for report in terminalreporter.stats.get("skipped", []) if "gpu" in report.keywords]
    if skipped and not torch.cuda.is_available():
        count = len(skipped)
        terminalreporter.write_line(f"{count} GPU tests NOT RUN: no CUDA device on this machine", yellow=True)
