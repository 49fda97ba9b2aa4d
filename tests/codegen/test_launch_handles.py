"""Kept launch handles are used for what they were compiled for, and calls stay few; in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("launch_handles.py")


@pytest.fixture(scope="module")
def report() -> dict:
    pytest.importorskip("triton", reason="Triton is not installed, so nothing can be launched")
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_handle_is_never_used_for_another_specialisation(report):
    """Unaligned views, other dtypes, absent tensors, strides beyond 32 bits, integers of 1 and multiples of 16,
    integers where floats are meant, memory beyond 2 GB, another device: for NVIDIA's and AMD's rules."""
    assert report["wrong"] == []
    for target in ("cuda", "hip"):
        assert report[target]["by handle"] > 1000
        assert report[target]["by name"] > 1000


def test_hooks_see_every_launch(report):
    assert report["hooked"] == {"enter": 2, "exit": 2, "pre-run hook": 1, "none": 0}


def test_kernels_take_nothing_from_their_module(report):
    """Triton compares such values at every launch, and a handle does not."""
    assert report["globals"] == {name: [] for name in report["globals"]}


def test_python_calls_of_a_loss(report):
    """What a loss on Triton costs the host, as a count: times are those of the machine."""
    assert report["calls"]["forward"] <= 56
    assert report["calls"]["forward and backward"] <= 91
