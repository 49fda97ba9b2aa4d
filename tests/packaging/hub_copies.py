"""Copies of the package beside the installed one, in this process, loaded as from a kernel hub.

    python tests/packaging/hub_copies.py [--kernels] VARIANT_OR_REPOSITORY ...

Each copy must give the installed package's numbers through operators of its own, with ``reference``, with Triton in its
interpreter and, where it holds the library, with C++. ``--kernels`` loads repositories through the package ``kernels``,
offline; else variants are imported by path, as that package does it.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

# both are read at import
os.environ["TRITON_INTERPRET"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

import torch

import flowdppo_fast


def from_path(variant: Path) -> ModuleType:
    """A variant, imported under the name of its metadata."""
    name = json.loads((variant / "metadata.json").read_text())["id"]
    spec = importlib.util.spec_from_file_location(name, variant / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def from_kernels(repository: Path) -> ModuleType:
    """What ``kernels`` takes of a repository's variants for this machine."""
    from kernels import get_local_kernel

    return get_local_kernel(repository)


def loss_and_gradient(package: Any, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    old, away, noise = torch.randn(3, 4, 4, 8, 8)
    velocity = (old + 0.05 * away).requires_grad_()
    step = package.SDEStep.from_sigmas("cps", 0.8, 0.6, eta=0.6)
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0])
    out = package.fused_dppo_velocity_loss(velocity, old, noise, step, advantages, threshold=1e-3, backend=backend)
    assert out.backend == backend
    out.loss.backward()
    assert velocity.grad is not None
    return out.rows.kl, velocity.grad


def check(package: ModuleType, expected: tuple[torch.Tensor, torch.Tensor]) -> dict[str, Any]:
    compiled = (Path(str(package.__file__)).parent / "_C_cpu.so").exists()
    backends = ["reference", "triton", *(["cpu"] if compiled else [])]
    for backend in backends:
        for got, want in zip(loss_and_gradient(package, backend), expected):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-9)
    took = package.resolve_backend("auto", "cpu")
    assert took == ("cpu" if compiled else "reference")
    namespace = sys.modules[f"{package.__name__}.ops"].NAMESPACE
    assert namespace == f"flowdppo_{package.__name__}"
    return {"module": package.__name__, "operators": namespace, "backends": backends}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", metavar="VARIANT_OR_REPOSITORY")
    parser.add_argument("--kernels", action="store_true", help="load repositories through the package kernels")
    arguments = parser.parse_args()
    expected = loss_and_gradient(flowdppo_fast, "reference")
    load = from_kernels if arguments.kernels else from_path
    found = [check(load(folder), expected) for folder in arguments.folders]
    # the installed package is as it was
    for got, want in zip(loss_and_gradient(flowdppo_fast, "triton"), expected):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-9)
    assert len({entry["operators"] for entry in found}) == len(found)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
