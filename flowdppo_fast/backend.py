"""Which backend serves which device: loading, choosing, saying why not.

A backend asked for by name runs or is an error; ``auto`` warns once where the device's own backend cannot run and plain
torch takes its place.

==========  =============================================  =========================================================
name        code                                           ``auto`` takes it for
==========  =============================================  =========================================================
reference   ``reference.py``, plain torch                  devices that nothing else serves
cpu         ``csrc/cpu``, loaded as ``_C_cpu.so``          CPU tensors, when built
triton      ``kernels/triton``                             CUDA and ROCm tensors, when Triton is installed
cuda        ``kernels/cuda``, loaded as ``_C_cuda.so``     CUDA tensors but float64, when built, once ``evidence.py``
                                                           says that it has passed the GPU tests
==========  =============================================  =========================================================
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.util
import itertools
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch

from . import evidence, objectives, ops, reference

BACKENDS = ("reference", "cpu", "triton", "cuda")
BackendName = Literal["auto", "reference", "cpu", "triton", "cuda"]
_COMPILED = ("cpu", "cuda")
_PACKAGE = Path(__file__).parent
_LIBRARY = _PACKAGE / "_C_cpu.so"
_CUDA_LIBRARY = _PACKAGE / "_C_cuda.so"


def _namespace_problem(library: Path) -> str | None:
    """Whether a library that is there would register its operators where another copy of the package has its own."""
    theirs = build_info().get("namespace", "flowdppo")
    if not library.exists() or theirs == ops.NAMESPACE:
        return None
    return (
        f"{library.name} has its operators in {theirs!r} and this copy of the package has them in {ops.NAMESPACE!r}; "
        "hub/layout.py --cpu compiles one for a copy"
    )


def _load_cpu_library() -> str | None:
    """Loads the C++ library; returns why it cannot be used, or None."""
    if (other := _namespace_problem(_LIBRARY)) is not None:
        return other
    if not _LIBRARY.exists():
        return (
            "the C++ library is not built; install with a C++ compiler present "
            "(FLOWDPPO_BUILD_CPU=1 pip install --no-build-isolation . turns a failed build into an error)"
            + _last_build("_C_cpu")
        )
    try:
        torch.ops.load_library(str(_LIBRARY))
    except OSError as error:
        built = build_info().get("torch", "an unknown version")
        return f"the C++ library built for torch {built} cannot be loaded under torch {torch.__version__}: {error}"
    try:
        ops.registered().cpu_isa()
    except RuntimeError as error:
        # FLOWDPPO_CPU_ISA asks for what is not there
        return str(error).splitlines()[0]
    return _names_problem(_LIBRARY)


def _load_cuda_library() -> str | None:
    """Loads the CUDA library; returns why it cannot be used, or None."""
    if (other := _namespace_problem(_CUDA_LIBRARY)) is not None:
        return other
    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA; install a torch that has it"
    if not _CUDA_LIBRARY.exists():
        return (
            "the CUDA library is not built; install with CUDA's compiler nvcc present "
            "(FLOWDPPO_BUILD_CUDA=1 pip install --no-build-isolation . turns a failed build into an error)"
            + _last_build("_C_cuda")
        )
    try:
        torch.ops.load_library(str(_CUDA_LIBRARY))
    except OSError as error:
        built = build_info().get("torch", "an unknown version")
        return f"the CUDA library built for torch {built} cannot be loaded under torch {torch.__version__}: {error}"
    return _names_problem(_CUDA_LIBRARY)


def _names_problem(library: Path) -> str | None:
    """Whether C++ has another list of rules, options or results: operators carry numbers, which would mean others."""
    try:
        spell = ctypes.CDLL(str(library)).flowdppo_names
    except AttributeError:
        return f"{library.name} is of another version; build it again: make build"
    spell.restype = ctypes.c_char_p
    theirs, ours = spell().decode().split(), objectives.names().split()
    for place, (their, our) in enumerate(itertools.zip_longest(theirs, ours)):
        if their != our:
            title = [word for word in ours[:place] if word.endswith(":")]
            where = f" of {title[-1]}" if title else ""
            return f"{library.name} has {their!r} where Python has {our!r}{where}; build it again: make build"
    return None


def _last_build(library: str) -> str:
    reason = build_info().get("missing", {}).get(library)
    return "" if reason is None else f"; the last build went without it: {reason}"


def build_info() -> dict[str, Any]:
    """What the installed C++ and CUDA libraries were built with (empty for a pure-Python install)."""
    path = _PACKAGE / "_build_info.json"
    return json.loads(path.read_text()) if path.exists() else {}


def _kernels_problem() -> str | None:
    """Why Triton's kernels cannot be used, or None: they are installed from another folder than the package."""
    found = importlib.util.find_spec(".kernels", __package__)
    if found is None or found.origin is None:
        return f"its kernels are not installed; pip install -e {_PACKAGE.parent} (or a wheel) brings them"
    # links are followed, those of single files too: bench/gpu.sh puts the package together of them
    place, home = Path(found.origin).resolve().parent, Path(__file__).resolve().parent
    if place not in (home / "kernels", home.parent / "kernels" / "triton"):
        return f"the package is in {_PACKAGE} and its kernels are those of {place}; pip install -e {_PACKAGE.parent}"
    return None


