"""The layer's controls from Python: seeds, buffers, faults, what was visited."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor


class Site(NamedTuple):
    """A call in a kernel at which threads meet or publish."""

    operation: str
    place: str
    visits: int

    @property
    def name(self) -> str:
        return f"{self.operation} {self.place}"


FAULTS = {
    "block_barrier": ("skip",),
    "cluster_barrier": ("skip",),
    "device_fence": ("skip",),
    "take_ticket": ("skip", "always_last"),
    "warp_shuffle_xor": ("wrong_lane", "missing_lane"),
}
# bytes around a copied buffer, in elements of no dtype: NaN in all of them
MARGIN = 256
POISON = 0xFF


def parse_sites(listing: str) -> list[Site]:
    sites = [line.split() for line in listing.splitlines()]
    return [Site(operation, place, int(visits)) for operation, place, visits in sites]


def span_of(tensor: Tensor) -> int:
    """Bytes from the first element to the end of the last one in memory."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    return 0 if tensor.numel() == 0 else (last + 1) * tensor.element_size()


class HostError(RuntimeError):
    """What the layer found wrong with a kernel."""


class Layer:
    """A library of kernels on the host layer."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        for name in ("host_error", "host_sites"):
            getattr(self.library, name).restype = ctypes.c_char_p
        for name in ("host_launches", "host_loaded"):
            getattr(self.library, name).restype = ctypes.c_int64
        self.library.host_loaded.argtypes = [ctypes.c_void_p]
        self.library.host_buffer.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_char]
        self.library.host_seed.argtypes = [ctypes.c_uint64]
        self.library.host_limits.argtypes = [ctypes.c_int64, ctypes.c_int]
        self._written: list[tuple[str, Tensor, int, int]] = []
        # the layer knows buffers by their addresses: none may be given to another tensor
        self._kept: list[Tensor] = []

    def reset(self) -> None:
        """Forgets errors, buffers and visits."""
        self._written.clear()
        self.library.host_reset()
        self._kept.clear()

    def seed(self, seed: int) -> None:
        """The order of threads and blocks from now on."""
        self.library.host_seed(seed)

    def plant(self, fault: str) -> None:
        """Breaks a call site: "operation file:line fault"; "" mends it."""
        assert self.library.host_fault(fault.encode()) == 0, f"not understood: {fault!r}"

    @property
    def launches(self) -> int:
        return self.library.host_launches()

    def sites(self) -> list[Site]:
        return parse_sites(self.library.host_sites().decode())

    def as_it_is(self, tensor: Tensor) -> Tensor:
        """``tensor`` itself, for kernels to read."""
        self.library.host_buffer(tensor.data_ptr(), span_of(tensor), b"r")
        return tensor

    def buffer(self, tensor: Tensor, access: str = "r", name: str = "buffer") -> Tensor:
        """A copy of ``tensor``, as it lies in memory, between margins of poison; ``access`` is "r", "w" or "x"."""
        size = span_of(tensor)
        lines = (size + 15) // 16 * 16
        # the same place between two multiples of 16 as before
        shift = tensor.data_ptr() % 16 if size else 0
        memory = torch.full((lines + 2 * MARGIN + 32,), POISON, dtype=torch.uint8)
        begin = MARGIN + (shift - memory.data_ptr() - MARGIN) % 16
        if size == 0:
            return tensor
        span = memory[begin : begin + size].view(tensor.dtype)
        span.copy_(tensor.detach().as_strided(span.shape, (1,)))
        view = span.as_strided(tensor.shape, tensor.stride())
        self.library.host_buffer(memory.data_ptr() + begin, size, access.encode())
        self._kept.append(memory)
        if access == "w":
            self._written.append((name, memory, begin, size))
        return view

    def loaded(self, tensor: Tensor) -> int:
        """Bytes of a buffer that 16-byte loads took."""
        return self.library.host_loaded(tensor.data_ptr())

    def check(self, code: int) -> None:
        """Raises what the layer has to say about a launch, or about bytes written beside a buffer."""
        if code != 0:
            raise HostError(self.library.host_error().decode())
        for name, memory, begin, size in self._written:
            outside = torch.cat((memory[:begin], memory[begin + size :]))
            if not bool((outside == POISON).all()):
                raise HostError(f"wrote beside {name}")
