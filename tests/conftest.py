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
from support import learning as learning_support
from support.backends import BACKENDS, GPU_BACKENDS, Backend, require
from support.bits import ACROSS
from support.limits import pytest_handlecrashitem  # noqa: F401

# cuBLAS is only deterministic with a fixed workspace; has to be set before the first CUDA call
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# read when huggingface_hub is imported: a name that is nowhere is an error at once, without five questions to the hub
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# threads cost more than they bring on tensors this small; thread-count invariance has its own tests
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


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


@pytest.fixture
def learning(request, monkeypatch) -> learning_support.Learning:
    """The run's seed, which a trainer that is made in this test takes, and the check of what was gained."""
    from flowdppo_fast.trainer import FlowDPPOTrainer

    seed, make = getattr(request, "param", 0), FlowDPPOTrainer.__init__

    def seeded(trainer, pipeline, reward, prompts, config, *args, **kwargs):
        config.run.seed = seed
        make(trainer, pipeline, reward, prompts, config, *args, **kwargs)

    monkeypatch.setattr(FlowDPPOTrainer, "__init__", seeded)
    request.node.user_properties.append(("seed", seed))
    return learning_support.Learning(seed, request.node.user_properties)


def pytest_generate_tests(metafunc):
    if "learning" in metafunc.fixturenames and learning_support.SEEDS > 1:
        seeds = range(learning_support.SEEDS)
        metafunc.parametrize("learning", seeds, indirect=True, ids=[f"seed{seed}" for seed in seeds])


# before pytest chooses by markers
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    for item in items:
        if "learning" in getattr(item, "fixturenames", ()):
            item.add_marker("learns")
        for mark in item.iter_markers("bits"):
            if mark.args or mark.kwargs.keys() != {"across"} or mark.kwargs["across"] not in ACROSS:
                raise pytest.UsageError(f"{item.nodeid}: got {mark}, expected bits(across=...) of {', '.join(ACROSS)}")
    if wanted := tests_of():
        kept = [item for item in items if (gpu_report.backend_of(item.nodeid) or "others") == wanted]
        config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
        items[:] = kept
    # files with slow tests first: none is left to run alone at the end
    slow = {item.path for item in items if "slow" in item.keywords}
    items.sort(key=lambda item: item.path not in slow)
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
    if learning_support.SEEDS > 1:
        ended = [report for found in terminalreporter.stats.values() for report in found]
        ended = [report for report in ended if getattr(report, "when", None) == "call"]
        for line in learning_support.lines(learning_support.gains(ended)):
            terminalreporter.write_line(line)