def triton_interpreted() -> bool:
    """Whether Triton kernels run in Triton's interpreter, on CPU tensors (``TRITON_INTERPRET=1``)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


_CPU_PROBLEM = _load_cpu_library()
_CUDA_PROBLEM = _load_cuda_library()
_TRITON_SPEC = importlib.util.find_spec("triton")
_TRITON_PROBLEM = (
    _kernels_problem()
    # a mere folder of that name on the path has no origin
    if _TRITON_SPEC is not None and _TRITON_SPEC.origin is not None
    else "Triton is not installed; pip install 'triton>=3.6' (Linux x86-64) or take another backend"
)


def problem(name: str, device_type: str) -> str | None:
    """Why backend ``name`` cannot serve tensors on ``device_type``, in one sentence; None if it can.

    Raises:
        ValueError: unknown backend.
    """
    if name == "reference":
        return None
    if name == "cpu":
        if device_type != "cpu":
            return f"it serves CPU tensors and these are on {device_type!r}"
        return _CPU_PROBLEM
    if name == "triton":
        if _TRITON_PROBLEM is not None:
            return _TRITON_PROBLEM
        if device_type == "cuda" or (device_type == "cpu" and triton_interpreted()):
            return None
        return (
            f"it serves GPU tensors and these are on {device_type!r} "
            "(TRITON_INTERPRET=1 runs the kernels on CPU tensors, slowly, for tests)"
        )
    if name == "cuda":
        if device_type != "cuda":
            return f"it serves NVIDIA GPU tensors and these are on {device_type!r}"
        return _CUDA_PROBLEM
    raise ValueError(f"backend: got {name!r}, expected 'auto' or one of {', '.join(map(repr, BACKENDS))}")


def resolve_backend(
    name: str, device_type: str, dtype: torch.dtype = torch.float32, *, own_rule: bool = False, matching: bool = False
) -> str:
    """The backend that will run: ``name`` itself, or the best one for the device if ``name`` is ``"auto"``.

    Args:
        name: one of :data:`BACKENDS`, or ``"auto"``.
        device_type: of the latents.
        dtype: accumulation dtype: ``torch.float64`` for float64 latents, which ``cuda`` does not compute in.
        own_rule: for an objective of the caller's own, which ``cpu`` and ``cuda`` do not have.
        matching: for the forward process, which ``cuda`` has no kernel for.

    Raises:
        ValueError: unknown backend. RuntimeError: a backend asked for by name cannot run here; the message says why.
    """
    if name != "auto":
        reason = problem(name, device_type)
        if reason is None and name == "cuda" and dtype == torch.float64:
            reason = "it computes in float32 and the latents are float64; backend='reference' and 'triton' take them"
        if reason is None and name == "cuda" and matching:
            reason = "it has no kernel for the forward process; backend='triton' has one"
        if reason is None and own_rule and name in _COMPILED:
            reason = "C++ has no rule of one's own; backend='triton' runs it fused on a GPU, 'reference' anywhere"
        if reason is not None:
            raise RuntimeError(f"backend={name!r} cannot run: {reason}")
        return name
    preferred = {"cpu": ("cpu",), "cuda": evidence.ORDER}.get(device_type)
    if preferred is None:
        return "reference"
    reasons = {}
    for candidate in preferred:
        if candidate == "cuda" and (dtype == torch.float64 or matching):
            continue
        if own_rule and candidate in _COMPILED:
            if device_type == "cpu":
                # no news: C++ has no such rule anywhere, and this is how it runs on a CPU
                return "reference"
            continue
        reason = problem(candidate, device_type)
        if reason is None:
            return candidate
        reasons[candidate] = reason
    if not torch.compiler.is_compiling():
        _warn_reference(device_type, reasons)
    return "reference"


_warned: set[str] = set()


def _warn_reference(device_type: str, reasons: dict[str, str]) -> None:
    if device_type not in _warned:
        _warned.add(device_type)
        because = " and ".join(f"{name!r} cannot run: {reason}" for name, reason in reasons.items())
        warnings.warn(
            f"flowdppo_fast: backend 'auto' takes the plain torch reference for {device_type!r} tensors because "
            f"{because}. backend='reference' silences this.",
            stacklevel=4,
        )


def operator(op: str, backend: str, device_type: str) -> Callable:
    """The callable behind operator ``op`` of a resolved backend, all with the signatures of ``reference.py``."""
    if backend == "reference":
        return getattr(reference, op)
    if launches_itself(backend, device_type):
        return getattr(triton_kernels(), op)
    return _CUDA_OPERATORS[op] if backend == "cuda" else _OPERATORS[op]


_OPERATORS: dict[str, Callable] = {op: getattr(ops.registered(), op).default for op in ops.SCHEMAS}
_CUDA_OPERATORS: dict[str, Callable] = {
    op: getattr(ops.registered(ops.CUDA_NAMESPACE), op).default for op in ops.SCHEMAS
}


def is_traced() -> bool:
    """Whether tensors may have no values or operators must be seen: under a compiler, or a mode like fake tensors'."""
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


def launches_itself(backend: str, device_type: str) -> bool:
    """Whether kernels are called past the dispatcher, whose way into Python and back takes longer than Triton's
    launcher: unless somebody has to see the operators."""
    return backend == "triton" and (device_type == "cpu" or not (is_traced() or torch._C._autograd._profiler_enabled()))


@functools.cache
def triton_kernels() -> Any:
    """The module, imported at the first call, so that importing the package stays light."""
    return importlib.import_module(".kernels", __package__)


def _register_triton() -> None:
    def lazily(op: str) -> Callable:
        return lambda *args: getattr(triton_kernels(), op)(*args)

    for op in ops.SCHEMAS:
        ops.library.impl(op, lazily(op), "CUDA")


if _TRITON_PROBLEM is None:
    _register_triton()
