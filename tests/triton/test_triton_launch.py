"""How rows are cut up and where they lie: pure functions of shapes and strides."""

from __future__ import annotations

import pytest
import torch
from problems_for_kernels import MARKS

from flowdppo_fast.kernels import epilogue
from flowdppo_fast.kernels.launch import BLOCK, cut, epilogue_tiles, partial_tiles, row_strides, vector_width

pytestmark = MARKS
# rows and elements per row of the models that this is for
WORKLOADS = [
    (8, 65_536), (16, 65_536), (24, 65_536), (8, 262_144), (16, 262_144), (8, 524_288),
    (4, 2_096_640), (8, 2_096_640), (4, 7_603_200), (16, 7_603_200),
]  # fmt: skip


@pytest.mark.parametrize(("rows", "numel"), [*WORKLOADS, (1, 1), (3, BLOCK + 1), (5000, 16), (4096, 65_536)])
def test_every_element_belongs_to_one_program(rows, numel):
    blocks, splits = cut(rows, numel)
    assert (splits - 1) * blocks * BLOCK < numel <= splits * blocks * BLOCK


@pytest.mark.parametrize(("rows", "numel"), WORKLOADS)
def test_the_last_program_of_a_row_has_something_to_do(rows, numel):
    blocks, splits = cut(rows, numel)
    last = numel - (splits - 1) * blocks * BLOCK
    assert last >= 0.7 * blocks * BLOCK
    # of all that programs go through, masked or not
    assert numel >= 0.999 * splits * blocks * BLOCK


@pytest.mark.parametrize(("rows", "numel"), WORKLOADS)
def test_large_gpus_are_filled_and_partials_are_small(rows, numel):
    blocks, splits = cut(rows, numel)
    assert rows * splits >= 132
    if blocks > 1:
        assert rows * splits >= 512
    # four float32 sums per program and per row
    assert 4 * 4 * rows * (splits + 1) <= 2**20


@pytest.mark.parametrize("rows", [1, 2, 8, 33, 64, 1000, 5000])
@pytest.mark.parametrize("splits", [1, 3, 32, 117, 300])
def test_tiles_cover_all_partials(rows, splits):
    epilogue = epilogue_tiles(rows, splits)
    assert epilogue.row_block * epilogue.row_blocks >= rows
    assert epilogue.row_block <= 32 * epilogue.num_warps
    for tiles, warps in ((partial_tiles(rows, splits), 1), (epilogue.partials, epilogue.num_warps)):
        assert tiles.row_block * tiles.row_blocks >= rows > tiles.row_block * (tiles.row_blocks - 1)
        assert tiles.split_block * tiles.split_blocks >= splits > tiles.split_block * (tiles.split_blocks - 1)
        assert tiles.row_block * tiles.split_block <= 512 * warps


def test_row_dims_collapse_where_one_stride_finds_all_rows():
    x = torch.empty(3, 4, 10)
    assert row_strides(x, x, None, None) == (None, (None,) * 4, (10, 10, None, None))
    assert row_strides(x[:, :1], x[:, 1:2]) == (None, (None, None), (40, 40))
    assert row_strides(x[:1], x[1:2]) == (None, (None, None), (10, 10))
    assert row_strides(x[:1, :1], x[1:2, 2:3]) == (None, (None, None), (0, 0))
    assert row_strides(x, x[:1, :1].expand(3, 4, 10)) == (None, (None, None), (10, 0))
    # a slice of a trajectory and an expanded dim need both strides, then for all tensors
    assert row_strides(x[:, :2], x[:, 2:]) == (2, (40, 40), (10, 10))
    assert row_strides(x, x[:, :1].expand(3, 4, 10)) == (4, (40, 40), (10, 0))


def test_vectors_are_16_bytes_of_the_widest():
    half, single, double = (torch.empty(1, dtype=dtype) for dtype in (torch.bfloat16, torch.float32, torch.float64))
    assert vector_width(half) == 8
    assert vector_width(half, single) == 4
    assert vector_width(double, half) == 2


def test_rules_are_compiled_as_the_kernels_are(monkeypatch):
    """Whatever the environment says by then: they are kept, and a kernel takes only functions of its own kind."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    decide, _, _ = epilogue.rule_constants.__wrapped__(0)
    assert type(decide) is type(epilogue.epilogue_kernel)
