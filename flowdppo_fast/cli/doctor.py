"""``flowdppo doctor``: what is built, what is usable here, and why not."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
from typing import Any

import torch

from .. import backend

_OPTIONAL = ("triton", "diffusers", "transformers", "accelerate", "peft", "safetensors")


def doctor_report() -> dict[str, Any]:
    """What is installed, built and usable: versions, devices, each backend with the devices it serves or why not."""
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    backends: dict[str, Any] = {}
    for name in backend.BACKENDS:
        problems = {device: backend.problem(name, device) for device in devices}
        usable = [device for device, problem in problems.items() if problem is None]
        backends[name] = {"serves": usable} if usable else {"unusable": next(iter(problems.values()))}
    versions = {name: _version(name) for name in ("flowdppo_fast", "torch", *_OPTIONAL)}
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "versions": versions,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "cpu_isa": torch.ops.flowdppo.cpu_isa() if backend.problem("cpu", "cpu") is None else None,
        "build": backend.build_info(),
        "backends": backends,
        "auto": {device: backend.resolve("auto", device) for device in devices},
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _print_doctor(report: dict[str, Any]) -> None:
    print(f"python {report['python']} on {report['platform']}, {report['threads']} threads")
    for name, version in report["versions"].items():
        print(f"  {name:<14} {version or 'not installed'}")
    print(f"  {'gpu':<14} {report['gpu'] or 'none visible to torch'}")
    if report["cpu_isa"]:
        print(f"  {'cpu kernels':<14} {report['cpu_isa']}")
    if report["build"]:
        print("C++ library built with:")
        for key, value in report["build"].items():
            print(f"  {key:<14} {value}")
    print("backends:")
    for name, state in report["backends"].items():
        serves = state.get("serves")
        print(f"  {name:<14} " + (f"serves {', '.join(serves)} tensors" if serves else f"no: {state['unusable']}"))
    for device, name in report["auto"].items():
        print(f"backend='auto' takes {name!r} for {device} tensors")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="machine-readable report")


def run(options: argparse.Namespace) -> int:
    report = doctor_report()
    if options.json:
        print(json.dumps(report, indent=2))
    else:
        _print_doctor(report)
    return 0
