"""The machine code of the CUDA library keeps its contract on every GPU generation, checked without a GPU.

What is inspected is the library that the build made (``make build`` builds it wherever nvcc is found).
"""

from __future__ import annotations

import functools
import shutil

import pytest
from aot import ToolsMissing
from cuda_code import KERNELS, LIBRARY, ROOT, Loop, Report, architectures, inspect, is_current, summary

from bench.pages import block_of
from flowdppo_fast import build_info

GPUS = ("sm_80", "sm_90a", "sm_100")
# an SM has 65,536 registers and a block 256 threads: 80 leave three blocks, 128 two
THREE_BLOCKS, TWO_BLOCKS = 80, 128
# instructions of the streaming loop per element: Philox and Box-Muller cost about 12, the rest below 14; a sampler step
# also converts what it stores to any of three dtypes
PER_ELEMENT, PER_ELEMENT_SEEDED, OF_A_STEP = 14.0, 12.0, 11.0
# 4.8 TB/s over 132 SMs are 36 KB a microsecond, and a load takes well below one
BYTES_IN_FLIGHT = 24 * 1024
# bytes of an element
WIDTH = {"fp32": 4, "bf16": 2, "fp16": 2}
VERSIONS = [("fp32", "fp32"), ("fp32", "seeded")] + [(x, n) for x in ("bf16", "fp16") for n in (x, "fp32", "seeded")]


@functools.cache
def inspected(arch: str) -> list[Report]:
    return inspect(LIBRARY, arch)


@pytest.fixture(scope="module", params=GPUS)
def reports(request) -> list[Report]:
    """Every kernel on one GPU."""
    if not LIBRARY.exists():
        if shutil.which("nvcc") is not None:
            pytest.fail("nvcc is here and the CUDA library is not built; `make build`, or FLOWDPPO_BUILD_CUDA=1")
        pytest.skip("the CUDA library is not built and there is no nvcc to build it with")
    try:
        if request.param not in architectures(LIBRARY):
            pytest.skip(f"the CUDA library was built for {', '.join(architectures(LIBRARY))} (FLOWDPPO_CUDA_ARCHS)")
        return inspected(request.param)
    except ToolsMissing as error:
        pytest.skip(f"no tools to read machine code with: {error}")


def pieces(loop: Loop) -> int:
    """16-byte pieces that a pair of groups of all operands takes."""
    operands = [loop.latents] * (3 if loop.reference else 2) + ([] if loop.noise == "seeded" else [loop.noise])
    return sum(loop.elements * WIDTH[dtype] // 16 for dtype in operands)


def loops(reports: list[Report]) -> list[tuple[str, Report, Loop]]:
    return [(f"{report.kernel} {loop.name}", report, loop) for report in reports for loop in report.loops]


def test_the_library_was_built_from_these_sources(reports):
    assert is_current(), "build it again: make build"


def test_every_version_is_there(reports):
    assert sorted(report.kernel for report in reports) == sorted(KERNELS)
    found = {report.kernel: [(one.latents, one.noise, one.reference) for one in report.loops] for report in reports}
    both = sorted((latents, noise, reference) for latents, noise in VERSIONS for reference in (False, True))
    alone = sorted((latents, noise, False) for latents, noise in VERSIONS)
    assert found == {"forward": both, "gradient": both, "step": alone, "given": []}


def test_nothing_spills_or_has_a_stack_frame(reports):
    assert {r.kernel: (r.spills, r.stack, r.local) for r in reports if r.spills or r.stack or r.local} == {}


def test_registers_stay_within_bounds(reports):
    bounds = {r.kernel: TWO_BLOCKS if r.kernel == "given" else THREE_BLOCKS for r in reports}
    assert {r.kernel: r.registers for r in reports if r.registers > bounds[r.kernel]} == {}


def test_sixteen_byte_loads_per_element(reports):
    found = {name: loop.wide_loads for name, _, loop in loops(reports)}
    assert found == {name: pieces(loop) for name, _, loop in loops(reports)}


def test_the_gradient_is_written_in_sixteen_bytes(reports):
    found = {name: loop.wide_stores for name, report, loop in loops(reports) if report.kernel == "gradient"}
    assert set(found.values()) == {2}


def test_loops_are_short(reports):
    def limit(report: Report, loop: Loop) -> float:
        return PER_ELEMENT + PER_ELEMENT_SEEDED * (loop.noise == "seeded") + OF_A_STEP * (report.kernel == "step")

    found = {name: (loop.per_element, limit(report, loop)) for name, report, loop in loops(reports)}
    assert {name: costs for name, costs in found.items() if costs[0] > costs[1]} == {}


def test_enough_loads_are_in_flight(reports):
    """What a pair of groups reads is asked for before the first wait, and an SM's blocks fill the latency."""

    def resident(report: Report, loop: Loop) -> int:
        allocated = -(-report.registers // 8) * 8
        return min(65536 // (allocated * 256), 8) * 256 * loop.in_flight

    # where noise is generated, arithmetic is the limit and a load may wait for a register
    stored = {name: (loop.in_flight, 16 * pieces(loop)) for name, _, loop in loops(reports) if loop.noise != "seeded"}
    assert {name: sizes for name, sizes in stored.items() if sizes[0] != sizes[1]} == {}
    found = {name: resident(report, loop) for name, report, loop in loops(reports)}
    assert {name: size for name, size in found.items() if size < BYTES_IN_FLIGHT} == {}


def test_the_page_shows_what_was_built():
    """The table of docs/cuda.md, where the compiler is the one that it names."""
    if not LIBRARY.exists():
        pytest.skip("the CUDA library is not built")
    _, block, _ = block_of((ROOT / "docs" / "cuda.md").read_text(), "cuda:code", "cuda.md")
    compiler, _, shown = block.strip().partition("\n\n")
    built = build_info()["nvcc"]
    if compiler.rstrip(".") != built:
        pytest.skip(f"docs/cuda.md shows code of {compiler!r} and the library was built by {built!r}")
    try:
        found = [report for arch in architectures(LIBRARY) for report in inspected(arch)]
    except ToolsMissing as error:
        pytest.skip(f"no tools to read machine code with: {error}")
    assert shown == summary(found), "python tests/codegen/cuda_code.py makes the table"
