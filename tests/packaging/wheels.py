"""Sdist and wheels of a release, from the committed tree alone.

=====================  ================================================================================
wheel                  what it holds
=====================  ================================================================================
x86-64                 C++ library for a CPU, and the CUDA library where nvcc is on the path
aarch64                C++ library for a CPU, cross-compiled; NVIDIA's Grace hosts and others
pure Python            no library: Windows, macOS, and what else runs torch
=====================  ================================================================================

``FLOWDPPO_SYSROOT`` and ``FLOWDPPO_SYSROOT_AARCH64`` name folders with an older system's headers and libraries
(``usr/include``, ``usr/lib``, ``lib``). Without the first, the x86-64 wheel needs a system as new as the one that
builds it. Without the second there is no aarch64 wheel. On Debian the compiler for it is in ``g++-aarch64-linux-gnu``.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
CROSS = "aarch64-linux-gnu-g++"
# torch's own libraries stay torch's
EXCLUDED = ("libtorch*.so", "libc10*.so", "libcudart.so*")
OFF = {"FLOWDPPO_BUILD_CPU": "0", "FLOWDPPO_BUILD_CUDA": "0"}


def call(*command: object, **options: Any) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, **options)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return done.stdout


def sdist(folder: Path) -> Path:
    checkout = folder / "checkout"
    checkout.mkdir()
    archive = subprocess.run(["git", "archive", "HEAD"], cwd=ROOT, capture_output=True, check=True).stdout
    subprocess.run(["tar", "-x", "-C", checkout], input=archive, check=True)
    backend = "import sys, setuptools.build_meta as b; print(b.build_sdist(sys.argv[1]))"
    name = call(sys.executable, "-c", backend, folder, cwd=checkout, env={**os.environ, **OFF}).splitlines()[-1]
    return folder / name


def wheel_from(source: Path, folder: Path, **settings: str) -> Path:
    """The wheel that an sdist gives: what the sdist lacks shows."""
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", folder, source]
    call(*command, env={**os.environ, **OFF, **settings})
    (wheel,) = folder.glob("*.whl")
    return wheel


def repaired(wheel: Path, folder: Path) -> Path:
    """The wheel under the oldest manylinux name that its libraries allow."""
    call("auditwheel", "repair", *[f"--exclude={library}" for library in EXCLUDED], "-w", folder, wheel)
    (made,) = folder.glob("*.whl")
    return made


def build(folder: Path) -> tuple[dict[str, Path], dict[str, Any]]:
    """Wheels by kind (``x86_64``, ``pure`` and, where it can be built, ``aarch64``), and what they are."""
    source = sdist(folder)
    cuda = {"FLOWDPPO_BUILD_CUDA": "1"} if shutil.which("nvcc") else {}
    native = wheel_from(source, folder / "native", FLOWDPPO_BUILD_CPU="1", **cuda)
    wheels = {"x86_64": repaired(native, folder / "x86_64"), "pure": wheel_from(source, folder / "pure")}
    info: dict[str, Any] = {"sdist": source.name, "sdist bytes": source.stat().st_size, "left out": []}
    if not cuda:
        info["left out"].append("the CUDA library: nvcc is not on the path")
    older = os.environ.get("FLOWDPPO_SYSROOT_AARCH64")
    if older is None or shutil.which(CROSS) is None:
        missing = f"{CROSS} is not on the path" if older else "FLOWDPPO_SYSROOT_AARCH64 is not set"
        info["left out"].append(f"the aarch64 wheel: {missing}")
    else:
        settings = {"CXX": CROSS, "FLOWDPPO_SYSROOT": older, "_PYTHON_HOST_PLATFORM": "linux-aarch64"}
        wheels["aarch64"] = repaired(
            wheel_from(source, folder / "cross", FLOWDPPO_BUILD_CPU="1", **settings), folder / "aarch64"
        )
    info["wheels"] = {kind: described(wheel) for kind, wheel in wheels.items()}
    return wheels, info


def described(wheel: Path) -> dict[str, Any]:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    return {
        "name": wheel.name,
        "bytes": wheel.stat().st_size,
        "libraries": sorted(name for name in names if ".so" in Path(name).suffixes),
        "licences": sorted(name for name in names if "/licenses/" in name),
    }
