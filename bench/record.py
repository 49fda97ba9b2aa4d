"""Records launches for ``bench/replay.py``: ``python -m bench.record BACKEND FOLDER --arch 90``, without a GPU.

The backend's kernels run on the emulator of ``tests/ptx``, on small ragged and small aligned latents, in every form.
For each launch the folder gets its machine code, its parameters, and what its buffers held before it.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import triton

from bench.first_light import BACKENDS, emulated


class Recorder:
    """Watches the emulator's launches."""

    def __init__(self, folder: Path, arch: str, assembler: list[str]) -> None:
        self.folder, self.arch, self.assembler = folder, arch, assembler
        self.records: list[dict[str, Any]] = []
        self._code: dict[str, str] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def __call__(self, machine: Any, shared_bytes: int, parameters: bytes) -> None:
        number, kernel = len(self.records), machine.kernel
        allocations = machine.memory.allocations()
        names = [f"{number:03}-{i}.bin" for i in range(len(allocations))]
        for name, (address, size) in zip(names, allocations):
            (self.folder / name).write_bytes(ctypes.string_at(address, size))
        pointers = []
        for place in range(0, len(parameters) - 7, 8):
            word = int.from_bytes(parameters[place : place + 8], "little")
            inside = [i for i, (address, size) in enumerate(allocations) if address <= word < address + size]
            pointers += [[place, i, word - allocations[i][0]] for i in inside]
        self.records.append(
            {
                "kernel": kernel.name,
                "code": self.compiled(kernel.text),
                "grid": machine.grid,
                "threads": machine.threads,
                "shared_bytes": shared_bytes,
                "parameters": parameters.hex(),
                "offsets": [parameter.offset for parameter in kernel.parameters],
                "pointers": pointers,
                "buffers": names,
            }
        )

    def compiled(self, text: str) -> str:
        """File with the machine code of a PTX text."""
        if text not in self._code:
            source, name = self.folder / "kernel.ptx", f"{len(self._code):03}.cubin"
            source.write_text(text)
            command = [*self.assembler, f"-arch=sm_{self.arch}", str(source), "-o", str(self.folder / name)]
            subprocess.run(command, check=True)
            self._code[text] = name
        return self._code[text]


def assembler(backend: str) -> list[str]:
    """The command that makes machine code of a backend's PTX: each compiler's own knows its version of PTX."""
    if backend == "triton":
        return [str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas")]
    from ptx import cuda_runtime

    return [str(cuda_runtime.nvcc()), "-cubin"]


def calls(backend: str) -> None:
    """Every form of the library once on ragged rows and once on aligned ones."""
    import flowdppo_fast as fast

    step = fast.SDEStep.from_sigmas("flow_sde", 0.7, 0.6)
    guard, seeded = fast.GRPOGuard(0.01, 0.01, bias="batch"), fast.PhiloxNoise(7, 3)
    for shape, dtype in (((3, 1031), torch.bfloat16), ((2, 4096), torch.float32)):
        new, old, noise, reference = (torch.randn(shape).to(dtype) for _ in range(4))
        advantages = torch.randn(shape[0])
        for objective, source, options in (
            (fast.DPPO(1e-3), noise, {}),
            (guard, seeded, {"reference_velocity": reference, "kl_weight": 0.1}),
            (fast.DPPO(1e-3), seeded, {"single_pass": True}),
        ):
            leaf = new if options.get("single_pass") else new.clone().requires_grad_()
            out = fast.fused_policy_velocity_loss(
                leaf, old, source, step, advantages, objective=objective, backend=backend, **options
            )
            if leaf.requires_grad:
                out.loss.backward()
        fast.row_statistics(new, old, noise, step, backend=backend)
        fast.sde_step(new, old, step, noise=seeded, return_mean=True, log_prob="gaussian", backend=backend)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.record", description=__doc__.splitlines()[0])
    parser.add_argument("backend", choices=BACKENDS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--arch", default="90a", help="what ptxas compiles for, such as 80, 90a or 100a")
    options = parser.parse_args(arguments)
    recorder = Recorder(options.folder, options.arch, assembler(options.backend))
    with emulated(options.backend, int(options.arch.rstrip("a"))):
        from ptx import machine

        machine.WATCHERS.append(recorder)
        calls(options.backend)
        machine.WATCHERS.remove(recorder)
    (options.folder / "kernel.ptx").unlink(missing_ok=True)
    (options.folder / "launches.json").write_text(json.dumps(recorder.records) + "\n")
    print(f"{len(recorder.records)} launches of {options.backend} recorded")
    return 0


if __name__ == "__main__":
    sys.exit(main())
