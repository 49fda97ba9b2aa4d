"""A run of the tests ends, red and with a name, whatever a test does: die, hang in Python, or hang in C."""

from __future__ import annotations

import os
import re
import subprocess
import sys

from test_structure import ROOT

OTHERS = """
import time, pytest
# minutes of another worker's, which must not be waited for
@pytest.mark.parametrize("n", range(600))
def test_slow(n): time.sleep(0.5)
"""
DEATHS = {
    "crash": "ctypes.string_at(0)",
    # in C with the interpreter's lock held, again after every signal
    "hang": "while True: ctypes.PyDLL(None).pause()",
}


def test_a_worker_that_dies_ends_the_run_with_the_tests_name(tmp_path):
    (flags,) = re.findall(r"^PYTEST_FLAGS := (.*)$", (ROOT / "Makefile").read_text(), re.M)
    assert "faulthandler_timeout=330 " in flags
    flags = flags.replace("faulthandler_timeout=330", "faulthandler_timeout=1").split()
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *flags]
    runs = {}
    for name, statement in DEATHS.items():
        folder = tmp_path / name
        folder.mkdir()
        (folder / "conftest.py").write_text("from support.limits import pytest_handlecrashitem\n")
        (folder / "test_others.py").write_text(OTHERS)
        (folder / "test_death.py").write_text(
            f"import ctypes\ndef test_it():\n    {statement}\ndef test_never(): pass\n"
        )
        runs[name] = subprocess.Popen(
            [*command, str(folder)], env={**os.environ, "PYTHONPATH": str(ROOT / "tests")}, cwd=folder,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
    for name, run in runs.items():
        said, _ = run.communicate(timeout=120)
        assert run.returncode == 1, said
        assert "test_death.py::test_it ended its process" in said, name
        assert "in test_it\n" in said, "the stack says where"
