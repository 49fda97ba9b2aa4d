"""What the built CUDA library consists of: every kernel for every GPU, from its machine code; no GPU, no driver.

``python tests/codegen/cuda_code.py`` prints a table, ``--json`` one object per kernel and GPU, ``--summary`` the short
table of docs/cuda.md; ``--arch sm_90a`` picks GPUs. It uses cuobjdump and nvdisasm of the Triton wheel on
``flowdppo_fast/_C_cuda.so``.
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
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from aot import _BRANCH, EXIT_TOOLS_MISSING, ToolsMissing, _bytes_in_flight, _opcodes, _tool

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = ROOT / "flowdppo_fast" / "_C_cuda.so"
# the order of Stored in plan.h
STORED = ("fp32", "bf16", "fp16", "any", "seeded")
KERNELS = ("forward", "gradient", "step", "holding", "log_prob")
_MANGLED = re.compile(r"\d+([a-z]+)_kernelI(.*?)EEv")
# the one without versions, on rows alone
_ON_ROWS = "15log_prob_kernel"


@dataclasses.dataclass(frozen=True)
class Report:
    """One kernel on one GPU; ``latents`` and ``noise`` are empty for the one on rows alone.

    ``loads`` and ``stores`` count instructions on global memory by bits, ``copies`` those that go straight to shared
    memory. Of the streaming loop (the pair of groups): ``per_element`` instructions, and ``in_flight`` bytes that a
    thread has asked for before it first waits; None where nothing is streamed.
    """

    kernel: str
    latents: str
    noise: str
    reference: bool
    arch: str
    registers: int
    stack: int
    local: int
    spills: int
    instructions: int
    loads: dict[str, int]
    stores: dict[str, int]
    copies: int
    per_element: float | None
    in_flight: int | None

    @property
    def name(self) -> str:
        if not self.latents:
            return self.kernel
        form = self.latents if self.noise == self.latents else f"{self.latents}, {self.noise}"
        form = form.replace(", fp32", ", fp32 noise")
        return f"{self.kernel} {form}{' + reference' if self.reference else ''}"

    @property
    def group(self) -> int:
        """Elements that a thread takes side by side: ``group_of`` in plan.h."""
        return 4 if self.latents == "fp32" else 8


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


def _version(mangled: str) -> tuple[str, str, str, bool]:
    """Kernel, dtypes of latents and noise, and whether there is a reference, from a mangled name."""
    if _ON_ROWS in mangled:
        return "log_prob", "", "", False
    found = _MANGLED.search(mangled)
    if found is None or found[1] not in KERNELS:
        raise RuntimeError(f"{mangled}: got an unknown kernel, expected one of {', '.join(KERNELS)}")
    latents, noise = (STORED[int(number)] for number in re.findall(r"(?:StoredE|S\d+_)(\d)E", found[2] + "E")[:2])
    return found[1], latents, noise, "Lb1" in found[2]


def _functions(disassembly: str) -> Iterator[tuple[str, list[str]]]:
    for part in re.split(r"^\.text\.", disassembly, flags=re.MULTILINE)[1:]:
        name, _, body = part.partition(":")
        yield name, body.splitlines()


def _streaming_loop(lines: list[str]) -> list[str] | None:
    """The shortest stretch repeated by a backward branch among those that load the most in 16-byte pieces."""
    labels: dict[str, int] = {}
    best: tuple[int, int] | None = None
    found: list[str] | None = None
    for index, line in enumerate(lines):
        label = re.match(r"^(\.L_x_\d+):", line)
        if label:
            labels[label[1]] = index
        branch = _BRANCH.search(line)
        if branch and branch[1] in labels:
            body = lines[labels[branch[1]] : index + 1]
            wide = sum(opcode.startswith("LDG.") and ".128" in opcode for opcode in _opcodes(body))
            if wide and (best is None or (wide, -len(body)) > best):
                best, found = (wide, -len(body)), body
    return found


def _widths(opcodes: Iterable[str], prefix: str) -> dict[str, int]:
    sizes: Counter[str] = Counter()
    for opcode in opcodes:
        if opcode.split(".")[0] == prefix:
            # LTC128B is a cache hint, not a width
            size = re.search(r"\.(U8|S8|U16|S16|64|128|256)(?=\.|$)", opcode)
            sizes[size[1].lstrip("US") if size else "32"] += 1
    return dict(sizes)


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
                kernel, latents, noise, reference = _version(mangled)
                opcodes = _opcodes(lines)
                loop = _streaming_loop(lines)
                # mixtures take the groups of a pair one by one
                elements = 2 * (4 if latents == "fp32" else 8)
                found.append(
                    Report(
                        kernel=kernel,
                        latents=latents,
                        noise=noise,
                        reference=reference,
                        arch=arch,
                        registers=resources[mangled]["REG"],
                        stack=resources[mangled]["STACK"],
                        local=resources[mangled]["LOCAL"],
                        spills=sum(opcode.startswith(("STL", "LDL")) for opcode in opcodes),
                        instructions=len(opcodes),
                        loads=_widths(opcodes, "LDG"),
                        stores=_widths(opcodes, "STG"),
                        copies=sum(opcode.startswith("LDGSTS") for opcode in opcodes),
                        per_element=None if loop is None else round(len(_opcodes(loop)) / elements, 1),
                        in_flight=None if loop is None else _bytes_in_flight(loop),
                    )
                )
    if not found:
        raise RuntimeError(f"{library.name}: got no code for {arch}, expected kernels; was it built for other GPUs?")
    order = {name: index for index, name in enumerate(KERNELS)}
    stored = {name: index for index, name in enumerate(("", *STORED))}
    return sorted(found, key=lambda r: (order[r.kernel], stored[r.latents], stored[r.noise], r.reference))


def architectures(library: Path) -> list[str]:
    """The GPUs that the library has machine code for, oldest first."""
    listed = subprocess.run([_tool("cuobjdump"), "-lelf", str(library)], capture_output=True, text=True, check=True)
    found = set(re.findall(r"\.(sm_\d+a?)\.cubin", listed.stdout))
    return sorted(found, key=lambda name: int(re.sub(r"\D", "", name)))


def table(rows: Iterable[Report]) -> str:
    """A Markdown table, one line per kernel and GPU."""

    def counts(sizes: dict[str, int]) -> str:
        return ", ".join(f"{count} x {size}" for size, count in sorted(sizes.items(), key=lambda item: -int(item[0])))

    def optional(value: float | None) -> str:
        return "" if value is None else str(value)

    lines = [
        "| kernel | GPU | registers | stack, spills | instructions | per element | bytes in flight | 16-byte loads "
        "| 16-byte copies | 16-byte stores |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r.name} | {r.arch} | {r.registers} | {r.stack + r.local}, {r.spills} | {r.instructions} "
        f"| {optional(r.per_element)} | {optional(r.in_flight)} | {r.loads.get('128', 0)} | {r.copies} "
        f"| {r.stores.get('128', 0)} |"
        for r in rows
    ]
    return "\n".join(lines)


def summary(rows: Iterable[Report]) -> str:
    """The Markdown table of docs/cuda.md: kernels by the kind of version, what is largest over their dtypes."""
    rows = list(rows)
    archs = list(dict.fromkeys(r.arch for r in rows))

    def kind(r: Report) -> str:
        if not r.latents:
            return "rows alone"
        if r.latents == "any":
            return "mixtures of dtypes"
        noise = "seeded" if r.noise == "seeded" else "stored noise"
        return f"{noise}, reference" if r.reference else noise

    def span(values: Iterable[float]) -> str:
        found = sorted(set(values))
        if not found:
            return ""
        return f"{found[0]:g}" if len(found) == 1 else f"{found[0]:g} to {found[-1]:g}"

    lines = [
        f"| kernel | versions | registers: {' | '.join(archs)} | stack, spills | instructions per element "
        "| 16-byte loads per element |",
        "|---|---|" + "---|" * (len(archs) + 3),
    ]
    groups: dict[tuple[str, str], list[Report]] = {}
    for r in rows:
        groups.setdefault((r.kernel, kind(r)), []).append(r)
    for (kernel, versions), members in groups.items():
        registers = [span(r.registers for r in members if r.arch == arch) for arch in archs]
        per_element = span(r.per_element for r in members if r.per_element is not None)
        # the code has the loads of a pair of groups and of one, or of the four steps of a copy
        loads = span((r.loads.get("128", 0) / 3 + r.copies / 4) / r.group for r in members)
        lines.append(
            f"| {kernel} | {versions} | {' | '.join(registers)} | {max(r.stack + r.local for r in members)}, "
            f"{max(r.spills for r in members)} | {per_element} | {loads} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", action="append", metavar="SM", help="such as sm_90a; default: all in the library")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--summary", action="store_true")
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
        print(summary(found) if options.summary else table(found))


if __name__ == "__main__":
    main()
