"""``row_stats`` against the float64 reference."""

from __future__ import annotations

import pytest
import torch
from problems_for_kernels import DEVICE, FORMS, MARKS, NORMAL_SLACK, differences, source
from support.tolerance import sum_bound

from flowdppo_fast import reference
from flowdppo_fast.kernels import launch, row_stats

pytestmark = MARKS
F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64


def check(problem, second_moment=True):
    """Each statistic within the bound of a float sum of its terms."""
    stats = row_stats(*problem.args(), second_moment)
    exact = reference.row_stats(*problem.exact().args(), second_moment)
    assert stats.dtype == problem.compute
    assert stats.shape == exact.shape
    assert stats.is_contiguous()
    u, e, w = differences(problem)
    terms = [e * u, u * u, e * e if second_moment else None, None if w is None else w * w]
    for name, term, actual, expected in zip("PQER", terms, stats.cpu().double(), exact):
        if term is None:
            assert torch.equal(actual, torch.zeros_like(actual)), name
            continue
        # the row's factors k cost a rounding each, the means' division another
        bound = sum_bound(term, problem.compute) + 8 * torch.finfo(problem.compute).eps * expected.abs()
        if problem["noise"] is None:
            bound += NORMAL_SLACK * (u.abs() if name == "P" else 2 * e.abs()).mean(1)
        error = (actual - expected).abs()
        assert bool((error <= bound).all()), f"{name}: {error.max():.3e} > {bound.min():.3e}"
    return stats


@pytest.mark.parametrize(("form", "table"), FORMS, ids=str)
@pytest.mark.parametrize("dtype", [F32, BF16, F16, F64], ids=str)
def test_forms_and_dtypes(form, table, dtype):
    check(source(form=form, dtypes=dtype, with_reference=True, table=table))


@pytest.mark.parametrize(
    "dtypes", [(BF16, BF16, F32, BF16), (F32, BF16, F16, F32), (F16, F32, BF16, F16), (BF16, F16, F32, F32)], ids=str
)
def test_mixed_dtypes(dtypes):
    check(source(dtypes=dtypes, with_reference=True))


@pytest.mark.parametrize("second_moment", [False, True])
@pytest.mark.parametrize("with_reference", [False, True])
def test_only_what_is_asked_for(second_moment, with_reference):
    check(source(with_reference=with_reference), second_moment)


@pytest.mark.parametrize("numel", [1, 2, 3, 5, 63, 1000, launch.BLOCK - 1, launch.BLOCK, launch.BLOCK + 1, 4099])
@pytest.mark.parametrize("seeded", [False, True], ids=["stored", "seeded"])
def test_lengths_around_block_edges(numel, seeded):
    check(source((2, 1, numel), dtypes=BF16, seeded=seeded, with_reference=True))


@pytest.mark.parametrize("rows", [(1, 1), (1, 5), (7, 1), (3, 4)], ids=str)
def test_row_dims(rows):
    check(source((*rows, 40)))


@pytest.mark.parametrize("dtype", [F32, BF16, F64], ids=str)
@pytest.mark.parametrize("with_streams", [False, True])
def test_seeded_noise(dtype, with_streams):
    streams = torch.tensor([7, -1, 2**33 + 1, 7, 0, 2**62]) if with_streams else None
    stats = check(source(dtypes=dtype, seeded=True, streams=streams))
    if with_streams:
        moment = stats[2]
        assert moment[0] == moment[3]
        assert moment[0] != moment[1]


@pytest.fixture
def few_programs(monkeypatch):
    """Cuts as for large latents: a program takes several blocks where a row has more than a few."""
    monkeypatch.setattr(launch, "_PROGRAMS", 4)
    launch.cut.cache_clear()
    yield
    launch.cut.cache_clear()


@pytest.mark.parametrize("numel", [launch.BLOCK * 9, launch.BLOCK * 8 + 5, launch.BLOCK * 11 - 3])
@pytest.mark.parametrize("seeded", [False, True], ids=["stored", "seeded"])
@pytest.mark.usefixtures("few_programs")
def test_several_blocks_per_program(numel, seeded):
    assert launch.cut(2, numel).blocks in (3, 4)
    check(source((2, 1, numel), dtypes=BF16, seeded=seeded))


def test_more_splits_than_a_tile_holds():
    numel = launch.BLOCK * 131
    assert launch.partial_tiles(1, launch.cut(1, numel).splits).split_blocks == 2
    check(source((1, 1, numel)))


def test_more_rows_than_a_tile_holds():
    assert launch.partial_tiles(600, 1).row_blocks == 2
    check(source((600, 1, 6)))


def test_no_rows():
    for shape in ((0, 3, 10), (4, 0, 10)):
        problem = source(shape)
        assert row_stats(*problem.args(), True).shape == (4, 0)


@pytest.mark.parametrize("name", ["new", "old", "noise", "reference"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")], ids=str)
def test_non_finite_numbers_stay_in_their_row(name, bad):
    problem = source((2, 2, 300), dtypes=BF16, with_reference=True)
    clean = row_stats(*problem.args(), True).cpu()
    problem[name][1, 0, 123] = bad
    stats = row_stats(*problem.args(), True).cpu()
    expected = reference.row_stats(*problem.exact().args(), True)
    assert torch.equal(torch.isnan(stats), torch.isnan(expected))
    assert torch.equal(torch.isinf(stats), torch.isinf(expected))
    others = [0, 1, 3]
    assert torch.equal(stats[:, others], clean[:, others])


def test_repeats_bit_by_bit():
    for seeded in (False, True):
        problem = source((2, 2, 5000), dtypes=BF16, seeded=seeded, with_reference=True)
        assert torch.equal(row_stats(*problem.args(), True), row_stats(*problem.args(), True))


def trajectory(x, *, gap: int):
    """``x`` as rows of a wider, step-major store."""
    store = torch.full((x.shape[1] + 1, x.shape[0] + 2, x.shape[2] + gap), float("nan"), dtype=x.dtype, device=DEVICE)
    view = store[1:, 2:, : x.shape[2]].transpose(0, 1)
    view.copy_(x)
    return view


@pytest.mark.parametrize("gap", [0, 3, 16])
@pytest.mark.parametrize("names", [("new",), ("noise",), ("new", "old", "noise", "reference")], ids="+".join)
def test_strided_rows(names, gap):
    """Within the bound and not to the bit: how a thread's share lies in memory decides the order of a compiled sum."""
    problem = source((3, 4, 96), dtypes=BF16, with_reference=True)
    for name in names:
        problem[name] = trajectory(problem[name], gap=gap)
        assert not problem[name].is_contiguous()
    check(problem)


@pytest.mark.parametrize("sizes", [(1, 4), (3, 1), (1, 1)], ids=str)
def test_expanded_rows(sizes):
    problem = source((3, 4, 96), with_reference=True)
    for name in ("old", "reference"):
        problem[name] = problem[name][: sizes[0], : sizes[1]].expand(3, 4, 96)
    check(problem)


def test_misaligned_rows():
    problem = source((2, 2, 1001), dtypes=BF16)
    for name in ("new", "old", "noise"):
        store = torch.empty(problem[name].numel() + 1, dtype=BF16, device=DEVICE)
        problem[name] = store[1:].view(2, 2, 1001).copy_(problem[name])
    check(problem)
