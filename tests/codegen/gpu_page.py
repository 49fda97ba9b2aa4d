"""The tables of docs/gpu.md: instructions of Triton's streaming kernels, and how named workloads are cut.

``python tests/codegen/gpu_page.py`` writes them, ``--check`` fails where the page says something else. From the machine
code of ``aot.py``, without a GPU; run it without ``TRITON_INTERPRET``.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import aot

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from bench import pages
from bench.ops.workloads import OVERHEAD, WORKLOADS

PAGE = pages.ROOT / "docs" / "gpu.md"
BLOCK = "gpu:code"
THREADS = 256
# multiprocessors, their boost clock in GHz and memory in TB/s by NVIDIA's data sheets; each issues 4 x 32 lanes a clock
GPUS = {80: ("A100 80GB", 108, 1.41, 2.04), 90: ("H200", 132, 1.98, 4.8)}
_ITEM = {"*bf16": 2, "*fp16": 2, "*fp32": 4}
_STREAMED = ("new", "old", "noise", "reference", "sample", "velocity", "grad", "next_sample", "mean")


def compiler() -> str:
    """What made the code."""
    return f"Triton {importlib.metadata.version('triton')}"


def resident(registers: int) -> int:
    """Programs that a multiprocessor holds at a time: 65,536 registers, given out in groups of 8, and 2,048 threads."""
    return min(65536 // (-(-registers // 8) * 8 * THREADS), 2048 // THREADS)


def moved_bytes(spec: aot.Specialisation) -> int:
    """Bytes per element that are read and written."""
    return sum(_ITEM[kind] for name in _STREAMED if (kind := spec.types.get(name)))


def streaming() -> list[aot.Specialisation]:
    """Kernels with a loop over a row, as they are meant to be."""
    return [s for s in aot.specialisations() if "BLOCKS" in s.constants and s.constants["BLOCKS"] > 1 and s.aligned]


def code_rows(arch: int, reports: Mapping[str, Mapping[str, Any]]) -> dict[str, tuple[str, str]]:
    """Instructions per element and registers of each streaming kernel, as the page shows them."""
    return {s.name: (f"{reports[s.name]['per_element']:g}", str(reports[s.name]["registers"])) for s in streaming()}


def code_table(columns: Mapping[int, Mapping[str, tuple[str, str]]]) -> str:
    """The first table, from :func:`code_rows` of each GPU."""
    archs = list(columns)
    rates = [f"TB/s at full issue: {GPUS[arch][0]}" for arch in archs if arch in GPUS]
    heads = [f"instructions: sm_{archs[0]}", *(f"sm_{arch}" for arch in archs[1:])]
    heads += [f"registers: sm_{archs[0]}", *(f"sm_{arch}" for arch in archs[1:])]
    lines = [f"| kernel | bytes | {' | '.join(heads + rates)} |", "|---|---|" + "---|" * (len(heads) + len(rates))]
    for spec in streaming():
        cells = [columns[arch][spec.name][i] for i in (0, 1) for arch in archs]
        for arch in archs:
            if arch in GPUS:
                _, units, clock, _ = GPUS[arch]
                elements = units * clock * 128 / float(columns[arch][spec.name][0])
                cells.append(f"{elements * moved_bytes(spec) / 1000:.1f}")
        lines.append(f"| {spec.name} | {moved_bytes(spec)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def cut_table(registers: Mapping[str, int]) -> str:
    """The second table; ``registers`` on the H200 by kernel."""
    from flowdppo_fast.kernels.launch import BLOCK as ELEMENTS
    from flowdppo_fast.kernels.launch import cut, epilogue_tiles

    name, units, _, _ = GPUS[90]
    lines = [
        f"| workload | elements per row | blocks per program | programs | the last is filled | rounds on an {name} "
        "| warps of the epilogue |",
        "|---|---|---|---|---|---|---|",
    ]
    for work in WORKLOADS:
        if work is OVERHEAD:
            continue
        blocks, splits = cut(work.row_count, work.elements_per_row)
        last = (work.elements_per_row - (splits - 1) * blocks * ELEMENTS) / (blocks * ELEMENTS)
        rounds = work.row_count * splits / (units * resident(registers["partials bf16"]))
        lines.append(
            f"| {work.key} | {work.elements_per_row:,} | {blocks} | {work.row_count * splits:,} | {last:.0%} "
            f"| {rounds:.1f} | {epilogue_tiles(work.row_count, splits).num_warps} |"
        )
    return "\n".join(lines)


def content(reports: Sequence[aot.Report]) -> str:
    """The generated block."""
    named = {arch: {r.name: vars(r) for r in reports if r.arch == arch} for arch in aot.ARCHITECTURES}
    columns = {arch: code_rows(arch, found) for arch, found in named.items()}
    registers = {name: report["registers"] for name, report in named[90].items()}
    return f"{compiler()}.\n\n{code_table(columns)}\n\n{cut_table(registers)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    try:
        found = aot.reports()
    except aot.ToolsMissing as error:
        print(error, file=sys.stderr)
        sys.exit(aot.EXIT_TOOLS_MISSING)
    sys.exit(pages.put(PAGE, {BLOCK: content(found)}, check=options.check, program="gpu_page"))


if __name__ == "__main__":
    main()
