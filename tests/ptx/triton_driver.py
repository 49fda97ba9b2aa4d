"""Triton without a GPU: everything of Triton runs, its compiled C launcher included; only the driver library does not.

:func:`install` puts a stand-in for ``libcuda.so.1`` under Triton's CUDA driver and makes it the active one, for the
whole process, in which Triton must not have been imported for interpretation. Tensors are on the CPU. A launch runs the
PTX that Triton compiled on :class:`ptx.machine.Machine`; with ``mode="drop"`` it ends in the driver library, which
leaves the host's share of it. Each architecture is a device of its own to Triton, so that one process can have several.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
from triton import knobs
from triton.backends.nvidia.driver import CudaDriver, CudaLauncher

from flowdppo_fast import backend
from ptx.contract import contract
from ptx.machine import Machine, Program
from ptx.memory import GlobalMemory
from ptx.numbers import Approximation
from ptx.parse import Fault, parse
from ptx.races import RaceChecker

_SOURCE = Path(__file__).with_name("libcuda.c")
# what C holds a pointer to
_alive: list[Any] = []
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
    arch: int
    grid: int
    threads: int
    programmatic: bool
    instructions: int
    seconds: float


class _Function(NamedTuple):
    name: str
    text: str
    may_contract: bool


@dataclass
class Settings:
    """How launches run.

    Args:
        arch: compute capability of the device, 90 for 9.0.
        approximation: see :class:`ptx.numbers.Approximation`.
        contraction: whether products and sums are fused where ptxas may do so.
        order: shuffles blocks and arrivals, see :class:`ptx.machine.Machine`.
        resident: blocks that run at a time; None is all.
        races: whether races are looked for.
        edit: changes the PTX of a kernel, given its name and text, before it runs.
    """

    arch: int = 90
    approximation: Approximation = Approximation.VARIED
    contraction: bool = False
    order: np.random.Generator | None = None
    resident: int | None = None
    races: bool = False
    edit: Callable[[str, str], str] | None = None


class Emulator:
    """What :func:`install` leaves to look at: ``settings`` for the next launches, ``log`` and ``races`` of the last."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.log: list[Launched] = []
        self.races: list[str] = []
        self.memory = GlobalMemory()
        self.failure: BaseException | None = None
        # what the last launch wrote
        self._written: list[tuple[int, int]] = []
        self._functions: list[_Function] = []
        self._programs: dict[tuple[int, bool, Any], Program] = {}

    def load(self, name: str, text: str, may_contract: bool) -> int:
        """Number of a function; 0 is none."""
        self._functions.append(_Function(name, text, may_contract))
        return len(self._functions)

    def _program(self, number: int) -> Program:
        function, edit = self._functions[number - 1], self.settings.edit
        contracted = self.settings.contraction and function.may_contract
        key = (number, contracted, edit)
        if key not in self._programs:
            text = edit(function.name, function.text) if edit else function.text
            kernel = parse(text)[function.name]
            self._programs[key] = Program(contract(kernel) if contracted else kernel)
        return self._programs[key]

    def run(self, launch: _Launch) -> None:
        program, settings = self._program(launch.function), self.settings
        kernel = program.kernel
        if any(size != 1 for size in (*launch.grid[1:], *launch.block[1:], launch.cluster)):
            raise Fault(f"{kernel.name}: a grid of more than one dimension, or clusters")
        parameters = bytearray(kernel.parameter_bytes)
        for i, parameter in enumerate(kernel.parameters):
            place = slice(parameter.offset, parameter.offset + parameter.bytes)
            parameters[place] = ctypes.string_at(launch.parameters[i], parameter.bytes)
        races = RaceChecker() if settings.races else None
        machine = Machine(
            program,
            self.memory,
            approximation=settings.approximation,
            order=settings.order,
            resident=settings.resident,
            races=races,
            ahead=self._written if launch.programmatic else None,
        )
        start = time.perf_counter()
        machine.launch(launch.grid[0], launch.block[0], launch.shared, bytes(parameters))
        seconds = time.perf_counter() - start
        self._written = self.memory.written()
        if races:
            self.races += [f"{kernel.name} (sm_{settings.arch}): {report}" for report in races.reports]
        self.log.append(
            Launched(
                kernel=kernel.name,
                arch=settings.arch,
                grid=launch.grid[0],
                threads=launch.block[0],
                programmatic=bool(launch.programmatic),
                instructions=machine.steps,
                seconds=seconds,
            )
        )


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
    """Makes an emulated GPU of compute capability ``arch`` Triton's active device; later ``settings.arch`` is another.

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
    emulator = Emulator(Settings(arch))

    def run(launch: Any) -> int:
        try:
            emulator.run(launch.contents)
        except BaseException as error:
            emulator.failure = error
            library.standin_message(str(error).encode(errors="replace")[:880])
            return 1
        return 0

    def load(module: Any, function: Any, name: str, files: dict[str, str], hash: str) -> None:
        paths = {Path(file).suffix: Path(path) for file, path in files.items()}
        fuses = json.loads(paths[".json"].read_text())["enable_fp_fusion"]
        library.standin_next_function(emulator.load(name, paths[".ptx"].read_text(), fuses))

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
            self.get_device_capability = lambda device=None: divmod(emulator.settings.arch, 10)
            self.get_current_stream = lambda device=None: 0
            self.get_current_device = lambda: emulator.settings.arch
            if mode == "emulate":
                self.launcher_cls = Launcher

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cpu")

    # called right before a binary is loaded
    knobs.runtime.kernel_load_start_hook.add(load)
    triton.runtime.driver.set_active(Driver())
    if mode == "emulate":
        callback = _Callback(run)
        _alive.append(callback)
        library.standin_callback(callback)
    # the backend serves tensors of a GPU, and those of the CPU where kernels are interpreted
    backend.triton_interpreted = lambda: True
    return emulator
