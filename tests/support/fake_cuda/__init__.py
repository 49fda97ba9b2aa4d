"""Torch with a CUDA device that is not there, in a process of its own: a model's dtypes and work by CUDA's autocast."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
COMPILER = shlex.split(os.environ.get("CXX", "c++"))


def compile_guard(folder: Path) -> Path:
    """Builds the library that has to be loaded before torch."""
    import torch

    library = folder / "libguard.so"
    include, lib = (Path(torch.__file__).parent / name for name in ("include", "lib"))
    linked = [f"-L{lib}", f"-Wl,-rpath,{lib}", "-ltorch_cpu", "-lc10"]
    built = ["-shared", "-fPIC", "-std=c++20", f"-I{include}", str(HERE / "guard.cpp"), "-o", str(library)]
    command = [*COMPILER, *built, *linked]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return library


def observe(folder: Path) -> dict[str, Any]:
    """What :mod:`.observed` prints, from a process of its own."""
    command = [sys.executable, "-m", "support.fake_cuda.observed", str(compile_guard(folder))]
    path = os.pathsep.join([str(HERE.parents[1]), *sys.path])
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])
