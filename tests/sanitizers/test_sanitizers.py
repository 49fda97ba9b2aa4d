"""The C++ CPU backend under the address, undefined-behaviour and thread sanitizers."""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CSRC = ROOT / "csrc"
COMPILER = shlex.split(os.environ.get("CXX", "c++"))[0]
FLAGS = ["-std=c++20", "-O1", "-g1", "-fno-omit-frame-pointer", "-ffp-contract=off", "-Wno-psabi"]
X86 = platform.machine().lower() in ("x86_64", "amd64")
ISA_FLAGS = {"baseline": []}
if X86:
    ISA_FLAGS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    ISA_FLAGS["avx512"] = [*ISA_FLAGS["avx2"], "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
SANITIZERS = {
    "address-undefined": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-fsanitize=thread"],
}
# threads share rows in the same way whatever the instructions are
SETS = {"address-undefined": list(ISA_FLAGS), "thread": ["baseline"]}
CASES = 100

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which(COMPILER) is None, reason=f"needs Linux and a C++ compiler ({COMPILER})"
)


def usable(isa: str) -> bool:
    """Whether this machine runs the instruction set."""
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    needed = {"baseline": [], "avx2": ["avx2", "fma", "f16c"], "avx512": ["avx512bw", "avx512vl", "avx512dq"]}
    return all(f" {flag}" in flags for flag in needed[isa])


@pytest.fixture(scope="session")
def driver(tmp_path_factory):
    """Builds the driver under one sanitizer, once."""
    built: dict[str, Path] = {}

    def build(sanitizer: str) -> Path:
        if sanitizer not in built:
            folder = tmp_path_factory.mktemp(sanitizer)
            common = [COMPILER, *FLAGS, *SANITIZERS[sanitizer], f"-I{HERE}", f"-I{CSRC}"]
            if len(SETS[sanitizer]) > 1:
                common.append("-DFLOWDPPO_X86")
            jobs, objects = [], []
            for isa in SETS[sanitizer]:
                flags = ISA_FLAGS[isa]
                objects.append(folder / f"{isa}.o")
                command = [*common, *flags, f"-DFLOWDPPO_ISA={isa}", "-c", CSRC / "cpu/kernels.cpp", "-o", objects[-1]]
                jobs.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
            for source in (CSRC / "cpu/isa.cpp", CSRC / "cpu/rows.cpp", HERE / "driver.cpp"):
                objects.append(folder / f"{source.stem}.o")
                command = [*common, "-c", source, "-o", objects[-1]]
                jobs.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
            for job in jobs:
                _, errors = job.communicate()
                assert job.returncode == 0, errors
            built[sanitizer] = folder / "driver"
            link = subprocess.run(
                [*common, *objects, "-o", built[sanitizer], "-pthread"], capture_output=True, text=True
            )
            assert link.returncode == 0, link.stderr
        return built[sanitizer]

    return build


def run(path: Path, *arguments: str, isa: str | None = None) -> subprocess.CompletedProcess:
    environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1", "UBSAN_OPTIONS": "print_stacktrace=1"}
    if isa is not None:
        environment["FLOWDPPO_CPU_ISA"] = isa
    return subprocess.run([path, *arguments], capture_output=True, text=True, env=environment, timeout=300)


@pytest.mark.slow
@pytest.mark.parametrize(("sanitizer", "isa"), [(name, isa) for name, sets in SETS.items() for isa in sets])
def test_random_cases_are_clean(driver, sanitizer, isa):
    if not usable(isa):
        pytest.skip(f"this machine has no {isa}")
    result = run(driver(sanitizer), str(CASES), "7", isa=isa)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout == f"{CASES} cases on {isa}\n"


@pytest.mark.parametrize(
    ("sanitizer", "mistake", "report"),
    [("address-undefined", "overread", "heap-buffer-overflow"), ("thread", "race", "data race")],
)
def test_the_sanitizers_see_a_mistake(driver, sanitizer, mistake, report):
    result = run(driver(sanitizer), mistake)
    assert result.returncode != 0
    assert report in result.stderr
