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

import io
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
# what systems have that are no older than Debian 11: libraries, and the newest versions of their symbols
SYSTEM = {
    "libtorch_cpu.so", "libstdc++.so.6", "libgcc_s.so.1", "libc.so.6", "libm.so.6", "ld-linux-aarch64.so.1"
}  # fmt: skip
NEWEST = {"GLIBC": (2, 31), "GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11), "GCC": (7, 0, 0)}
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


def foreign(wheel: Path, folder: Path) -> Path:
    """The wheel for another processor under the oldest manylinux name that its library's glibc allows.

    auditwheel looks libraries up on the machine that it runs on.

    Raises:
        RuntimeError: its library asks for more than such a system has.
    """
    from elftools.elf.elffile import ELFFile

    with zipfile.ZipFile(wheel) as archive:
        library = ELFFile(io.BytesIO(archive.read("flowdppo_fast/_C_cpu.so")))
    versions = library.get_section_by_name(".gnu.version_r").iter_versions()
    asked = {(part.name, name.name) for part, names in versions for name in names}
    newer = [f"{name} of {part}" for part, name in sorted(asked) if not NEWEST[_family(name)] >= _number(name)]
    glibc = max(_number(name) for _, name in asked if _family(name) == "GLIBC")
    needed = {tag.needed for tag in library.get_section_by_name(".dynamic").iter_tags("DT_NEEDED")}
    if newer or not needed <= SYSTEM:
        raise RuntimeError(f"{wheel.name} asks for {', '.join([*newer, *sorted(needed - SYSTEM)])}")
    folder.mkdir()
    made = shutil.copy(wheel, folder)
    platform = f"manylinux_{glibc[0]}_{glibc[1]}_{wheel.stem.rpartition('linux_')[2]}"
    call(sys.executable, "-m", "wheel", "tags", "--remove", "--platform-tag", platform, made)
    (path,) = folder.glob("*.whl")
    return path


def _family(symbol_version: str) -> str:
    return symbol_version.rpartition("_")[0]


def _number(symbol_version: str) -> tuple[int, ...]:
    number = symbol_version.rpartition("_")[2]
    # that of GLIBC_PRIVATE is newer than any
    return tuple(map(int, number.split("."))) if number[0].isdigit() else (1000,)


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
        wheels["aarch64"] = foreign(
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
