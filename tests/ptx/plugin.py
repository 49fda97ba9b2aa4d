"""``pytest -p ptx.plugin``: tests of kernels and of the public API run Triton's kernels as compiled, on the emulator.

Needs the folder of tests on ``PYTHONPATH``. Each test gets, by its name, an architecture (``FLOWDPPO_PTX_ARCH`` fixes
it), errors of approximations, contraction or none, an order of blocks and how many run at a time; races fail it.
"""

from __future__ import annotations

import os
import zlib
from collections import Counter

import numpy as np
import pytest
import support.backends

from ptx import tally
from ptx.numbers import Approximation
from ptx.triton_driver import install

ARCHITECTURES = (80, 90, 100)
_fixed = os.environ.get("FLOWDPPO_PTX_ARCH")
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


def pytest_sessionfinish(session):
    launches = Counter(launched.kernel for launched in EMULATOR.log)
    tally.FACTS["launches"] = dict(launches)
    tally.FACTS["architectures"] = dict(Counter(str(launched.arch) for launched in EMULATOR.log))
    seconds = sum(launched.seconds for launched in EMULATOR.log)
    print(f"\nemulated: {launches.total()} launches, {seconds:.0f} s")
