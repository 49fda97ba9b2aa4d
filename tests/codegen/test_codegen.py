"""The machine code of the Triton kernels keeps its contract on every GPU generation, checked without a GPU.

Compilation runs in a process of its own: this one may have Triton in interpreter mode (``tests/triton``).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import gpu_page
import pytest
from aot import ARCHITECTURES, EXIT_TOOLS_MISSING, UNALIGNED, WIDE_NUMBERS

from bench.pages import block_of

SCRIPT = Path(__file__).with_name("aot.py")
# of 255; an SM has 65,536, so 80 leave three programs of eight warps
REGISTERS = {"partials": 80, "gradient": 48, "step": 64, "epilogue": 128, "statistics": 64, "log-prob": 48}
# instructions of the streaming loop per element: seven rounds of Philox and Box-Muller cost about 14, the rest of what
# reads two tensors below 12. A step that also writes a float32 mean and adds up squares needs 4 more
PER_ELEMENT, PER_ELEMENT_SEEDED, STEP_WITH_EVERYTHING = 17.0, 26.0, 30.0
# bytes that one SM has asked for before its threads first wait: 4.8 TB/s over 132 SMs are 36 KB a microsecond, and a
# load takes well below one
BYTES_IN_FLIGHT = 24 * 1024


@pytest.fixture(scope="module", params=ARCHITECTURES, ids=lambda arch: f"sm_{arch}")
def reports(request) -> dict[str, dict]:
    """What ``aot.py`` finds in each kernel, by name."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(SCRIPT), "--json", "--arch", str(request.param)]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode == EXIT_TOOLS_MISSING:
        pytest.skip(f"cannot compile Triton kernels here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    return {report["name"]: report for report in json.loads(done.stdout)}


def intact(reports: dict[str, dict]) -> list[dict]:
    """All kernels but those that are broken on purpose."""
    return [report for name, report in reports.items() if name not in (UNALIGNED, WIDE_NUMBERS)]


def streaming(reports: dict[str, dict]) -> list[dict]:
    return [report for report in intact(reports) if report["per_element"] is not None]


def resident_bytes(report: dict) -> int:
    """Bytes in flight per SM with as many programs of 256 threads as its registers hold."""
    allocated = -(-report["registers"] // 8) * 8
    threads = min(65536 // (allocated * 256), 8) * 256
    return threads * report["in_flight"]


@pytest.mark.slow
def test_every_kernel_is_covered(reports):
    kernels = {report["kernel"].split(".")[1] for report in intact(reports)}
    assert kernels == {
        "partials_kernel", "gradient_kernel", "step_kernel", "epilogue_kernel", "statistics_kernel", "log_prob_kernel",
    }  # fmt: skip


def test_nothing_spills_or_lives_in_local_memory(reports):
    assert {r["name"] for r in intact(reports) if r["spills"] or r["stack"] or r["local"]} == set()


def test_registers_stay_within_bounds(reports):
    over = {r["name"]: r["registers"] for r in intact(reports) if r["registers"] > REGISTERS[r["name"].split()[0]]}
    assert over == {}


def test_aligned_latents_are_read_128_bits_at_a_time(reports):
    for report in streaming(reports):
        widths = set(report["loads"])
        if report["name"].startswith("gradient"):
            # the row's three coefficients and its upstream gradient
            assert report["loads"].get("32", 0) == 4, report
            widths.discard("32")
        # beside wider results, bf16 comes 64 bits at a time, so that a thread stores what it has read
        allowed = {"128", "64"} if "fp32 m" in report["name"] or "fp32 out" in report["name"] else {"128"}
        assert widths <= allowed, report


def test_aligned_results_are_written_without_narrow_stores(reports):
    for report in streaming(reports):
        if not report["name"].startswith("partials"):
            assert "16" not in report["stores"], report
            assert "8" not in report["stores"], report


def test_float32_kernels_have_no_float64_instruction(reports):
    assert {r["name"] for r in intact(reports) if r["float64"]} == set()


def test_loops_are_short(reports):
    for report in streaming(reports):
        limit = PER_ELEMENT_SEEDED if "seeded" in report["name"] else PER_ELEMENT
        if report["name"] == "step bf16 seeded, fp32 mean, log-prob":
            limit = STEP_WITH_EVERYTHING
        assert report["per_element"] <= limit, report


def test_normals_never_pass_through_shared_memory(reports):
    assert {r["name"] for r in streaming(reports) if r["shared_in_loop"]} == set()


def test_enough_loads_are_in_flight(reports):
    low = {r["name"]: resident_bytes(r) for r in streaming(reports) if resident_bytes(r) < BYTES_IN_FLIGHT}
    assert low == {}


def test_the_page_shows_this_code(reports, request):
    """docs/gpu.md, where the compiler is the one that it names."""
    arch = request.node.callspec.params["reports"]
    _, block, _ = block_of(gpu_page.PAGE.read_text(), gpu_page.BLOCK, "gpu.md")
    version, code, cuts = block.strip().split("\n\n")
    if version.rstrip(".") != gpu_page.compiler():
        pytest.skip(f"docs/gpu.md shows code of {version} and {gpu_page.compiler()} is installed")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in code.splitlines()]
    heads = rows[0]
    # sm_80, sm_90, sm_100: instructions from the third column on, then registers
    place = 2 + ARCHITECTURES.index(arch)
    assert heads[place].endswith(f"sm_{arch}")
    shown = {row[0]: (row[place], row[place + len(ARCHITECTURES)]) for row in rows[2:]}
    assert shown == gpu_page.code_rows(arch, reports), "python tests/codegen/gpu_page.py makes the table"
    if arch == 90:
        registers = {name: report["registers"] for name, report in reports.items()}
        assert cuts == gpu_page.cut_table(registers), "python tests/codegen/gpu_page.py makes the table"


def test_unaligned_latents_would_be_noticed(reports):
    assert set(reports[UNALIGNED]["loads"]) == {"16"}


def test_float64_numbers_would_be_noticed_and_are_pinned(reports):
    # the five numbers are converted on entry; what they meet is not dragged into float64
    found = reports[WIDE_NUMBERS]["float64"]
    assert found.get("F2F.F32.F64") == 5
    assert not {opcode for opcode in found if opcode.startswith(("DADD", "DMUL", "DFMA"))}
