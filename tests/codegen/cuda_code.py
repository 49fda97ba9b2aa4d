"""What the built CUDA library consists of: every kernel for every GPU, from its machine code; no GPU, no driver.

``python tests/codegen/cuda_code.py`` prints the tables of docs/cuda.md, ``--json`` one object per kernel and GPU;
``--arch sm_90a`` picks GPUs. It uses cuobjdump and nvdisasm of the Triton wheel on ``flowdppo_fast/_C_cuda.so``.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from aot import _BRANCH, EXIT_TOOLS_MISSING, ToolsMissing, _bytes_in_flight, _opcodes, _tool

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = ROOT / "flowdppo_fast" / "_C_cuda.so"
KERNELS = ("forward", "given", "gradient", "step")
_STREAMING = ("forward", "gradient", "step")
_KERNEL = re.compile(r"\d([a-z]+)_kernelE")


@dataclasses.dataclass(frozen=True)
class Loop:
    """The loop over pairs of groups of one version of a kernel.

    ``in_flight`` counts the bytes that a thread has asked for before it first waits; ``wide_loads`` and ``stores`` are
    instructions of 16 bytes.
    """

    latents: str
    noise: str
    reference: bool
    instructions: int
    wide_loads: int
    wide_stores: int
    in_flight: int

    @property
    def name(self) -> str:
        form = self.latents if self.noise == self.latents else f"{self.latents}, {self.noise}"
        return f"{form.replace(', fp32', ', fp32 noise')}{' + reference' if self.reference else ''}"

    @property
    def elements(self) -> int:
        """Of a pair of groups: ``group_of`` in plan.h."""
        return 2 * (4 if self.latents == "fp32" else 8)

    @property
    def per_element(self) -> float:
        return round(self.instructions / self.elements, 1)


@dataclasses.dataclass(frozen=True)
class Report:
    """One kernel on one GPU, and its streaming loops."""

    kernel: str
    arch: str
    registers: int
    stack: int
    local: int
    spills: int
    instructions: int
    loops: tuple[Loop, ...]


def source_digest() -> str:
    """Of everything the library is compiled from; the build notes it down as ``cuda_sources``."""
    digest = hashlib.sha256()
    for folder, pattern in (("csrc", "*.h"), ("csrc/cuda", "*"), ("kernels/cuda", "*")):
        for path in sorted((ROOT / folder).glob(pattern)):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def is_current() -> bool:
    """Whether there is a library and it was built from the sources beside it."""
    info = LIBRARY.with_name("_build_info.json")
    if not (LIBRARY.exists() and info.exists()):
        return False
    return json.loads(info.read_text()).get("cuda_sources") == source_digest()


def _functions(disassembly: str) -> Iterator[tuple[str, list[str]]]:
    for part in re.split(r"^\.text\.", disassembly, flags=re.MULTILINE)[1:]:
        name, _, body = part.partition(":")
        yield name, body.splitlines()


def _loop(lines: list[str]) -> Loop | None:
    """What a stretch of code is that loads in 16-byte pieces and is repeated; None if it loads nothing so."""
    opcodes = _opcodes(lines)

    def wide(prefix: str) -> int:
        return sum(opcode.startswith(prefix) and ".128" in opcode for opcode in opcodes)

    if not wide("LDG."):
        return None
    # a piece of 16 bits has eight elements: fp16 is converted one by one, bf16 has its upper halves cut out
    halves = sum(opcode.startswith("HADD2.F32") for opcode in opcodes) // 8
    cuts = sum("0xffff0000" in line for line in lines) // 4
    latents = "fp16" if halves else "bf16" if cuts else "fp32"
    narrow, pieces = (halves or cuts) // 2, wide("LDG.") // 2
    seeded = any(opcode.startswith("MUFU.LG2") for opcode in opcodes)
    if latents == "fp32":
        noise, operands = "seeded" if seeded else "fp32", pieces - (not seeded)
    else:
        # float32 noise takes two pieces
        noise, operands = (
            ("seeded", narrow) if seeded else ("fp32", narrow) if pieces > narrow else (latents, narrow - 1)
        )
    return Loop(latents, noise, operands == 3, len(opcodes), wide("LDG."), wide("STG."), _bytes_in_flight(lines))


def _loops(lines: list[str]) -> tuple[Loop, ...]:
    """Those of all versions, in a fixed order; the innermost are what is repeated by a backward branch."""
    labels: dict[str, int] = {}
    found = []
    for index, line in enumerate(lines):
        label = re.match(r"^(\.L_x_\d+):", line)
        if label:
            labels[label[1]] = index
        branch = _BRANCH.search(line)
        if branch and branch[1] in labels:
            found.append(_loop(lines[labels[branch[1]] : index + 1]))
    return tuple(sorted((one for one in found if one), key=lambda one: (one.latents, one.noise, one.reference)))


def inspect(library: Path, arch: str) -> list[Report]:
    """Every kernel of the library for one GPU, such as ``"sm_90a"``.

    Raises:
        ToolsMissing: no Triton wheel with its binary tools. RuntimeError: the library has no code for that GPU.
    """
    cuobjdump, nvdisasm = _tool("cuobjdump"), _tool("nvdisasm")
    found = []
    with tempfile.TemporaryDirectory() as folder:

        def run(*command: str) -> str:
            return subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder).stdout

        run(cuobjdump, "-xelf", arch, str(library))
        for cubin in sorted(Path(folder).glob(f"*.{arch}.cubin")):
            usage = run(cuobjdump, "-res-usage", str(cubin))
            resources = {
                name: {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", line)}
                for name, line in re.findall(r"Function (\S+):\n(.*)", usage)
            }
            for mangled, lines in _functions(run(nvdisasm, "-c", str(cubin))):
                name = _KERNEL.search(mangled)
                if name is None or name[1] not in KERNELS:
                    raise RuntimeError(f"{mangled}: got an unknown kernel, expected one of {', '.join(KERNELS)}")
                opcodes = _opcodes(lines)
                found.append(
                    Report(
                        kernel=name[1],
                        arch=arch,
                        registers=resources[mangled]["REG"],
                        stack=resources[mangled]["STACK"],
                        local=resources[mangled]["LOCAL"],
                        spills=sum(opcode.startswith(("STL", "LDL")) for opcode in opcodes),
                        instructions=len(opcodes),
                        loops=_loops(lines),
                    )
                )
    if not found:
        raise RuntimeError(f"{library.name}: got no code for {arch}, expected kernels; was it built for other GPUs?")
    return sorted(found, key=lambda report: KERNELS.index(report.kernel))


def architectures(library: Path) -> list[str]:
    """The GPUs that the library has machine code for, oldest first."""
    listed = subprocess.run([_tool("cuobjdump"), "-lelf", str(library)], capture_output=True, text=True, check=True)
    found = set(re.findall(r"\.(sm_\d+a?)\.cubin", listed.stdout))
    return sorted(found, key=lambda name: int(re.sub(r"\D", "", name)))


def summary(rows: Iterable[Report]) -> str:
    """The Markdown tables of docs/cuda.md: kernels, and their loops over all GPUs."""
    rows = list(rows)
    archs = list(dict.fromkeys(r.arch for r in rows))

    def span(values: Iterable[float]) -> str:
        found = sorted(set(values))
        return f"{found[0]:g}" if len(found) == 1 else f"{found[0]:g} to {found[-1]:g}"

    lines = [
        f"| kernel | registers: {' | '.join(archs)} | stack, spills | instructions |",
        "|---|" + "---|" * (len(archs) + 2),
    ]
    for kernel in KERNELS:
        members = [r for r in rows if r.kernel == kernel]
        registers = [span(r.registers for r in members if r.arch == arch) for arch in archs]
        frames, spills = max(r.stack + r.local for r in members), max(r.spills for r in members)
        lines.append(
            f"| {kernel} | {' | '.join(registers)} | {frames}, {spills} | {span(r.instructions for r in members)} |"
        )
    lines += [
        "",
        f"| loop | 16-byte loads per element | instructions per element: {' | '.join(_STREAMING)} |",
        "|---|---|" + "---|" * len(_STREAMING),
    ]
    loops = [(r.kernel, loop) for r in rows for loop in r.loops]
    for name in dict.fromkeys(loop.name for _, loop in loops):
        members = [(kernel, loop) for kernel, loop in loops if loop.name == name]
        costs = [[loop.per_element for kernel, loop in members if kernel == one] for one in _STREAMING]
        loads = span(loop.wide_loads / loop.elements for _, loop in members)
        lines.append(f"| {name} | {loads} | {' | '.join(span(cost) if cost else '' for cost in costs)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", action="append", metavar="SM", help="such as sm_90a; default: all in the library")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--is-current", action="store_true", help="only say whether the library is from these sources")
    options = parser.parse_args()
    if options.is_current:
        current = is_current()
        print(f"{LIBRARY.name} was {'' if current else 'not '}built from these sources")
        sys.exit(0 if current else 1)
    try:
        if not LIBRARY.exists():
            raise ToolsMissing(f"{LIBRARY.name} is not built; FLOWDPPO_BUILD_CUDA=1 turns that into an error")
        found = [report for arch in options.arch or architectures(LIBRARY) for report in inspect(LIBRARY, arch)]
    except ToolsMissing as error:
        print(error, file=sys.stderr)
        sys.exit(EXIT_TOOLS_MISSING)
    if options.json:
        print(json.dumps([dataclasses.asdict(report) for report in found]))
    else:
        print(summary(found))


if __name__ == "__main__":
    main()
