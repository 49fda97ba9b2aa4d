"""``pytest -p ptx.plugin``: tests of kernels and of the public API run Triton's kernels as compiled, on the emulator.

Needs the folder of tests on ``PYTHONPATH``. Each test gets, by its name, an architecture (``FLOWDPPO_PTX_ARCH`` fixes
it), errors of approximations, contraction or none, an order of blocks and how many run at a time; races fail it.
``FLOWDPPO_PTX_TALLY`` names a file for what ran.
"""

from __future__ import annotations

import json
import os
import platform
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import support.backends
import torch
import triton

from ptx.numbers import Approximation
from ptx.triton_driver import install

ARCHITECTURES = (80, 90, 100)
_fixed = os.environ.get("FLOWDPPO_PTX_ARCH")
_outcomes: Counter[str] = Counter()
_wrong: list[str] = []
EMULATOR = install(int(_fixed or 90))


class EmulatedTriton(support.backends.Backend):
    """Triton with tensors of the CPU, which promises what it promises on a GPU."""

    float64 = False


support.backends.BACKENDS[:] = [pytest.param(EmulatedTriton("triton", "cpu"), id="triton")]


def pytest_generate_tests(metafunc):
    # what single functions promise holds however wrong an approximation is
    if metafunc.module.__name__ == "test_triton_device_functions":
        metafunc.fixturenames.append("approximation")
        metafunc.parametrize("approximation", list(Approximation), ids=lambda one: one.value)


@pytest.fixture(autouse=True)
def emulated_gpu(request):
    """One GPU per test."""
    draw = np.random.default_rng(zlib.crc32(request.node.nodeid.encode()))
    settings = EMULATOR.settings
    settings.arch = int(_fixed or draw.choice(ARCHITECTURES))
    settings.contraction = bool(draw.integers(2))
    settings.approximation = list(Approximation)[draw.integers(4)]
    settings.order = draw if draw.integers(2) else None
    settings.resident = int(draw.integers(1, 5)) if draw.integers(4) == 0 else None
    settings.races, settings.edit = True, None
    if "approximation" in request.fixturenames:
        settings.approximation = request.getfixturevalue("approximation")
    EMULATOR.races.clear()
    yield EMULATOR
    assert not EMULATOR.races


def pytest_runtest_logreport(report):
    # a test counts once: as it ran, or as what kept it from that or came after it
    if report.when == "call" or report.outcome != "passed":
        _outcomes[report.outcome if report.when == "call" or report.skipped else "error"] += 1
    if report.failed:
        _wrong.append(report.nodeid)


def pytest_sessionfinish(session):
    launches = Counter(launched.kernel for launched in EMULATOR.log)
    tally = {
        "outcomes": dict(_outcomes),
        "wrong": _wrong,
        "launches": dict(launches),
        "architectures": dict(Counter(str(launched.arch) for launched in EMULATOR.log)),
        "seconds_emulated": round(sum(launched.seconds for launched in EMULATOR.log), 1),
        "triton": triton.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    if path := os.environ.get("FLOWDPPO_PTX_TALLY"):
        Path(path).write_text(json.dumps(tally, indent=1) + "\n")
    print(f"\nemulated: {launches.total()} launches, {tally['seconds_emulated']} s")
