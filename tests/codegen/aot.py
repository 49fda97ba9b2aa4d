"""Compiles every Triton kernel for GPUs that need not be there and says what the machine code looks like.

``python tests/codegen/aot.py`` prints the table, ``--json`` one object per kernel and GPU; ``--arch 90`` picks GPUs. It
uses ptxas, cuobjdump and nvdisasm of the Triton wheel, no driver and no GPU. Run it without ``TRITON_INTERPRET``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ARCHITECTURES = (80, 90, 100)
# exit status where nothing could be compiled for want of tools, as test runners know it
EXIT_TOOLS_MISSING = 77
# blocks per program in the table: enough that the loop stays a loop
_BLOCKS = 8


class ToolsMissing(RuntimeError):
    """Triton or one of its binary tools is not installed."""


@dataclasses.dataclass(frozen=True)
class Specialisation:
    """One compilation: a kernel, its argument types (``"*bf16"``, ``"i32"``; None for an absent one) and constants."""

    name: str
    kernel: str
    types: dict[str, str | None]
    constants: dict[str, Any]
    num_warps: int
    fp_fusion: bool
    aligned: bool = True


@dataclasses.dataclass(frozen=True)
class Report:
    """What the compiled kernel consists of.

    ``per_element`` counts instructions of the streaming loop per element, ``in_flight`` the bytes that a thread has
    asked for there before it first waits; None where there is no loop.
    """

    name: str
    kernel: str
    arch: int
    registers: int
    stack: int
    local: int
    shared: int
    shared_in_loop: int
    instructions: int
    per_element: float | None
    in_flight: int | None
    loads: dict[str, int]
    stores: dict[str, int]
    float64: dict[str, int]
    spills: int


_VECTOR = {"bf16": 8, "fp16": 8, "fp32": 4}
_STREAM = {
    "numel": "i32",
    "splits": "i32",
    "seed": "i64",
    "first_stream": "i64",
}
_EPILOGUE_FLAGS = {
    "SUM_REDUCE": 0,
    "UNNORMALIZED": 0,
    "BATCH_BIAS": 0,
    "REFERENCE_WITHOUT_DT": 0,
    "TRUST_REGION": 0,
    "COLUMNS": 0,
    "MEAN_FORM": False,
    "ALL_WEIGHTS": False,
    "REFERENCE": False,
}
_NUMBERS = ("threshold", "clip_low", "clip_high", "advantage_clip", "kl_weight", "strength")
# compiled against the contract, to prove that its checks find fault
UNALIGNED = "partials bf16 unaligned"
WIDE_NUMBERS = "epilogue dppo with float64 numbers"
_STEP = dict.fromkeys(("std", "scale", "neg_dt"), "fp32")


def _latents(**dtypes: str | None) -> dict[str, str | None]:
    """Pointer and row stride of each latent."""
    types: dict[str, str | None] = {}
    for name, dtype in dtypes.items():
        types[name] = dtype and f"*{dtype}"
        types[f"{name}_inner"] = dtype and "i32"
    return types


def specialisations() -> list[Specialisation]:
    """The kernels in the forms that training and sampling take."""
    from flowdppo_fast.kernels.epilogue import rule_constants
    from flowdppo_fast.kernels.launch import BLOCK, NUM_WARPS, epilogue_tiles, partial_tiles

    stream = {"BLOCKS": _BLOCKS, "BLOCK": BLOCK}
    specs = []

    def add(name: str, kernel: str, types: dict, constants: dict, num_warps=NUM_WARPS, fp_fusion=True, aligned=True):
        specs.append(Specialisation(name, kernel, types, constants, num_warps, fp_fusion, aligned))

    def partials(
        name, new, noise, reference=None, *, mean=False, moment=False, blocks=_BLOCKS, aligned=True, strided=False,
        matching=False,
    ):  # fmt: skip
        types = _latents(new=new, old=new, noise=noise, reference=reference) | _STREAM | {"partials": "*fp32"}
        if strided:
            types |= dict.fromkeys(("rows1", "new_outer", "old_outer", "noise_outer"), "i32")
        constants = stream | {
            "BLOCKS": blocks, "MEAN_FORM": mean, "MATCHING": matching, "SECOND_MOMENT": moment, "OVERLAPS": True,
        }  # fmt: skip
        add(f"partials {name}", "statistics.partials_kernel", types, constants, aligned=aligned)

    def gradient(name, new, noise, reference=None, *, mean=False, matching=False):
        types = _latents(new=new, old=new, noise=noise, reference=reference) | _STREAM
        types |= {"coefficients": "*fp32", "upstream": "*fp32", "upstream_stride": "i32", "grad": f"*{new}"}
        types |= {"scale": "fp32", "factor": "fp32"}
        constants = stream | {"COLUMNS": 0, "MEAN_FORM": mean, "MATCHING": matching, "LINE": 5, "VECTOR": _VECTOR[new]}
        add(f"gradient {name}", "gradient.gradient_kernel", types, constants)

    def step(name, dtype, noise, out, mean=None, partials=None, given=False):
        types = _latents(sample=dtype, velocity=dtype, noise=noise) | _STREAM
        types |= dict.fromkeys(("sample_coef", "velocity_coef", "std"), "fp32")
        stored = {"next_sample": out, "mean": mean, "partials": partials}
        types |= {name: dtype and f"*{dtype}" for name, dtype in stored.items()}
        vector = min(_VECTOR[kind] for kind in (out or dtype, mean or out or dtype))
        constants = stream | {"GIVEN": given, "FLOAT64": False, "VECTOR": vector}
        add(f"step {name}", "sampler_step.step_kernel", types, constants)

    def epilogue(name, rule, rows, splits, pointers=(), numbers="fp32", sums=("partials",), **flags):
        tiles = epilogue_tiles(rows, splits)
        types = dict.fromkeys((*sums, "advantages", "loss_out", "rows_out", "summary", *pointers), "*fp32")
        types |= _STEP | dict.fromkeys(_NUMBERS, numbers) | dict.fromkeys(("rows", "splits", "numel"), "i32")
        geometry = {
            "FIELDS": 2 + ("old_log_prob" in pointers) + flags.get("REFERENCE", False),
            "ROW_BLOCK": tiles.row_block,
            "ROW_BLOCKS": tiles.row_blocks,
            "TILE_ROWS": tiles.partials.row_block,
            "TILE_ROW_BLOCKS": tiles.partials.row_blocks,
            "SPLIT_BLOCK": tiles.partials.split_block,
            "SPLIT_BLOCKS": tiles.partials.split_blocks,
            "OVERLAPS": sums == ("partials",),
        }
        functions = rule_constants(rule)
        constants = _EPILOGUE_FLAGS | dict(zip(("DECIDE", "PENALTY", "NORMALIZED"), functions)) | geometry | flags
        add(f"epilogue {name}", "epilogue.epilogue_kernel", types, constants, tiles.num_warps, False)

    partials("bf16", "bf16", "bf16")
    partials("bf16, one block", "bf16", "bf16", blocks=1)
    partials("bf16, two row dims", "bf16", "bf16", strided=True)
    partials("bf16 seeded", "bf16", None)
    partials("bf16 seeded + moment", "bf16", None, moment=True)
    partials("bf16, fp32 noise", "bf16", "fp32")
    partials("bf16 + reference + moment", "bf16", "bf16", "bf16", moment=True)
    partials("bf16 matching + moment", "bf16", "bf16", "bf16", moment=True, matching=True)
    partials("fp32 means", "fp32", "bf16", mean=True)
    partials("fp32", "fp32", "fp32")
    partials("fp32 seeded", "fp32", None)
    partials("fp32 + reference + moment", "fp32", "fp32", "fp32", moment=True)
    # what the contract is there to keep out: narrow loads, and python floats typed as float64
    partials(UNALIGNED.removeprefix("partials "), "bf16", "bf16", aligned=False)
    gradient("bf16", "bf16", "bf16")
    gradient("bf16 seeded", "bf16", None)
    gradient("bf16, fp32 noise", "bf16", "fp32")
    gradient("bf16 + reference", "bf16", "bf16", "bf16")
    gradient("bf16 matching", "bf16", "bf16", "bf16", matching=True)
    gradient("fp32 means", "fp32", "bf16", mean=True)
    gradient("fp32", "fp32", "fp32")
    step("bf16 seeded", "bf16", None, "bf16")
    step("bf16 seeded, fp32 mean, log-prob", "bf16", None, "bf16", "fp32", "fp32")
    step("bf16, fp32 out", "bf16", "bf16", "fp32")
    step("fp32", "fp32", "fp32", "fp32")
    step("fp32 replay", "fp32", "fp32", None, None, "fp32", given=True)
    epilogue("dppo 8 x 32", 0, 8, 32)
    epilogue("dppo + reference 16 x 117", 0, 16, 117, REFERENCE=True)
    epilogue("clip, old log-prob 24 x 32", 2, 24, 32, ("old_log_prob", "row_weights"))
    epilogue("guard, batch bias 4096 x 1", 3, 4096, 1, BATCH_BIAS=1)
    epilogue("pulled dppo, all weights 24 x 32", 6, 24, 32, ("row_weights",), ALL_WEIGHTS=True)
    epilogue("drpo on the ratio 8 x 32", 9, 8, 32)
    epilogue("given log-probs 16 rows", 0, 16, 1, ("old_log_prob",), sums=("log_prob", "given_drift"), MEAN_FORM=True)
    epilogue(WIDE_NUMBERS.removeprefix("epilogue "), 0, 8, 32, numbers="fp64")
    tiles = partial_tiles(8, 32, 1)
    geometry = {"ROW_BLOCK": tiles.row_block, "SPLIT_BLOCK": tiles.split_block, "SPLIT_BLOCKS": tiles.split_blocks}
    counts = dict.fromkeys(("rows", "splits", "numel"), "i32")
    add(
        "statistics 8 x 32",
        "statistics.statistics_kernel",
        {"partials": "*fp32", "stats": "*fp32"} | _STEP | counts,
        geometry | {"COLUMNS": 0, "MEAN_FORM": False, "SECOND_MOMENT": False, "REFERENCE": False, "OVERLAPS": True},
        1,
        False,
    )
    add(
        "log-prob 8 x 32",
        "sampler_step.log_prob_kernel",
        {"partials": "*fp32", "log_prob": "*fp32", "std": "fp32"} | counts,
        geometry | {"GIVEN": False, "UNNORMALIZED": False},
        1,
        False,
    )
    return specs


def _tool(name: str) -> str:
    try:
        import triton
    except ImportError as error:
        raise ToolsMissing("Triton is not installed") from error
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    if not path.exists():
        raise ToolsMissing(f"this Triton wheel has no {name} in backends/nvidia/bin")
    return str(path)


def compiled_kernel(spec: Specialisation) -> Any:
    """The ``triton.jit`` function that a specialisation names.

    Raises:
        RuntimeError: kernels are interpreted, not compiled.
    """
    import importlib

    import triton

    module, _, name = spec.kernel.partition(".")
    kernel = getattr(importlib.import_module(f"flowdppo_fast.kernels.{module}"), name)
    if not isinstance(kernel, triton.JITFunction):
        raise RuntimeError(f"{spec.kernel}: got an interpreted kernel, expected a compiled one; unset TRITON_INTERPRET")
    return kernel


def signature_of(
    spec: Specialisation, overlaps: bool = True
) -> tuple[dict[str, str], dict[tuple[int], Any], dict[tuple[int], list]]:
    """Types, constants and attributes, the latter two by index of the parameter, as Triton's compiler takes them.

    ``overlaps``: whether the GPU can start a launch before the one ahead of it has ended.
    """
    signature: dict[str, str] = {}
    constants: dict[tuple[int], Any] = {}
    attributes: dict[tuple[int], list] = {}
    for index, param in enumerate(compiled_kernel(spec).params):
        kind = spec.types.get(param.name)
        if kind is None:
            signature[param.name] = "constexpr"
            constants[(index,)] = spec.constants[param.name] if param.is_constexpr else None
            if param.name == "OVERLAPS":
                constants[(index,)] &= overlaps
            continue
        signature[param.name] = kind
        # what the launcher finds out about 16-byte aligned tensors and sizes that 16 divides
        if spec.aligned and not param.do_not_specialize and kind[0] in "*i":
            attributes[(index,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def compile_cubin(spec: Specialisation, arch: int) -> bytes:
    """Machine code of one specialisation.

    Raises:
        ToolsMissing: Triton is not installed. RuntimeError: kernels are interpreted, not compiled.
    """
    _tool("ptxas")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(compiled_kernel(spec), *signature_of(spec, arch >= 90))
    options = {"num_warps": spec.num_warps, "enable_fp_fusion": spec.fp_fusion}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options).asm["cubin"]


_INSTRUCTION = re.compile(r"^\s+(?:/\*[0-9a-f]+\*/)?\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)")
_BRANCH = re.compile(r"\bBRA(?:\.\w+)*\s+[^;]*?`\((\.L_x_\d+)\)")
_FLOAT64 = re.compile(r"^(D(ADD|MUL|FMA|SETP|MNMX)|MUFU\.(RCP|RSQ)64H|[FI]2[FI]\S*F64)")


def _loop(lines: list[str]) -> list[str] | None:
    """The longest stretch that a backward branch repeats."""
    labels: dict[str, int] = {}
    best: list[str] | None = None
    for index, line in enumerate(lines):
        label = re.match(r"^(\.L_x_\d+):", line)
        if label:
            labels[label.group(1)] = index
        branch = _BRANCH.search(line)
        if branch and branch.group(1) in labels:
            body = lines[labels[branch.group(1)] : index + 1]
            # the idle loop behind EXIT is a branch to itself
            if len(body) > 3 and (best is None or len(body) > len(best)):
                best = body
    return best


def _opcodes(lines: Iterable[str]) -> list[str]:
    found = (_INSTRUCTION.match(line) for line in lines)
    return [match.group(1) for match in found if match and match.group(1) != "NOP"]


def _bytes_in_flight(loop: list[str]) -> int:
    """Bytes loaded from global memory ahead of the first instruction that reads a loaded register."""
    total = 0
    pending: set[int] = set()
    for line in loop:
        match = _INSTRUCTION.match(line)
        if not match:
            continue
        opcode, operands = match.group(1), line[match.end() :].split(";")[0].split(",")
        registers = [{int(number) for number in re.findall(r"\bR(\d+)", operand)} for operand in operands]
        if opcode.startswith("LDG"):
            width = re.search(r"\.(64|128)\b", opcode)
            size = int(width.group(1)) // 8 if width else 2 if "16" in opcode else 4
            pending.update(first + i for first in registers[0] for i in range(max(1, size // 4)))
            total += size
        # the first operand is what an instruction writes, unless it is a store
        elif any(pending & read for read in registers[0 if opcode.startswith("ST") else 1 :]):
            break
    return total


def inspect_cubin(spec: Specialisation, arch: int, cubin: bytes) -> Report:
    """Disassembles one kernel."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)

        def run(*command: str) -> str:
            return subprocess.run([*command, str(path)], capture_output=True, text=True, check=True).stdout

        usage = run(_tool("cuobjdump"), "-res-usage")
        lines = run(_tool("nvdisasm"), "-c").splitlines()
    resources = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    opcodes = _opcodes(lines)
    if not opcodes or "REG" not in resources:
        raise RuntimeError(f"{spec.name}: cuobjdump or nvdisasm printed no code for sm_{arch}")
    loop = _loop(lines) if "BLOCKS" in spec.constants else None
    per_thread = spec.constants.get("BLOCK", 0) / (32 * spec.num_warps)

    def widths(prefix: str) -> dict[str, int]:
        found = Counter(opcode for opcode in opcodes if opcode.split(".")[0] == prefix)
        sizes: Counter[str] = Counter()
        for opcode, count in found.items():
            size = re.search(r"\.(U8|S8|U16|S16|64|128|256)\b", opcode)
            sizes[size.group(1).lstrip("US") if size else "32"] += count
        return dict(sizes)

    return Report(
        name=spec.name,
        kernel=spec.kernel,
        arch=arch,
        registers=resources["REG"],
        stack=resources["STACK"],
        local=resources["LOCAL"],
        shared=resources["SHARED"],
        shared_in_loop=sum(opcode.startswith(("STS", "LDS", "LDSM")) for opcode in _opcodes(loop or [])),
        instructions=len(opcodes),
        per_element=None if loop is None else round(len(_opcodes(loop)) / per_thread, 1),
        in_flight=None if loop is None else _bytes_in_flight(loop),
        loads=widths("LDG"),
        stores=widths("STG"),
        float64=dict(Counter(opcode for opcode in opcodes if _FLOAT64.match(opcode))),
        spills=sum(opcode.startswith(("STL", "LDL")) for opcode in opcodes),
    )


