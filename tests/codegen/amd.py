"""Compiles a form or two of every Triton kernel for AMD GPUs that need not be there.

``python tests/codegen/amd.py`` prints a table, ``--json`` one object per kernel and GPU; ``--arch gfx942`` picks GPUs.
It uses the compiler of the Triton wheel, no driver and no GPU. Run it without ``TRITON_INTERPRET``.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import re
import sys
from collections.abc import Iterable

from aot import EXIT_TOOLS_MISSING, Specialisation, ToolsMissing, compiled_kernel, signature_of, specialisations

# and how many threads a warp of theirs has
ARCHITECTURES = {"gfx942": 64, "gfx1100": 32}
# noise read and generated
FORMS = (
    "partials bf16", "partials bf16 seeded + moment", "partials fp32 + reference + moment", "gradient bf16 seeded",
    "gradient fp32 means", "step bf16 seeded, fp32 mean, log-prob", "step fp32 replay", "epilogue dppo 8 x 32",
    "epilogue guard, batch bias 4096 x 1", "statistics 8 x 32", "log-prob 8 x 32",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Report:
    """By the kernel's own account: vector registers, how many spilled, and bytes of local and of shared memory.

    ``scalars_moved`` counts scalar registers that are kept in lanes of a vector register, which is no memory either.
    """

    name: str
    kernel: str
    arch: str
    registers: int
    spills: int
    scalars_moved: int
    local: int
    shared: int


def compile_assembly(spec: Specialisation, arch: str) -> str:
    """Assembly of one specialisation.

    Raises:
        ToolsMissing: Triton, or its compiler for AMD, is not installed.
    """
    try:
        import triton
        import triton.backends.amd.compiler
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource
    except ImportError as error:
        raise ToolsMissing("Triton's compiler for AMD is not installed") from error
    kernel = compiled_kernel(spec)
    # found out at import: that kernels are compiled, and that torch is not AMD's
    philox = importlib.import_module("flowdppo_fast.kernels.philox")
    philox._HARDWARE = triton.language.constexpr(False)
    options = {"num_warps": spec.num_warps, "enable_fp_fusion": spec.fp_fusion}
    target = GPUTarget("hip", arch, ARCHITECTURES[arch])
    return triton.compile(ASTSource(kernel, *signature_of(spec, overlaps=False)), target=target, options=options).asm[
        "amdgcn"
    ]


def inspect(spec: Specialisation, arch: str) -> Report:
    """Compiles one specialisation and reads the account."""
    assembly = compile_assembly(spec, arch)

    def number(name: str) -> int:
        found = re.findall(rf"^\s+\.{name}:\s+(\d+)$", assembly, re.MULTILINE)
        if len(found) != 1:
            raise RuntimeError(f"{spec.name}: got {len(found)} lines with {name}, expected 1")
        return int(found[0])

    return Report(
        name=spec.name,
        kernel=spec.kernel,
        arch=arch,
        registers=number("vgpr_count"),
        spills=number("vgpr_spill_count"),
        scalars_moved=number("sgpr_spill_count"),
        local=number("private_segment_fixed_size"),
        shared=number("group_segment_fixed_size"),
    )


def reports(archs: Iterable[str] = tuple(ARCHITECTURES)) -> list[Report]:
    """Compiles and inspects all forms."""
    chosen = [spec for spec in specialisations() if spec.name in FORMS]
    return [inspect(spec, arch) for arch in archs for spec in chosen]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", action="append", choices=tuple(ARCHITECTURES), help="default: all")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        parser.error("TRITON_INTERPRET=1 is set, so kernels are not compiled; unset it")
    try:
        found = reports(options.arch or tuple(ARCHITECTURES))
    except ToolsMissing as error:
        print(error, file=sys.stderr)
        sys.exit(EXIT_TOOLS_MISSING)
    if options.json:
        print(json.dumps([dataclasses.asdict(report) for report in found]))
        return
    print("| kernel | GPU | registers | spilled | scalars moved | local bytes | shared bytes |")
    print("|---" * 7 + "|")
    for r in found:
        print(f"| {r.name} | {r.arch} | {r.registers} | {r.spills} | {r.scalars_moved} | {r.local} | {r.shared} |")


if __name__ == "__main__":
    main()
