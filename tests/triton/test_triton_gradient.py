"""``row_grad`` against the float64 reference."""

from __future__ import annotations

import pytest
import torch
from problems_for_kernels import DEVICE, FORMS, MARKS, NORMAL_SLACK, differences, source
from support.tolerance import check_within

from flowdppo_fast import reference
from flowdppo_fast.kernels import launch, row_grad

pytestmark = MARKS
F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64


def coefficients_of(problem):
    """Different numbers for every row and statistic."""
    return torch.randn(3, problem.rows, dtype=torch.float64).to(DEVICE, problem.compute)


def check(problem, coefficients=None, upstream=None, factor=0.25):
    """Each element within roundings of the terms it is the sum of."""
    coefficients = coefficients_of(problem) if coefficients is None else coefficients
    upstream = torch.ones(1, dtype=problem.compute, device=DEVICE) if upstream is None else upstream
    grad = row_grad(*problem.args(), coefficients, upstream, factor)
    wide = coefficients.cpu().double(), upstream.cpu().double()
    exact = reference.row_grad(*problem.exact().args(), *wide, factor)
    assert grad.dtype == problem["new"].dtype
    assert grad.is_contiguous()
    u, e, w = differences(problem)
    size = (wide[0][0].abs()[:, None] * e.abs()).max() + 2 * (wide[0][1].abs()[:, None] * u.abs()).max()
    if w is not None:
        size += 2 * (wide[0][2].abs()[:, None] * w.abs()).max()
    _, k, _ = reference.row_numbers(
        problem.exact()["step"], problem["step_values"], problem["form"], problem.rows, size
    )
    size *= factor * wide[1].abs().max() * k.abs().max() / problem["new"].shape[2]
    relative = 16 * torch.finfo(problem.compute).eps + (NORMAL_SLACK if problem["noise"] is None else 0.0)
    check_within("gradient", grad.cpu(), exact, float(relative * size), problem.compute)
    return grad


@pytest.mark.parametrize(("form", "table"), FORMS, ids=str)
@pytest.mark.parametrize("dtype", [F32, BF16, F16, F64], ids=str)
def test_forms_and_dtypes(form, table, dtype):
    check(source(form=form, dtypes=dtype, with_reference=True, table=table))


@pytest.mark.parametrize(
    "dtypes", [(BF16, BF16, F32, BF16), (F32, BF16, F16, F32), (F16, F32, BF16, F16), (F64, F64, BF16, F64)], ids=str
)
def test_mixed_dtypes(dtypes):
    check(source(dtypes=dtypes, with_reference=True))


@pytest.mark.parametrize("numel", [1, 2, 3, 5, 63, 1000, launch.BLOCK - 1, launch.BLOCK, launch.BLOCK + 1, 4099])
@pytest.mark.parametrize("seeded", [False, True], ids=["stored", "seeded"])
def test_lengths_around_block_edges(numel, seeded):
    check(source((2, 1, numel), dtypes=BF16, seeded=seeded))


@pytest.mark.parametrize("dtype", [F32, BF16, F64], ids=str)
@pytest.mark.parametrize("streams", [None, torch.tensor([7, -1, 2**33 + 1, 7, 0, 2**62])], ids=["first", "table"])
def test_seeded_noise(dtype, streams):
    check(source(dtypes=dtype, seeded=True, streams=streams, with_reference=True))


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_upstream_gradients(dtype):
    problem = source(dtypes=dtype)
    per_row = torch.randn(6, dtype=torch.float64).to(DEVICE, dtype)
    check(problem, upstream=per_row)
    check(problem, upstream=per_row[:1])
    check(problem, upstream=per_row[0])
    # the gradient of a sum arrives expanded, with stride 0
    check(problem, upstream=per_row[2].expand(6))


def test_coefficients_in_any_layout():
    problem = source()
    coefficients = coefficients_of(problem)
    expected = check(problem, coefficients)
    assert torch.equal(check(problem, coefficients.t().contiguous().t()), expected)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("table", [0, 3])
def test_rows_without_coefficients_are_zeros_whatever_they_hold(bad, table):
    problem = source((2, 3, 2500), dtypes=BF16, with_reference=True, table=table)
    coefficients = coefficients_of(problem)
    coefficients[:, [1, 4]] = 0.0
    expected = row_grad(*problem.args(), coefficients, coefficients.new_ones(1), 1.0)
    for name in ("new", "old", "noise", "reference"):
        problem[name].view(6, -1)[[1, 4]] = bad
    if table:
        problem["step"][[1, 4]] = bad
    grad = row_grad(*problem.args(), coefficients, coefficients.new_ones(1), 1.0)
    assert torch.equal(grad.view(6, -1)[[1, 4]], torch.zeros_like(grad.view(6, -1)[[1, 4]]))
    assert torch.equal(grad, expected)
    assert bool((grad.view(6, -1)[[0, 2, 3, 5]] != 0).any(1).all())


@pytest.mark.parametrize("line", [0, 1, 2])
def test_one_coefficient_keeps_a_row_alive(line):
    problem = source((1, 2, 50), with_reference=True)
    coefficients = torch.zeros(3, 2, device=DEVICE)
    coefficients[line, 1] = 0.5
    grad = check(problem, coefficients)
    assert torch.equal(grad[0, 0], torch.zeros_like(grad[0, 0]))
    assert bool((grad[0, 1] != 0).any())


def test_nan_coefficients_are_not_zero():
    problem = source((1, 2, 50))
    coefficients = torch.zeros(3, 2, device=DEVICE)
    coefficients[0, 1] = float("nan")
    grad = row_grad(*problem.args(), coefficients, coefficients.new_ones(1), 1.0)
    assert torch.isnan(grad[0, 1]).all()
    assert torch.equal(grad[0, 0], torch.zeros_like(grad[0, 0]))


def test_non_finite_numbers_stay_in_their_element():
    problem = source((1, 2, 300), dtypes=BF16)
    problem["noise"][0, 1, 17] = float("nan")
    problem["new"][0, 0, 5] = float("inf")
    coefficients = coefficients_of(problem)
    bad = ~torch.isfinite(row_grad(*problem.args(), coefficients, coefficients.new_ones(1), 1.0))
    assert bad.nonzero().tolist() == [[0, 0, 5], [0, 1, 17]]


def test_no_rows():
    for shape in ((0, 3, 10), (4, 0, 10)):
        problem = source(shape, dtypes=BF16)
        grad = row_grad(*problem.args(), torch.zeros(3, 0, device=DEVICE), torch.ones(1, device=DEVICE), 1.0)
        assert grad.shape == shape
        assert grad.dtype == BF16


def test_repeats_bit_by_bit():
    for seeded in (False, True):
        problem = source((2, 2, 5000), dtypes=BF16, seeded=seeded)
        arguments = (*problem.args(), coefficients_of(problem), torch.ones(1, device=DEVICE), 0.5)
        assert torch.equal(row_grad(*arguments), row_grad(*arguments))


@pytest.mark.parametrize("names", [("new",), ("noise",), ("new", "old", "noise", "reference")], ids="+".join)
def test_strided_rows(names):
    problem = source((3, 4, 96), dtypes=BF16, with_reference=True)
    for name in names:
        # step-major with a gap, as a trajectory is stored
        store = torch.full((5, 3, 104), float("nan"), dtype=BF16, device=DEVICE)
        problem[name] = store[:4, :, :96].transpose(0, 1).copy_(problem[name])
    check(problem)
