"""Triton without a GPU: everything of Triton runs, its compiled C launcher included; only the driver library does not.

:func:`install` puts a stand-in for ``libcuda.so.1`` under Triton's CUDA driver and makes it the active one, for the
whole process, in which Triton must not have been imported for interpretation. Tensors are on the CPU. A launch runs the
PTX that Triton compiled on :class:`ptx.machine.Machine`; with ``mode="drop"`` it ends in the driver library, which is
what the host's share of a launch costs.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaDriver, CudaLauncher

from flowdppo_fast import backend
from ptx.machine import Machine, Program
from ptx.memory import GlobalMemory
from ptx.numbers import Approximation
from ptx.parse import Fault, parse

_SOURCE = Path(__file__).with_name("libcuda.c")
# the most that a block may ask for
_SHARED_LIMIT = {80: 166912, 86: 101376, 89: 101376, 120: 101376}
_folder = tempfile.TemporaryDirectory(prefix="flowdppo-libcuda-")


class _Launch(ctypes.Structure):
    _fields_ = (
        ("function", ctypes.c_uint64),
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("shared", ctypes.c_uint32),
        ("cluster", ctypes.c_uint32),
        ("programmatic", ctypes.c_uint32),
        ("parameters", ctypes.POINTER(ctypes.c_void_p)),
    )


_Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(_Launch))


class Launched(NamedTuple):
    """What one launch was and took."""

    kernel: str
    grid: int
    threads: int
    instructions: int
    seconds: float


@dataclass
class Emulator:
    """How launches run; all of it may be changed between them.

    Args:
        approximation: see :class:`ptx.numbers.Approximation`.
        order: shuffles blocks and arrivals, see :class:`ptx.machine.Machine`.
        resident: blocks that run at a time.
        log: the launches so far.
    """

    arch: int = 90
    approximation: Approximation = Approximation.VARIED
    order: np.random.Generator | None = None
    resident: int | None = None
    log: list[Launched] = field(default_factory=list)
    memory: GlobalMemory = field(default_factory=GlobalMemory)
    _programs: dict[int, Program] = field(default_factory=dict)
    _texts: list[tuple[str, str]] = field(default_factory=list)
    failure: BaseException | None = None
    callback: Any = None

    def load(self, name: str, text: str) -> int:
        """Number of a function; numbers start at 1, because 0 is no function."""
        self._texts.append((name, text))
        return len(self._texts)

    def program(self, number: int) -> Program:
        if number not in self._programs:
            name, text = self._texts[number - 1]
            self._programs[number] = Program(parse(text)[name])
        return self._programs[number]

    def run(self, launch: _Launch) -> None:
        program = self.program(launch.function)
        kernel = program.kernel
        if any(size != 1 for size in (*launch.grid[1:], *launch.block[1:])):
            raise Fault(f"{kernel.name}: a grid of more than one dimension")
        parameters = bytearray(kernel.parameter_bytes)
        for i, parameter in enumerate(kernel.parameters):
            place = slice(parameter.offset, parameter.offset + parameter.bytes)
            parameters[place] = ctypes.string_at(launch.parameters[i], parameter.bytes)
        machine = Machine(
            program, self.memory, approximation=self.approximation, order=self.order, resident=self.resident
        )
        start = time.perf_counter()
        machine.launch(launch.grid[0], launch.block[0], launch.shared, bytes(parameters), launch.cluster)
        seconds = time.perf_counter() - start
        self.log.append(Launched(kernel.name, launch.grid[0], launch.block[0], machine.steps, seconds))


def span(tensor: torch.Tensor) -> int:
    """Bytes from a tensor's first element to the end of its last one in memory."""
    if tensor.numel() == 0:
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    return (last + 1) * tensor.element_size()


def _build_library() -> ctypes.CDLL:
    """The stand-in, loaded under the name by which Triton links and opens NVIDIA's."""
    path = Path(_folder.name, "libcuda.so.1")
    include = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    command = [os.environ.get("CC", "cc"), "-O1", "-shared", "-fPIC", f"-I{include}", "-Wl,-soname,libcuda.so.1"]
    subprocess.run([*command, str(_SOURCE), "-o", str(path)], check=True)
    knobs.nvidia.libcuda_path = _folder.name
    return ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)


def install(arch: int = 90, *, mode: str = "emulate") -> Emulator:
    """Makes an emulated GPU of compute capability ``arch`` (90 is 9.0) Triton's active device.

    Args:
        mode: ``"emulate"`` runs kernels, ``"drop"`` drops launches.

    Raises:
        RuntimeError: Triton interprets in this process. CalledProcessError: no C compiler.
    """
    if mode not in ("emulate", "drop"):
        raise ValueError(f"mode: got {mode!r}, expected 'emulate' or 'drop'")
    if knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET=1: kernels are interpreted in this process, not compiled")
    library = _build_library()
    library.standin_next_function.argtypes = [ctypes.c_uint64]
    library.standin_shared_limit(_SHARED_LIMIT.get(arch, 232448))
    emulator = Emulator(arch)

    def run(launch: Any) -> int:
        try:
            emulator.run(launch.contents)
        except BaseException as error:
            emulator.failure = error
            library.standin_message(str(error).encode(errors="replace")[:880])
            return 1
        return 0

    def load(module: Any, function: Any, name: str, files: dict[str, str], hash: str) -> None:
        (path,) = (path for file, path in files.items() if file.endswith(".ptx"))
        library.standin_next_function(emulator.load(name, Path(path).read_text()))

    class Launcher(CudaLauncher):
        """Triton's launcher, which is told on the way which memory a kernel is given."""

        def __call__(self, *args: Any) -> None:
            emulator.memory = GlobalMemory((x.data_ptr(), span(x)) for x in args if isinstance(x, torch.Tensor))
            try:
                super().__call__(*args)
            except RuntimeError as error:
                failure, emulator.failure = emulator.failure, None
                raise failure or error from None

    class Driver(CudaDriver):
        """Triton's driver on a machine whose torch knows no GPU."""

        def __init__(self) -> None:
            super().__init__()
            self.get_device_capability = lambda device=None: divmod(arch, 10)
            self.get_current_stream = lambda device=None: 0
            self.get_current_device = lambda: 0
            if mode == "emulate":
                self.launcher_cls = Launcher

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cpu")

    # called right before a binary is loaded
    knobs.runtime.kernel_load_start_hook.add(load)
    triton.runtime.driver.set_active(Driver())
    assert triton.runtime.driver.active.get_current_target() == GPUTarget("cuda", arch, 32)
    if mode == "emulate":
        emulator.callback = _Callback(run)
        library.standin_callback(emulator.callback)
    # the backend serves tensors of a GPU, and those of the CPU where kernels are interpreted
    backend.triton_interpreted = lambda: True
    return emulator
