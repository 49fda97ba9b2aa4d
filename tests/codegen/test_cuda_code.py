"""The machine code of the CUDA library keeps its contract on every GPU generation, checked without a GPU.

What is inspected is the library that the build made (``make build`` builds it wherever nvcc is found).
"""

from __future__ import annotations

import functools
import shutil

import pytest
from aot import ToolsMissing
from cuda_code import KERNELS, LIBRARY, ROOT, Report, architectures, inspect, is_current, summary

from bench.pages import block_of
from flowdppo_fast import build_info

GPUS = ("sm_80", "sm_90a", "sm_100")
# an SM has 65,536 registers and a block 256 threads: 64 leave four blocks, 80 three, 128 two
TWO_BLOCKS, THREE_BLOCKS, FOUR_BLOCKS = 128, 80, 64
# instructions of the streaming loop per element: ten rounds of Philox and Box-Muller cost about 42, the rest below 14;
# a sampler step also converts what it stores to any of three dtypes
PER_ELEMENT, PER_ELEMENT_SEEDED, OF_A_STEP, OF_MIXTURES = 14.0, 42.0, 11.0, 16.0
# 4.8 TB/s over 132 SMs are 36 KB a microsecond, and a load takes well below one
BYTES_IN_FLIGHT = 24 * 1024
# bytes of an element
WIDTH = {"fp32": 4, "bf16": 2, "fp16": 2}


def register_bound(report: Report) -> int:
    # groups of any dtype take twice the registers, and what a row's block holds is in shared memory
    if report.latents == "any" or report.kernel in ("holding", "log_prob"):
        return TWO_BLOCKS
    # the forward kernel also finishes the objective; a step has four pointers in and two out
    if report.kernel in ("forward", "step") or report.reference:
        return THREE_BLOCKS
    return FOUR_BLOCKS


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


def operands(report: Report) -> list[str]:
    """The dtype of each tensor that is read."""
    latents = [report.latents] * (3 if report.reference else 2)
    return latents + ([] if report.noise == "seeded" else [report.noise])


def pieces(report: Report) -> int:
    """16-byte pieces that a group of all operands takes."""
    if report.latents == "any":
        # room for float32
        return 2 * len(operands(report))
    return sum(report.group * WIDTH[dtype] // 16 for dtype in operands(report))


def streaming(reports: list[Report]) -> list[Report]:
    return [report for report in reports if report.kernel not in ("holding", "log_prob")]


def test_the_library_was_built_from_these_sources(reports):
    assert is_current(), "build it again: make build"


def test_every_version_is_there(reports):
    found = {(r.kernel, r.latents, r.noise, r.reference) for r in reports}
    halves = [(x, noise) for x in ("bf16", "fp16") for noise in (x, "fp32", "seeded")]
    exact = [("fp32", "fp32"), ("fp32", "seeded"), *halves]
    mixed = [("any", "any"), ("any", "seeded")]
    expected = {(k, x, n, r) for k in ("forward", "gradient") for x, n in exact for r in (False, True)}
    expected |= {(k, x, n, True) for k in ("forward", "gradient") for x, n in mixed}
    expected |= {("step", x, n, False) for x, n in exact + mixed}
    expected |= {("holding", x, n, r) for x, n in exact if n in (x, "seeded") for r in (False, True)}
    expected.add(("log_prob", "", "", False))
    assert found == expected
    assert len(reports) == len(expected)
    assert {r.kernel for r in reports} == set(KERNELS)


def test_nothing_spills_or_has_a_stack_frame(reports):
    assert {r.name: (r.spills, r.stack, r.local) for r in reports if r.spills or r.stack or r.local} == {}


def test_registers_stay_within_bounds(reports):
    over = {r.name: r.registers for r in reports if r.registers > register_bound(r)}
    assert over == {}


def test_sixteen_byte_loads_per_element(reports):
    """A pair of groups and a single one are all that the code of a streaming kernel loads in wide pieces."""
    found = {r.name: r.loads["128"] / (3 * r.group) for r in streaming(reports)}
    assert found == {r.name: pieces(r) / r.group for r in streaming(reports)}


def test_inputs_that_are_held_are_copied_past_the_registers(reports):
    # once in each of four steps
    found = {r.name: (r.copies, r.loads.get("128", 0)) for r in reports if r.kernel == "holding"}
    assert found == {r.name: (4 * pieces(r), 0) for r in reports if r.kernel == "holding"}


def test_the_gradient_is_written_in_sixteen_bytes(reports):
    # of a pair and a single group, and the same for zeros; mixtures write 16-bit dtypes and float32
    expected = {r.name: 6 * (3 if r.latents == "any" else 1) for r in reports if r.kernel == "gradient"}
    assert {r.name: r.stores["128"] for r in reports if r.kernel == "gradient"} == expected


def test_loops_are_short(reports):
    def limit(r: Report) -> float:
        return (
            PER_ELEMENT
            + PER_ELEMENT_SEEDED * (r.noise == "seeded")
            + OF_A_STEP * (r.kernel == "step")
            + OF_MIXTURES * (r.latents == "any")
        )

    over = {r.name: (r.per_element, limit(r)) for r in streaming(reports) if r.per_element > limit(r)}
    assert over == {}


def test_enough_loads_are_in_flight(reports):
    """Everything a pair of groups reads is asked for before the first wait, and that fills the memory's latency."""

    def resident(r: Report) -> int:
        allocated = -(-r.registers // 8) * 8
        return min(65536 // (allocated * 256), 8) * 256 * r.in_flight

    exact = [r for r in streaming(reports) if r.latents != "any"]
    assert {r.name: r.in_flight for r in exact} == {r.name: 2 * 16 * pieces(r) for r in exact}
    assert {r.name: resident(r) for r in streaming(reports) if resident(r) < BYTES_IN_FLIGHT} == {}


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
    assert shown == summary(found), "python tests/codegen/cuda_code.py --summary makes the table"
