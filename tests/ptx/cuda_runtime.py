"""The CUDA backend without a GPU: its binding, launchers and plans as they are, its kernels as PTX on an emulator.

:func:`load` compiles the sources with nvcc, with the flags of ``setup.py``, links them with ``cuda_runtime.cpp`` in
place of CUDA's run-time library, and registers the operators of ``flowdppo_cuda`` for tensors on the CPU.
"""

from __future__ import annotations

import ast
import contextlib
import ctypes
import fcntl
import functools
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from flowdppo_fast import backend, ops
from ptx.machine import Machine, Program
from ptx.memory import GlobalMemory
from ptx.numbers import Approximation
from ptx.parse import Fault, Kernel, parse
from ptx.races import RaceChecker

ROOT = Path(__file__).parents[2]
KERNELS, BINDING = ROOT / "kernels" / "cuda", ROOT / "csrc" / "cuda" / "bindings.cpp"
STANDIN = Path(__file__).with_name("cuda_runtime.cpp")
CACHE = ROOT / "build" / "cuda_ptx"
GPUS = ("80", "90a", "100")
# where a test does not care: all of them, and each source is compiled for one
SPREAD = {"forward": "90a", "gradient": "100", "sampler_step": "80"}
_WRAPPED = (
    "aoti_torch_library_init_impl", "aoti_torch_library_def", "aoti_torch_get_device_type",
    "aoti_torch_get_device_index", "torch_call_dispatcher",
)  # fmt: skip
_KERNEL = re.compile(r"\d([a-z]+_kernel)E")
POISON = 0xFF
# counters in front of the scratch memory that a stream keeps: kKeptTickets in bindings.cpp
_TICKET_BYTES = 4096 * 4
# of blocks that run at a time: every register of every thread is memory here
_MOST_RESIDENT = 128


def nvcc() -> str | None:
    """CUDA's compiler, where ``setup.py`` looks for it."""
    home = os.environ.get("CUDA_HOME")
    if home:
        return shutil.which("nvcc", path=str(Path(home, "bin")))
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


@functools.cache
def _setup_constant(name: str) -> Any:
    """A literal of ``setup.py``: what it compiles with is what is compiled with here."""
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == name:
            return ast.literal_eval(node.value)
    raise LookupError(f"setup.py has no {name}")


@functools.cache
def _version() -> str:
    return subprocess.run([str(nvcc()), "--version"], capture_output=True, text=True, check=True).stdout


def _digest(paths: list[Path], *rest: str) -> str:
    out = hashlib.sha256("\0".join(rest).encode())
    for path in paths:
        out.update(path.name.encode() + b"\0" + path.read_bytes())
    return out.hexdigest()[:20]


