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
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowdppo_fast import ops
from ptx.machine import Machine, Program
from ptx.memory import GlobalMemory
from ptx.numbers import Approximation
from ptx.parse import Fault, parse

ROOT = Path(__file__).parents[2]
KERNELS, BINDING = ROOT / "kernels" / "cuda", ROOT / "csrc" / "cuda" / "bindings.cpp"
STANDIN = Path(__file__).with_name("cuda_runtime.cpp")
CACHE = ROOT / "build" / "cuda_ptx"
GPUS = ("80", "90a", "100")
# what host objects are compiled beside
_DEFAULT_GPU = "90a"
_WRAPPED = (
    "aoti_torch_library_init_impl", "aoti_torch_library_def", "aoti_torch_get_device_type",
    "aoti_torch_get_device_index", "torch_call_dispatcher",
)  # fmt: skip
_KERNEL = re.compile(r"\d([a-z]+_kernel)E")
POISON = 0xFF
# counters in front of the scratch memory that a stream keeps: kKeptTickets in bindings.cpp
_TICKET_BYTES = 4096 * 4


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


def _made(name: str, suffix: str, sources: list[Path], command: list[str]) -> Path:
    """What nvcc makes of it, once per content; ``command`` ends with ``-o``."""
    out = CACHE / f"{name}.{_digest(sources, _version(), torch.__version__, *command)}{suffix}"
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(out.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not out.exists():
            made = out.with_name(f"{os.getpid()}.{out.name}")
            done = subprocess.run([str(nvcc()), *command, str(made)], capture_output=True, text=True, cwd=ROOT)
            if done.returncode != 0:
                raise RuntimeError(f"nvcc {' '.join(command)} failed:\n{done.stdout}{done.stderr}")
            made.rename(out)
    return out


def _headers() -> list[Path]:
    return sorted([*KERNELS.glob("*.h"), *KERNELS.glob("*.cuh"), *(ROOT / "csrc").glob("*.h")])


def ptx_of(source: Path, gpu: str) -> Path:
    """What the library has of ``source`` for one GPU, such as ``"90a"``, before ptxas."""
    flags = [flag for flag in _setup_constant("NVCC_FLAGS") if not flag.startswith("-X")]
    return _made(
        source.stem, ".ptx", [source, *_headers()],
        [*flags, f"-arch=compute_{gpu}", "-ptx", str(source.relative_to(ROOT)), "-o"],
    )  # fmt: skip


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
    # the host's half of the kernels; the other one is not looked at
    device = [f"-gencode=arch=compute_{_DEFAULT_GPU},code=compute_{_DEFAULT_GPU}", *_setup_constant("NVCC_FLAGS")]
    objects += [
        _made(path.stem, ".o", [path, *_headers()], [*device, "-c", str(path.relative_to(ROOT)), "-o"])
        for path in sorted(KERNELS.glob("*.cu"))
    ]
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


class _Reads:
    """Counts what is read of each allocation; has the methods by which a machine tells a race checker."""

    def __init__(self, starts: list[int]) -> None:
        self.starts = np.array(sorted(starts), np.uint64)
        self.bytes = np.zeros(len(starts), np.int64)

    def begin(self, grid: int, threads: int) -> None: ...
    def begin_blocks(self, blocks: Any, shared_bytes: int) -> None: ...
    def shared_access(self, machine: Any, lanes: Any, places: Any, size: int, write: bool) -> None: ...
    def block_barrier(self, blocks: Any) -> None: ...

    def global_access(self, machine: Any, lanes: Any, addresses: Any, size: int, write: bool) -> None:
        if not write:
            found = np.searchsorted(self.starts, addresses, "right") - 1
            np.add.at(self.bytes, found, size)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *_, **__: None


@dataclass
class Cuda:
    """The operators of ``flowdppo_cuda``, with the names and arguments of ``reference.py``.

    Args:
        gpu: whose PTX runs, one of :data:`GPUS`.
        approximation: see :class:`ptx.numbers.Approximation`.
        seed: the order of blocks and arrivals; None is the natural one.
        resident: blocks that run at a time.
        watch: makes the race checker of a launch; None has what is read counted.
        edit: what is done to the PTX before it runs.
        launched: the launches since the last call of an operator began, and ``launches`` how many there were ever.
        allocated: (what, address, bytes) of the memory that the last call asked for.
    """

    library: ctypes.CDLL
    gpu: str = _DEFAULT_GPU
    approximation: Approximation = Approximation.VARIED
    seed: int | None = None
    resident: int | None = None
    watch: Any = None
    edit: Any = None
    launched: list[Launched] = field(default_factory=list)
    launches: int = 0
    allocated: list[tuple[str, int, int]] = field(default_factory=list)
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
            if self._failure is not None:
                raise self._failure from None
            raise
        for address, size in self._kept:
            tickets = np.frombuffer(ctypes.string_at(address, _TICKET_BYTES), np.uint32)
            assert not tickets.any(), "a launch left its tickets behind"
            # nothing may be read that this call did not write
            ctypes.memset(address + _TICKET_BYTES, POISON, size - _TICKET_BYTES)
        return found

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
            program = _program(name.decode(), self.gpu, self.edit)
            kernel = program.kernel
            raw = bytearray(kernel.parameter_bytes)
            for i, parameter in enumerate(kernel.parameters):
                place = slice(parameter.offset, parameter.offset + parameter.bytes)
                raw[place] = ctypes.string_at(parameters[i], parameter.bytes)
            memory = {address: size for address, size in self._memory.items() if address and size}
            reads = _Reads(list(memory))
            machine = Machine(
                program,
                GlobalMemory(memory.items()),
                approximation=self.approximation,
                order=None if self.seed is None else np.random.default_rng(self.seed),
                resident=self.resident,
                races=reads if self.watch is None else self.watch(),
            )
            machine.launch(blocks, threads, shared, bytes(raw))
            read = {int(start): int(size) for start, size in zip(reads.starts, reads.bytes)}
            self.launched.append(Launched(kernel.name, blocks, threads, shared, read))
            self.launches += 1
            return 0
        except BaseException as error:
            self._failure = error
            self.library.standin_message(str(error).encode(errors="replace")[:900])
            return 1


@functools.lru_cache(maxsize=64)
def _program(mangled: str, gpu: str, edit: Any) -> Program:
    found = _KERNEL.search(mangled)
    if found is None:
        raise Fault(f"{mangled}: no name of a kernel")
    for source in sorted(KERNELS.glob("*.cu")):
        if f" {found[1]}(" in source.read_text():
            text = ptx_of(source, gpu).read_text()
            (kernel,) = (k for name, k in _parsed(edit(text) if edit else text).items() if found[1] in name)
            return Program(kernel)
    raise Fault(f"no source has a {found[1]}")


@functools.lru_cache(maxsize=16)
def _parsed(text: str) -> dict[str, Any]:
    return parse(text)


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
def settings(cuda: Cuda, **values: Any) -> Iterator[None]:
    """Attributes of ``cuda`` for a while."""
    before = {name: getattr(cuda, name) for name in values}
    for name, value in values.items():
        setattr(cuda, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(cuda, name, value)
