"""First light and replay say what went wrong, and end there; that they work is seen in the dry run of bench/gpu.sh."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from bench_support import ROOT

from bench import first_light


@pytest.fixture
def checked(monkeypatch):
    """Stands in for the checks: what was asked of which backend; one that is named raises."""
    asked = []

    def install(wrong=None):
        def checks(backend, device):
            def check(what):
                asked.append((backend, what))
                if (backend, what) == wrong:
                    raise ValueError("loss: 3 of 8 off\nby far")

            return {what: lambda what=what: check(what) for what in ("loss", "step")}

        monkeypatch.setattr(first_light, "checks", checks)
        monkeypatch.setattr(first_light.torch.cuda, "synchronize", lambda: None)
        return asked

    return install


def test_all_that_is_asked_for_is_tried(checked, capsys):
    asked = checked()
    assert first_light.main(["triton", "cuda"]) == 0
    assert asked == [("triton", "loss"), ("triton", "step"), ("cuda", "loss"), ("cuda", "step")]
    assert "FAILED" not in capsys.readouterr().out


def test_the_first_failure_ends_it_and_is_said_in_one_line(checked, capsys):
    asked = checked(("triton", "step"))
    assert first_light.main(["triton", "cuda"]) == 1
    assert asked == [("triton", "loss"), ("triton", "step")]
    assert capsys.readouterr().out.splitlines()[-1] == "FAILED: triton: step: ValueError: loss: 3 of 8 off"


def replay(folder, library):
    command = [sys.executable, "-S", str(ROOT / "bench" / "replay.py"), str(folder)]
    env = {**os.environ, "FLOWDPPO_LIBCUDA": library}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)


def test_a_replay_without_a_driver_or_without_launches_fails(tmp_path):
    (tmp_path / "launches.json").write_text("[]")
    done = replay(tmp_path, "libm.so.6")
    assert done.returncode == 1
    assert "cuInit: the driver library has no such function" in done.stderr
    assert replay(tmp_path, "/nonexistent.so").returncode == 1
