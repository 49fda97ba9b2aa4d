"""Builds, for every ``triton.jit`` function of the package, the code by which Triton launches it; no GPU is needed.

Triton makes a Python function of a kernel's parameters, the binder. ``python tests/codegen/launch_path.py`` prints
an object by function: ``"binder"`` says why it could not be built, or null, and ``"specialisations"`` where arguments
like those of a launch lead to other types, constants or attributes than ``aot.py`` compiles with. Run it without
``TRITON_INTERPRET``, under whichever Triton is on the path.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
from typing import Any

import torch
import triton
from aot import WIDE_NUMBERS, Specialisation, compiled_kernel, signature_of, specialisations
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from flowdppo_fast import kernels

BACKEND = make_backend(GPUTarget("cuda", 90, 32))
_DTYPES = {"*bf16": torch.bfloat16, "*fp16": torch.float16, "*fp32": torch.float32, "*fp64": torch.float64}


def jit_functions() -> dict[str, JITFunction]:
    """All of the package by ``module.name``, device functions too: nothing tells them from kernels."""
    found = {}
    for module in pkgutil.iter_modules(kernels.__path__):
        namespace = vars(importlib.import_module(f"{kernels.__name__}.{module.name}"))
        for name, value in namespace.items():
            if isinstance(value, JITFunction) and value.__module__ == f"{kernels.__name__}.{module.name}":
                found[f"{module.name}.{name}"] = value
    return found


def bind(kernel: JITFunction, *args: Any, backend: Any = BACKEND, **options: Any) -> tuple[Any, Any, Any]:
    """Arguments, their specialisation and the options, as a launch has them."""
    return create_function_from_signature(kernel.signature, kernel.params, backend)(*args, **options)


def why_no_binder(kernel: JITFunction) -> str | None:
    try:
        create_function_from_signature(kernel.signature, kernel.params, BACKEND)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def _argument(spec: Specialisation, name: str) -> Any:
    """A value as the launchers pass it for a parameter of a specialisation."""
    kind = spec.types.get(name)
    if kind is None:
        return spec.constants.get(name)
    if kind in _DTYPES:
        tensor = torch.empty(32, dtype=_DTYPES[kind])
        return tensor if spec.aligned else tensor[1:]
    if kind == "fp32":
        return 0.25
    return 48 if spec.aligned else 49


def differences(spec: Specialisation) -> list[str]:
    """What of types, constants, attributes and options a launch would have otherwise."""
    kernel = compiled_kernel(spec)
    values = [_argument(spec, param.name) for param in kernel.params]
    # what JITFunction.run adds to every launch
    options = {"num_warps": spec.num_warps, "enable_fp_fusion": spec.fp_fusion, "debug": False}
    options["instrumentation_mode"] = ""
    bound, specialisation, options = bind(kernel, *values, **options)
    parsed, types, constants, attributes = kernel._pack_args(BACKEND, options, bound, specialisation, options)
    launched = {"types": types, "constants": constants, "attributes": {k: v for k, v in attributes.items() if v}}
    compiled = dict(zip(("types", "constants", "attributes"), signature_of(spec)))
    found = [
        f"{what}: {launched[what]}, compiled with {compiled[what]}"
        for what in compiled
        if launched[what] != compiled[what]
    ]
    if (parsed.num_warps, parsed.enable_fp_fusion) != (spec.num_warps, spec.fp_fusion):
        found.append(f"options: {parsed}")
    return found


def main() -> None:
    compiled = [spec for spec in specialisations() if spec.name != WIDE_NUMBERS]
    report = {}
    for name, kernel in jit_functions().items():
        problem = why_no_binder(kernel)
        mine = {spec.name: differences(spec) for spec in compiled if spec.kernel == name and problem is None}
        report[name] = {"binder": problem, "specialisations": mine}
    print(json.dumps({"triton": triton.__version__, "functions": report}))


if __name__ == "__main__":
    main()