def reports(archs: Iterable[int] = ARCHITECTURES) -> list[Report]:
    """Compiles and inspects everything.

    Raises:
        ToolsMissing: Triton or one of its binary tools is not installed.
    """
    for tool in ("ptxas", "cuobjdump", "nvdisasm"):
        _tool(tool)
    return [inspect_cubin(spec, arch, compile_cubin(spec, arch)) for arch in archs for spec in specialisations()]


def table(rows: Iterable[Report]) -> str:
    """A Markdown table, one line per kernel and GPU; widths are counts of loads and stores by bits."""

    def counts(sizes: dict[str, int]) -> str:
        return ", ".join(f"{count} x {size}" for size, count in sorted(sizes.items(), key=lambda item: -int(item[0])))

    def optional(value: float | None) -> str:
        return "" if value is None else str(value)

    lines = [
        "| kernel | sm | registers | instructions | per element | bytes in flight | loads | stores | spills |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r.name} | {r.arch} | {r.registers} | {r.instructions} | {optional(r.per_element)} "
        f"| {optional(r.in_flight)} | {counts(r.loads)} | {counts(r.stores)} | {r.spills + r.stack + r.local} |"
        for r in rows
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, action="append", choices=ARCHITECTURES, help="default: all")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        parser.error("TRITON_INTERPRET=1 is set, so kernels are not compiled; unset it")
    try:
        found = reports(options.arch or ARCHITECTURES)
    except ToolsMissing as error:
        print(error, file=sys.stderr)
        sys.exit(EXIT_TOOLS_MISSING)
    print(json.dumps([dataclasses.asdict(report) for report in found]) if options.json else table(found))


if __name__ == "__main__":
    main()
