"""Compiles kernels and host layer to shared libraries and programs, each object once per content."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HOST = Path(__file__).parent / "host"
KERNELS = ROOT / "kernels" / "cuda"
SOURCE_FOLDERS = (HOST, KERNELS, ROOT / "csrc")
CACHE = ROOT / "build" / "cuda_host"
# kernels are compiled as they are written: no fused multiply-adds that the source does not ask for
FLAGS = [
    "-std=c++20", "-O1", "-g1", "-fPIC", "-ffp-contract=off",
    "-Wall", "-Wextra", "-Werror", "-Wno-maybe-uninitialized",
]  # fmt: skip
RUNTIME = ("runtime.cpp", "control.cpp")
# undefined behaviour ends the program; unoptimized code is compiled in a third of the time with these checks
SANITIZERS = {
    "none": [],
    "thread": ["-fsanitize=thread"],
    "address": ["-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
}
ENVIRONMENT = {
    "TSAN_OPTIONS": "halt_on_error=1 exitcode=66 atexit_sleep_ms=0 history_size=0",
    "ASAN_OPTIONS": "exitcode=66",
    "UBSAN_OPTIONS": "print_stacktrace=1",
}


def compiler() -> str:
    """The C++ compiler; skips where there is none."""
    if sys.platform != "linux":
        pytest.skip(f"the host layer is written for Linux, this is {sys.platform}")
    name = os.environ.get("CXX", "c++")
    if shutil.which(name) is None:
        pytest.skip(f"there is no C++ compiler ({name}; CXX names another)")
    return name


@functools.cache
def _version(command: str) -> str:
    return subprocess.run([command, "--version"], capture_output=True, text=True, check=True).stdout


def kernel_sources() -> list[Path]:
    return sorted(KERNELS.glob("*.cu"))


def _headers(folders: Iterable[Path]) -> list[Path]:
    found = [path for folder in folders for pattern in ("*.h", "*.cuh") for path in folder.glob(pattern)]
    return sorted(found)


def _digest(*parts: str | bytes) -> str:
    out = hashlib.sha256()
    for part in parts:
        out.update(part.encode() if isinstance(part, str) else part)
        out.update(b"\0")
    return out.hexdigest()[:24]


@contextlib.contextmanager
def _locked(path: Path):
    """Several test processes build a thing once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _run(command: list[str], out: Path) -> None:
    made = out.with_name(f"{out.name}.{os.getpid()}")
    result = subprocess.run([*command, "-o", str(made)], capture_output=True, text=True, cwd=ROOT)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{result.stdout}{result.stderr}")
    os.replace(made, out)


def compiled(source: Path, sanitizer: str = "none", changed: Mapping[Path, str] | None = None) -> Path:
    """The object of ``source``; ``changed`` has other texts for some files, as if they had been edited."""
    changed = dict(changed or {})
    command = compiler()
    # runtime and schedulers stay unsanitized: they tell the sanitizers what they have to know
    flags = [*FLAGS, *SANITIZERS[sanitizer]]
    texts = {path: path.read_text() for path in [*_headers(SOURCE_FOLDERS), source]}
    texts.update(changed)
    parts = [text for path in sorted(texts) for text in (str(path.relative_to(ROOT)), texts[path])]
    out = CACHE / f"{source.stem}.{sanitizer}.{_digest(_version(command), *flags, *parts)}.o"
    with _locked(out):
        if out.exists():
            return out
        base = ROOT
        if changed:
            # a copy of the folders side by side, so that relative includes still lead where they should
            base = CACHE / f"changed.{out.name}"
            for folder in SOURCE_FOLDERS:
                shutil.copytree(folder, base / folder.relative_to(ROOT), dirs_exist_ok=True)
            for path, text in changed.items():
                (base / path.relative_to(ROOT)).write_text(text)
        includes = [f"-I{base / folder.relative_to(ROOT)}" for folder in SOURCE_FOLDERS]
        _run([command, *flags, *includes, "-x", "c++", "-c", str(base / source.relative_to(ROOT))], out)
        if changed:
            shutil.rmtree(base)
    return out


def linked(objects: list[Path], kind: str, sanitizer: str = "none", scheduler: str = "fibers") -> Path:
    """The shared library (kind "so") or program (kind "exe") of ``objects`` and the layer."""
    command = compiler()
    runtime = [compiled(HOST / name) for name in (*RUNTIME, f"{scheduler}.cpp")]
    inputs = [str(path) for path in [*objects, *runtime]]
    out = CACHE / f"{_digest(kind, sanitizer, *inputs)}.{kind}"
    with _locked(out):
        if not out.exists():
            shared = ["-shared", "-Wl,-Bsymbolic"] if kind == "so" else []
            _run([command, *shared, *SANITIZERS[sanitizer], *inputs, "-pthread"], out)
    return out


def objects_of(sources: list[Path], sanitizer: str = "none") -> list[Path]:
    return [compiled(source, sanitizer) for source in sources]


@functools.cache
def _runner(sanitizer: str) -> tuple[str, ...]:
    """What a sanitized program has to be started with here; skips where the sanitizer cannot run at all."""
    source = CACHE / "probe.cpp"
    CACHE.mkdir(parents=True, exist_ok=True)
    source.write_text("int main() { return 0; }\n")
    program = CACHE / f"probe.{sanitizer}.{os.getpid()}"
    build = [compiler(), *SANITIZERS[sanitizer], str(source), "-o", str(program)]
    result = subprocess.run(build, capture_output=True, text=True)
    if result.returncode != 0:
        pytest.skip(f"no {sanitizer} sanitizer: {result.stderr.strip().splitlines()[-1]}")
    tried = []
    # some kernels spread addresses wider than the thread sanitizer can bear
    for prefix in ((), ("setarch", platform.machine(), "-R")):
        if prefix and shutil.which(prefix[0]) is None:
            continue
        result = subprocess.run([*prefix, str(program)], capture_output=True, text=True)
        if result.returncode == 0:
            program.unlink()
            return prefix
        tried.append((result.stderr.strip().splitlines() or ["no message"])[0])
    pytest.skip(f"the {sanitizer} sanitizer does not run here: {tried}")


def run_program(
    program: Path, arguments: Iterable[str], sanitizer: str = "none", timeout: float = 240
) -> subprocess.CompletedProcess:
    """Runs it to its end; exit code 66 is a sanitizer's report, 1 a wrong result."""
    command = [*_runner(sanitizer), str(program), *arguments]
    environment = {**os.environ, **ENVIRONMENT}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=timeout)
