"""What a result was measured on. No host names and no paths."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

import flowdppo_fast

from . import threads
from .devices import Device

ROOT = Path(__file__).resolve().parents[2]
_GPU_FIELDS = (
    "name,driver_version,memory.total,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit,temperature.gpu"
)


def git_sha() -> str:
    """Short commit id; ``FLOWDPPO_GIT_SHA`` where the tree travels without its history, else ``nogit``."""
    return _output(["git", "-C", str(ROOT), "rev-parse", "--short=10", "--verify", "--quiet", "HEAD"]) or (
        os.environ.get("FLOWDPPO_GIT_SHA") or "nogit"
    )


def result_folder(device: Device) -> Path:
    """``bench/results/<cpu, or the GPU's name>/<date>-<git sha>``, from the root of the repository."""
    name = device.kind
    if device.kind == "cuda":
        name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device.torch_device).lower()).strip("-")
    now = datetime.datetime.now(datetime.timezone.utc)
    return Path("bench") / "results" / name / f"{now:%Y-%m-%d}-{git_sha()}"


def collect(device: Device) -> dict[str, Any]:
    """The environment block of a result."""
    changes = _output(["git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no"])
    found: dict[str, Any] = {
        "date": f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%dT%H:%M:%SZ}",
        "git_sha": git_sha(),
        "git_dirty": None if changes is None else bool(changes),
        "flowdppo_fast": flowdppo_fast.__version__,
        "flowdppo_fast_build": _printable(flowdppo_fast.build_info()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "triton": _version("triton"),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cpus": os.cpu_count(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cache_bytes": device.cache_bytes(),
        "openmp": {name: os.environ.get(name) for name in threads.SETTINGS},
        "load_average": load_average(),
    }
    if device.kind == "cuda":
        found["gpu"] = gpu_state()
        properties = torch.cuda.get_device_properties(device.torch_device)
        found["gpu_multiprocessors"] = properties.multi_processor_count
        found["gpu_capability"] = f"{properties.major}.{properties.minor}"
    return found


def gpu_state() -> dict[str, str] | None:
    """Name, driver, clocks (MHz), power limit and temperature as the driver reports them; None without nvidia-smi."""
    line = _output(["nvidia-smi", f"--query-gpu={_GPU_FIELDS}", "--format=csv,noheader"])
    if not line:
        return None
    values = [value.strip() for value in line.splitlines()[0].split(",")]
    return dict(zip(_GPU_FIELDS.split(","), values))


def _output(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _printable(info: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in info.items() if isinstance(value, str) and "/" not in value}


def _cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or "unknown"
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found.group(1) if found else platform.processor() or "unknown"


def load_average() -> float:
    """Runnable processes over the last minute: what else the machine was doing."""
    return round(os.getloadavg()[0], 2)