def _made(name: str, suffix: str, sources: list[Path], command: list[str], keep: str = "") -> Path:
    """What nvcc makes of it, once per content; ``command`` ends with ``-o``, ``keep`` names a GPU whose PTX is kept."""
    out = CACHE / f"{name}.{_digest(sources, _version(), torch.__version__, *command)}{suffix}"
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(out.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not out.exists():
            with tempfile.TemporaryDirectory(dir=CACHE) as folder:
                made = Path(folder, f"made{suffix}")
                kept = ["--keep", f"--keep-dir={folder}"] if keep else []
                done = subprocess.run(
                    [str(nvcc()), *kept, *command, str(made)], capture_output=True, text=True, cwd=ROOT
                )
                if done.returncode != 0:
                    raise RuntimeError(f"nvcc {' '.join(command)} failed:\n{done.stdout}{done.stderr}")
                if keep:
                    Path(folder, f"{name}.ptx").rename(out.with_suffix(".ptx"))
                made.rename(out)
    return out


def _headers() -> list[Path]:
    return sorted([*KERNELS.glob("*.h"), *KERNELS.glob("*.cuh"), *(ROOT / "csrc").glob("*.h")])


def _kernels(source: Path, gpu: str) -> Path:
    """The host's half of a kernel source as an object; its other half lies beside it as PTX."""
    flags = [*_setup_constant("NVCC_FLAGS"), f"-gencode=arch=compute_{gpu},code=compute_{gpu}"]
    return _made(
        source.stem, ".o", [source, *_headers()], [*flags, "-c", str(source.relative_to(ROOT)), "-o"], keep=gpu
    )


def ptx_of(source: Path, gpu: str) -> Path:
    """What the library has of ``source`` for one GPU, such as ``"90a"``, before ptxas."""
    return _kernels(source, gpu).with_suffix(".ptx")


def _library() -> Path:
    from torch.utils.cpp_extension import include_paths

    target = _setup_constant("TORCH_TARGET")
    common = [
        "-std=c++17", "-O1", "-Xcompiler=-fPIC,-fvisibility-inlines-hidden", "-c", f"-I{KERNELS}",
        *(f"-isystem={path}" for path in include_paths()),
        f"-DTORCH_TARGET_VERSION={target}", "-DTORCH_STABLE_ONLY", '-DFLOWDPPO_CUDA_ARCHS="emulated"',
    ]  # fmt: skip
    objects = [
        _made(path.stem, ".o", [path, *_headers()], [*common, str(path.relative_to(ROOT)), "-o"])
        for path in (BINDING, STANDIN)
    ]
    objects += [_kernels(path, SPREAD[path.stem]) for path in sorted(KERNELS.glob("*.cu"))]
    wraps = [f"-Xlinker=--wrap={name}" for name in _WRAPPED]
    torch_library = Path(torch.__file__).parent / "lib"
    names = [str(path) for path in objects]
    return _made(
        "cuda", ".so", [], ["-shared", "-cudart=none", *wraps, *names, f"-L{torch_library}", "-ltorch_cpu", "-o"]
    )


def span(tensor: Tensor) -> int:
    """Bytes from a tensor's first element to the end of its last one in memory."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    return 0 if tensor.numel() == 0 else (last + 1) * tensor.element_size()


@dataclass(frozen=True)
class Launched:
    """What one launch was; ``read`` counts bytes of global memory by the address of the allocation they are in."""

    kernel: str
    blocks: int
    threads: int
    shared_bytes: int
    read: dict[int, int]


class _Watch(RaceChecker):
    """Counts what a launch reads of each allocation, and looks for races where it is told to."""

    def __init__(self, races: bool, starts: list[int]) -> None:
        super().__init__()
        self.races, self.starts = races, np.array(sorted(starts), np.uint64)
        self.read = np.zeros(len(starts), np.int64)

    def begin(self, machine: Machine) -> None:
        self._first = machine.memory.places(self.starts)
        if self.races:
            super().begin(machine)

    def global_access(self, machine: Machine, lanes: Any, places: Any, size: int, write: bool) -> None:
        if not write:
            self.read += size * np.bincount(
                np.searchsorted(self._first, places, "right") - 1, minlength=len(self.starts)
            )
        if self.races:
            super().global_access(machine, lanes, places, size, write)

    def __getattribute__(self, name: str) -> Any:
        told = ("begin_blocks", "shared_access", "warp_barrier", "block_barrier", "atomic", "different_values")
        if name in told and not self.races:
            return lambda *_: None
        return super().__getattribute__(name)


@dataclass
class Cuda:
    """The operators of ``flowdppo_cuda``, with the names and arguments of ``reference.py``.

    Args:
        gpus: whose PTX runs, one of :data:`GPUS` by kernel source.
        approximation: see :class:`ptx.numbers.Approximation`.
        seed: the order of blocks and arrivals; None is the natural one.
        resident: blocks that run at a time.
        races: whether a race is a fault.
        alter: what is done to a kernel before it runs.
        launched: the launches since the last call of an operator began, and ``launches`` how many there were ever.
        allocated: (what, address, bytes) of the memory that the last call asked for.
        counts: launches ever, by kernel.
    """

    library: ctypes.CDLL
    gpus: dict[str, str] = field(default_factory=lambda: dict(SPREAD))
    approximation: Approximation = Approximation.VARIED
    seed: int | None = None
    resident: int | None = None
    races: bool = True
    alter: Callable[[Program], Program] | None = None
    launched: list[Launched] = field(default_factory=list)
    launches: int = 0
    allocated: list[tuple[str, int, int]] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    _kept: list[tuple[int, int]] = field(default_factory=list)
    _memory: dict[int, int] = field(default_factory=dict)
    _failure: BaseException | None = None

    def stream(self, handle: int = 0, number: int = 1, captures: bool = False) -> None:
        """Makes another stream torch's current one."""
        self.library.standin_stream(ctypes.c_void_p(handle), ctypes.c_ulonglong(number), int(captures))

    def plan(self, rows: int, numel: int, latents: int = 0, finishes: bool = False) -> dict[str, int]:
        """How ``plan.h`` cuts rows; ``latents`` is its ``Stored``, -1 for rows without any."""
        out = (ctypes.c_int64 * 7)()
        numbers = [ctypes.c_int64(number) for number in (rows, numel, latents, int(finishes))]
        self.library.standin_plan(*numbers, out)
        names = ("blocks", "threads", "shared_bytes", "splits", "elements", "slots", "scratch_bytes")
        return dict(zip(names, out))

    def read(self, tensor: Tensor, launch: int = -1) -> int:
        """Bytes that a launch read of an argument."""
        return self.launched[launch].read.get(tensor.data_ptr(), 0)

    def call(self, op: str, *arguments: Any) -> Any:
        """An operator on tensors of the CPU.

        Raises:
            Fault: what the emulator found wrong with a kernel. RuntimeError: what the operator refused.
        """
        self.launched, self.allocated, self._failure = [], [], None
        self._memory = dict(self._kept)
        for tensor in arguments:
            if isinstance(tensor, Tensor):
                self._memory[tensor.data_ptr()] = max(span(tensor), self._memory.get(tensor.data_ptr(), 0))
        try:
            found = getattr(torch.ops.flowdppo_cuda, op).default(*arguments)
        except RuntimeError:
            # a GPU would be lost
            self._clear()
            if self._failure is not None:
                raise self._failure from None
            raise
        assert self._clear(), "a launch left its tickets behind"
        return found

    def _clear(self) -> bool:
        """Makes kept memory as it has to be between calls; whether its tickets were."""
        clean = True
        for address, size in self._kept:
            clean &= not any(ctypes.string_at(address, _TICKET_BYTES))
            ctypes.memset(address, 0, _TICKET_BYTES)
            # nothing may be read that a call did not write
            ctypes.memset(address + _TICKET_BYTES, POISON, size - _TICKET_BYTES)
        return clean

    def __getattr__(self, name: str) -> Any:
        if name in ops.SCHEMAS:
            return functools.partial(self.call, name)
        raise AttributeError(name)

    def _on_allocation(self, what: bytes, address: int | None, size: int) -> None:
        self.allocated.append((what.decode(), address or 0, size))
        if what == b"cudaMalloc":
            self._kept.append((address or 0, size))
        self._memory[address or 0] = size

    def _on_launch(self, name: bytes, blocks: int, threads: int, shared: int, parameters: Any) -> int:
        try:
            program = _program(name.decode(), tuple(self.gpus.items()))
            if self.alter is not None:
                program = self.alter(program)
            kernel = program.kernel
            raw = bytearray(kernel.parameter_bytes)
            for i, parameter in enumerate(kernel.parameters):
                place = slice(parameter.offset, parameter.offset + parameter.bytes)
                raw[place] = ctypes.string_at(parameters[i], parameter.bytes)
            memory = {address: size for address, size in self._memory.items() if address and size}
            watch = _Watch(self.races, list(memory))
            machine = Machine(
                program,
                GlobalMemory(memory.items()),
                approximation=self.approximation,
                order=None if self.seed is None else np.random.default_rng(self.seed),
                resident=min(self.resident or _MOST_RESIDENT, _MOST_RESIDENT),
                races=watch,
            )
            machine.launch(blocks, threads, shared, bytes(raw))
            if watch.reports:
                raise Fault(f"{kernel.name}: {watch.reports[0]}")
            read = {int(start): int(size) for start, size in zip(watch.starts, watch.read)}
            self.launched.append(Launched(kernel.name, blocks, threads, shared, read))
            self.launches += 1
            self.counts[source_name(kernel.name)] += 1
            return 0
        except BaseException as error:
            self._failure = error
            self.library.standin_message(str(error).encode(errors="replace")[:900])
            return 1


def source_name(mangled: str) -> str:
    """A kernel's name as its source has it."""
    found = _KERNEL.search(mangled)
    if found is None:
        raise Fault(f"{mangled}: no name of a kernel")
    return found[1]


@functools.cache
def _program(mangled: str, gpus: tuple[tuple[str, str], ...]) -> Program:
    short = source_name(mangled)
    for source in sorted(KERNELS.glob("*.cu")):
        if f" {short}(" in source.read_text():
            kernels = _parsed(ptx_of(source, dict(gpus)[source.stem]))
            return Program(next(kernel for name, kernel in kernels.items() if source_name(name) == short))
    raise Fault(f"no source has a {short}")


@functools.cache
def _parsed(path: Path) -> dict[str, Kernel]:
    return parse(path.read_text())


_LAUNCH = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_char_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.POINTER(ctypes.c_void_p)
)
_ALLOCATED = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int64)


@functools.cache
def load() -> Cuda:
    """The operators, on one emulated GPU per process.

    Raises:
        FileNotFoundError: there is no nvcc. RuntimeError: it refuses the sources.
    """
    if nvcc() is None:
        raise FileNotFoundError("there is no CUDA compiler (nvcc; CUDA_HOME names a toolkit)")
    # global, as torch's own library is in which the binding looks for the current stream
    library = ctypes.CDLL(str(_library()), mode=ctypes.RTLD_GLOBAL)
    cuda = Cuda(library)
    cuda.callbacks = (_LAUNCH(cuda._on_launch), _ALLOCATED(cuda._on_allocation))
    library.standin_callbacks(*cuda.callbacks)
    return cuda


@contextlib.contextmanager
def serving(cuda: Cuda) -> Iterator[None]:
    """The public API's backend ``"cuda"`` serves tensors of the CPU."""
    operators = {op: functools.partial(cuda.call, op) for op in ops.SCHEMAS}

    def problem(name: str, device_type: str) -> str | None:
        return None if (name, device_type) == ("cuda", "cpu") else before(name, device_type)

    before = backend.problem
    with mock.patch.dict(backend._CUDA_OPERATORS, operators), mock.patch.object(backend, "problem", problem):
        yield
