"""How launches are cut: pure functions, asked for every benchmark workload and for shapes nobody would think of."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import loaded

# section 1 of the benchmark's page: rows and elements of a row
WORKLOADS = {
    "sd3-512": ((8, 16), 16 * 64 * 64),
    "sd3-1024": ((8,), 16 * 128 * 128),
    "flux-1024": ((16,), 4096 * 64),
    "flux2-1024": ((8,), 4096 * 128),
    "wan-480p": ((4, 8), 16 * 21 * 60 * 104),
    "hunyuan-720p": ((4, 16), 16 * 33 * 90 * 160),
    "stacked replay": ((8 * 3,), 16 * 64 * 64),
}
SIZES = [(name, rows, numel) for name, (counts, numel) in WORKLOADS.items() for rows in counts]
# Stored of plan.h and the elements that a thread takes at once, in 16 bytes
GROUPS = {0: 4, 1: 8, 2: 8}
FLOAT32, BFLOAT16, NO_LATENTS = 0, 1, -1
MOST_BLOCKS = 2**31 - 1
# what a block has without asking for more, on every GPU
PLAIN_SHARED = 48 * 1024
THREADS = 256


@pytest.fixture(scope="module")
def plan():
    return loaded().plan


def check_finish(plan: dict[str, int], slots: int) -> None:
    """Slots are merged pairwise by threads of one block."""
    assert slots == plan["slots"] <= plan["threads"]
    assert slots & (slots - 1) == 0
    assert plan["shared_bytes"] >= slots * 256


def check_streaming(plan, rows: int, numel: int, latents: int, finishes: bool) -> dict[str, int]:
    cut = plan(rows, numel, latents, finishes)
    assert 1 <= cut["blocks"] <= MOST_BLOCKS
    assert cut["threads"] == THREADS
    assert cut["shared_bytes"] <= PLAIN_SHARED
    # block row*splits + split takes elements split*elements and so on: every element is in exactly one
    assert cut["blocks"] == rows * cut["splits"]
    assert (cut["splits"] - 1) * cut["elements"] < numel <= cut["splits"] * cut["elements"]
    # every split starts at a vector of the widest and of the narrowest dtype, and at a Philox block
    assert cut["elements"] % (THREADS * GROUPS[latents]) == 0
    assert cut["elements"] < 2**31
    # memory: four doubles per split and row
    assert cut["scratch_bytes"] == 32 * rows * (cut["splits"] + 1)
    check_finish(cut, min(max(32, 1 << (rows - 1).bit_length()), 128) if finishes else 0)
    return cut


@pytest.mark.parametrize(("name", "rows", "numel"), SIZES, ids=lambda value: str(value))
def test_workloads_are_streamed_whole(plan, name, rows, numel):
    for latents, finishes in itertools.product(GROUPS, (False, True)):
        cut = check_streaming(plan, rows, numel, latents, finishes)
        assert cut["scratch_bytes"] + 4 * (rows + 1) <= 2**20, "more than 1 MB besides the gradient"
        # work for every processor of the largest device, unless the latents are too small to cut
        assert cut["blocks"] >= min(2 * 148, rows * -(-numel // cut["elements"]))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    rows=st.one_of(st.integers(1, 600), st.integers(1, 2**30)),
    numel=st.one_of(st.integers(1, 10_000), st.integers(1, 2**40)),
    latents=st.sampled_from(list(GROUPS)),
    finishes=st.booleans(),
)
def test_any_shape_is_streamed_whole(plan, rows, numel, latents, finishes):
    # more than the memory of any device
    if rows * numel <= 2**41:
        check_streaming(plan, rows, numel, latents, finishes)


@pytest.mark.parametrize("rows", [1, 2, 31, 32, 33, 127, 128, 129, 10_000])
def test_rows_without_latents_take_one_block(plan, rows):
    cut = plan(rows, 1, NO_LATENTS)
    assert (cut["blocks"], cut["threads"]) == (1, cut["slots"])
    check_finish(cut, min(max(32, 1 << (rows - 1).bit_length()), 128))
