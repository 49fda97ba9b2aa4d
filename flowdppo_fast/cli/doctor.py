"""``flowdppo doctor``: what is built, what is usable here, and why not."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
from typing import Any

import torch

from .. import backend, evidence, ops

# what is known of kernels that no GPU has run
_EMULATED = {
    "triton": "launched through Triton's real launcher, executed as compiled PTX on an emulator, never yet on a GPU",
    "cuda": "launched through its real binding, executed as compiled PTX on an emulator, never yet on a GPU",
}
_OPTIONAL = ("triton", "diffusers", "transformers", "accelerate", "peft", "safetensors")


def doctor_report() -> dict[str, Any]:
    """What is installed, built and usable: versions, devices, each backend with the devices it serves or why not."""
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    backends: dict[str, Any] = {}
    for name in backend.BACKENDS:
        usable = [device for device in devices if backend.problem(name, device) is None]
        # of a GPU's backend: what would keep it from serving a GPU, before that there is none
        wanted = "cuda" if name == "cuda" else devices[0]
        reason = backend.problem(name, wanted) or "torch sees no GPU"
        backends[name] = {"serves": usable} if usable else {"unusable": reason}
    versions = {name: _version(name) for name in ("flowdppo_fast", "torch", *_OPTIONAL)}
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "versions": versions,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "cpu_isa": ops.registered().cpu_isa() if backend.problem("cpu", "cpu") is None else None,
        "cuda_kernels": _cuda_kernels(),
        "build": backend.build_info(),
        "backends": backends,
        "proof": {name: _proof(name) for name in _EMULATED},
        "auto": {device: backend.resolve_backend("auto", device) for device in devices},
    }


def _proof(name: str) -> str:
    """Where a GPU backend has passed its tests."""
    folders = evidence.PASSED.get(name, ())
    return f"passed the GPU tests of {', '.join(folders)}" if folders else _EMULATED[name]


def _cuda_kernels() -> str | None:
    """For which GPUs the CUDA library was compiled, and what the GPU here is; None where it cannot be loaded."""
    if backend.problem("cuda", "cuda") is not None:
        return None
    built = f"compiled for sm_{ops.registered(ops.CUDA_NAMESPACE).architectures().replace(';', ', sm_')}"
    if not torch.cuda.is_available():
        return built
    major, minor = torch.cuda.get_device_capability()
    return f"{built}; the GPU here is sm_{major}{minor}"


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
    if report["cuda_kernels"]:
        print(f"  {'cuda kernels':<14} {report['cuda_kernels']}")
    if report["build"]:
        print("C++ and CUDA libraries built with:")
        for key, value in report["build"].items():
            print(f"  {key:<18} {value}")
    print("backends:")
    for name, state in report["backends"].items():
        serves = state.get("serves")
        print(f"  {name:<14} " + (f"serves {', '.join(serves)} tensors" if serves else f"no: {state['unusable']}"))
        if name in report["proof"]:
            print(f"  {'':<14} {report['proof'][name]}")
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
