"""The host layer itself, on toy kernels: it runs them as a GPU would and notices what a GPU would let pass."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import pytest
import torch
from host_build import HOST, KERNELS, compiled, kernel_sources, linked, objects_of, run_program
from host_layer import FAULTS, HostError, Layer

SEEDS = range(9)
MISTAKES = [
    None,
    "wrote behind its shared memory",
    "wrote in front of its shared memory",
    "deadlock: .* wait at block_barrier toys.h:.* ended",
    "waits at block_barrier toys.h:.* while others wait at block_barrier",
    "lanes of a warp differ in mask",
    "got mask 32, expected 0 to 31",
    "ended with 1 asynchronous copies that were not waited for",
    "reaches for block ., which has ended",
    "was written to by its cluster after it had ended",
    "got rank 2, expected 0 to 1",
    "got an address outside the 256 bytes of shared memory",
    "16 bytes of shared memory at an address that is no multiple of 16",
    "16 bytes of global memory at an address that is no multiple of them",
    None,
    "got a type of 512 bytes, expected at most the launch's 256",
]


@functools.cache
def toys() -> Layer:
    return Layer(linked([compiled(HOST / "toys.cpp")], "so"))


@pytest.fixture
def layer() -> Layer:
    toys().reset()
    toys().seed(0)
    yield toys()
    toys().plant("")


@functools.cache
def program(sanitizer: str, scheduler: str = "fibers") -> Path:
    return linked(objects_of([HOST / "toys.cpp", HOST / "toys_main.cpp"], sanitizer), "exe", sanitizer, scheduler)


def pointer(tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def row_sum(layer, rows=3, numel=1000, splits=4, threads=64, shared_bytes=132, counters=None, shift=0):
    """Sums of whole numbers, exact in any order."""
    values = torch.randint(-8, 8, (rows * numel + shift,)).float()[shift:].reshape(rows, numel)
    counters = torch.zeros(rows, dtype=torch.int32) if counters is None else counters
    buffers = [layer.buffer(values)]
    buffers += [layer.buffer(x, "w") for x in (torch.full((rows, splits), torch.nan), counters, torch.zeros(rows))]
    given, partials, counters, sums = buffers
    code = layer.library.toy_row_sum(
        pointer(given), ctypes.c_int64(rows), ctypes.c_int64(numel), splits, threads, shared_bytes,
        pointer(partials), pointer(counters), pointer(sums),
    )  # fmt: skip
    layer.check(code)
    return given, sums


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("splits", [1, 2, 7, 40])
def test_a_ticketed_reduction(layer, seed, splits):
    layer.seed(seed)
    given, sums = row_sum(layer, splits=splits, threads=96)
    assert torch.equal(sums, given.sum(1))
    assert layer.launches == 1
    assert layer.loaded(given) == given.numel() * 4


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("blocks", "cluster"), [(4, 1), (6, 2), (6, 3), (16, 8)])
def test_a_sum_over_a_cluster(layer, seed, blocks, cluster):
    layer.seed(seed)
    values = torch.randint(0, 9, (blocks, 64)).float()
    out = torch.zeros_like(values)
    code = layer.library.toy_cluster_sum(pointer(values), ctypes.c_int64(blocks), cluster, 64, pointer(out))
    layer.check(code)
    expected = values.reshape(-1, cluster * 64).sum(1, keepdim=True).expand(-1, cluster * 64).reshape(blocks, 64)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("seed", SEEDS)
def test_asynchronous_copies(layer, seed):
    layer.seed(seed)
    values = torch.randint(0, 1 << 30, (5, 64, 4), dtype=torch.int32)
    given, out = layer.buffer(values), layer.buffer(torch.zeros_like(values), "w")
    layer.check(layer.library.toy_reverse(pointer(given), 5, 64, pointer(out)))
    assert torch.equal(out, values.flip(1))


@pytest.mark.parametrize("mistake", range(len(MISTAKES)))
def test_misuse_is_an_error(layer, mistake):
    memory = layer.buffer(torch.full((256,), 7, dtype=torch.int32), "w")
    code = layer.library.toy_misuse(mistake, pointer(memory))
    if MISTAKES[mistake] is not None:
        with pytest.raises(HostError, match=MISTAKES[mistake]):
            layer.check(code)
        return
    layer.check(code)
    # shared memory that was never written is poison
    assert memory[0] == (0 if mistake == 0 else -1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shared_bytes": 128}, "got a type of 132 bytes, expected at most the launch's 128 bytes"),
        ({"numel": 1001}, "no multiple of them"),
        ({"shift": 2}, "no multiple of them"),
        ({"counters": torch.tensor([0, 1, 0], dtype=torch.int32)}, "a ticket counter holds 1 after the launch"),
        ({"counters": torch.tensor([0, 9, 0], dtype=torch.int32)}, "the ticket counter held 9, expected at most 3"),
        ({"threads": 40}, "got threads = 40, expected a multiple of 32 up to 1024"),
        ({"threads": 1056}, "got threads = 1056"),
        ({"rows": 0}, "got blocks = 0, expected 1 to"),
        ({"shared_bytes": 240_000}, "got shared_bytes = 240000, expected 0 to 232448"),
    ],
)
def test_a_wrong_launch_is_an_error(layer, change, message):
    with pytest.raises(HostError, match=message):
        row_sum(layer, **change)


def test_clusters_divide_the_grid(layer):
    memory = torch.zeros(256, dtype=torch.int32)
    for blocks, cluster, message in (
        (5, 2, "blocks = 5, expected a multiple"),
        (18, 9, "cluster = 9, expected 1 to 8"),
    ):
        with pytest.raises(HostError, match=message):
            layer.check(layer.library.toy_launch(ctypes.c_int64(blocks), 64, cluster, 256, pointer(memory)))


def test_memory_that_is_not_the_kernels_is_an_error(layer):
    values = torch.zeros(3, 1000)
    outside, readable = torch.zeros(8), torch.zeros(8)
    layer.library.host_buffer(readable.data_ptr(), 32, b"r")
    for data, message in ((outside, "loaded 16 bytes that are not inside one buffer"), (readable[4:], "not inside")):
        with pytest.raises(HostError, match=message):
            layer.check(
                layer.library.toy_row_sum(
                    pointer(data), ctypes.c_int64(1), ctypes.c_int64(8), 1, 64, 132, None, None, pointer(values)
                )
            )
    forbidden = layer.buffer(values, "x")
    code = layer.library.toy_reverse(pointer(forbidden), 1, 64, pointer(values))
    with pytest.raises(HostError, match="no business with"):
        layer.check(code)
    layer.reset()
    given, out = layer.buffer(torch.zeros(1024)), layer.buffer(torch.zeros(1024))
    with pytest.raises(HostError, match="stored to a buffer that it may only read"):
        layer.check(layer.library.toy_reverse(pointer(given), 1, 64, pointer(out)))


def test_what_a_launch_writes_is_not_loaded_as_read_only(layer):
    given, sums = layer.buffer(torch.zeros(1, 8), "w"), layer.buffer(torch.zeros(1), "w")
    counters = layer.buffer(torch.zeros(1, dtype=torch.int32), "w")
    rows, numel = ctypes.c_int64(1), ctypes.c_int64(8)
    code = layer.library.toy_row_sum(
        pointer(given), rows, numel, 1, 64, 132, pointer(sums), pointer(counters), pointer(sums)
    )
    with pytest.raises(HostError, match="took a read-only load from a buffer that the launch writes"):
        layer.check(code)


def test_bytes_beside_a_buffer_are_watched(layer):
    sums = layer.buffer(torch.zeros(3), "w", "the sums")
    layer.check(0)
    sums.as_strided((4,), (1,))[3] = 1.0
    with pytest.raises(HostError, match="wrote beside the sums"):
        layer.check(0)


def outcome(binary: Path, fault: str, sanitizer: str, seed: int = 0) -> int:
    return run_program(binary, [str(seed), fault] if fault else [str(seed)], sanitizer).returncode


def toy_faults(layer) -> list[str]:
    row_sum(layer)
    given, out = layer.buffer(torch.zeros(4, 64)), layer.buffer(torch.zeros(4, 64), "w")
    layer.check(layer.library.toy_cluster_sum(pointer(given), ctypes.c_int64(4), 2, 64, pointer(out)))
    given, out = layer.buffer(torch.zeros(256)), layer.buffer(torch.zeros(256), "w")
    layer.check(layer.library.toy_reverse(pointer(given), 1, 64, pointer(out)))
    names = [site.name for site in layer.sites() if site.visits]
    return [f"{name} {fault}" for name in names for fault in FAULTS[name.split()[0]]]


def test_toys_are_clean_under_every_sanitizer():
    for sanitizer, scheduler in (
        ("none", "fibers"),
        ("none", "threads"),
        ("thread", "fibers"),
        ("thread", "threads"),
        ("address", "fibers"),
    ):
        result = run_program(program(sanitizer, scheduler), ["4"], sanitizer)
        assert result.returncode == 0, f"{sanitizer}, {scheduler}: {result.stdout}{result.stderr}"


def test_every_planted_fault_is_noticed(layer):
    faults = toy_faults(layer)
    assert len(faults) == 13
    missed = [fault for fault in faults if outcome(program("thread"), fault, "thread") not in (1, 66)]
    assert missed == []


def test_a_planted_fault_is_what_an_edited_source_does():
    """The same calls taken out of a copy of the text: the same end as with a planted fault."""
    toys_h = HOST / "toys.h"
    for call in ("gpu::block_barrier();", "gpu::cluster_barrier();", "gpu::device_fence();"):
        lines = toys_h.read_text().splitlines()
        at = next(number for number, line in enumerate(lines) if line.strip() == call)
        fault = f"{call[5:-3]} toys.h:{at + 1} skip"
        lines[at] = ""
        edited = compiled(HOST / "toys.cpp", "thread", {toys_h: "\n".join(lines)})
        binary = linked([edited, compiled(HOST / "toys_main.cpp", "thread")], "exe", "thread")
        assert outcome(binary, "", "thread") == outcome(program("thread"), fault, "thread") == 66


def test_a_kernel_with_an_edited_source_is_noticed():
    """The first cluster barrier taken out of the text of the single pass, as the issue has it."""
    source = KERNELS / "single_pass.cu"
    text = source.read_text()
    assert "  cluster_barrier();\n" in text, "the line to take out is not there"
    edited = compiled(source, "thread", {source: text.replace("  cluster_barrier();\n", "\n", 1)})
    others = [path for path in kernel_sources() if path != source]
    others += [HOST / "kernels_api.cpp", HOST / "kernels_driver.cpp"]
    binary = linked([edited, *objects_of(others, "thread")], "exe", "thread")
    assert run_program(binary, ["0", "single_pass"], "thread").returncode in (1, 66)
