"""Launches what ``bench.record`` has recorded, on a GPU, with nothing around it that takes time under a sanitizer.

``python bench/replay.py FOLDER`` needs NVIDIA's driver library and no package. Every buffer is an allocation of its
own, of exactly its size. The first error of the driver ends it.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from pathlib import Path


class Driver:
    """The few calls of the driver that a launch takes."""

    def __init__(self, library: str) -> None:
        self._library = ctypes.CDLL(library)
        self.call("cuInit", 0)
        device, self._context = ctypes.c_int(), ctypes.c_void_p()
        self.call("cuDeviceGet", ctypes.byref(device), 0)
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), device)
        self.call("cuCtxSetCurrent", self._context)

    def call(self, name: str, *arguments: object) -> None:
        """One call; the header's macros give some functions other names in the library."""
        for exact in (f"{name}_v2", name):
            if hasattr(self._library, exact):
                code = getattr(self._library, exact)(*arguments)
                if code != 0:
                    text = ctypes.c_char_p()
                    self._library.cuGetErrorString(code, ctypes.byref(text))
                    raise RuntimeError(f"{name}: error {code}, {(text.value or b'unknown').decode()}")
                return
        raise RuntimeError(f"{name}: the driver library has no such function")

    def buffer(self, data: bytes) -> ctypes.c_uint64:
        pointer = ctypes.c_uint64()
        self.call("cuMemAlloc", ctypes.byref(pointer), ctypes.c_size_t(len(data)))
        self.call("cuMemcpyHtoD", pointer, data, ctypes.c_size_t(len(data)))
        return pointer

    def launch(self, folder: Path, record: dict) -> None:
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        self.call("cuModuleLoadData", ctypes.byref(module), (folder / record["code"]).read_bytes())
        self.call("cuModuleGetFunction", ctypes.byref(function), module, record["kernel"].encode())
        buffers = [self.buffer((folder / name).read_bytes()) for name in record["buffers"]]
        parameters = bytearray.fromhex(record["parameters"])
        for place, buffer, offset in record["pointers"]:
            address = buffers[buffer].value + offset
            parameters[place : place + 8] = address.to_bytes(8, "little")
        held = ctypes.create_string_buffer(bytes(parameters), len(parameters))
        start = ctypes.addressof(held)
        places = (ctypes.c_void_p * len(record["offsets"]))(*(start + offset for offset in record["offsets"]))
        self.call(
            "cuLaunchKernel", function, record["grid"], 1, 1, record["threads"], 1, 1, record["shared_bytes"], None,
            places, None,
        )  # fmt: skip
        self.call("cuCtxSynchronize")
        for buffer in buffers:
            self.call("cuMemFree", buffer)


def main() -> int:
    if len(sys.argv) != 2:
        print("usage: python bench/replay.py FOLDER", file=sys.stderr)
        return 2
    folder = Path(sys.argv[1])
    records = json.loads((folder / "launches.json").read_text())
    driver = Driver(os.environ.get("FLOWDPPO_LIBCUDA", "libcuda.so.1"))
    for record in records:
        driver.launch(folder, record)
    print(f"{len(records)} launches of {len({record['kernel'] for record in records})} kernels")
    return 0 if records else 1


if __name__ == "__main__":
    sys.exit(main())
