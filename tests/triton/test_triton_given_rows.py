"""``log_prob_loss`` in one launch of the epilogue against the reference in float64."""

from __future__ import annotations

import pytest
import torch
from problems_for_kernels import DEVICE, MARKS
from support import given_rows

from flowdppo_fast import reference
from flowdppo_fast.kernels import log_prob_loss
from flowdppo_fast.objectives import RowField

pytestmark = MARKS


def check(call):
    return given_rows.check(lambda *_: log_prob_loss(*call.map(lambda x: x.to(DEVICE)).args()), call)


@pytest.mark.parametrize(("objective", "option", "columns"), given_rows.CASES)
def test_objectives_and_options(objective, option, columns):
    check(given_rows.draw(objective, 12, columns=columns, **given_rows.OPTIONS[option]))


@pytest.mark.parametrize("columns", [0, 1, 3])
def test_float64(columns):
    check(given_rows.draw("dppo", 12, dtype=torch.float64, columns=columns, with_reference=True))


@pytest.mark.parametrize("rows", [1, 33, 1300])
@pytest.mark.parametrize("objective", ["dppo", "grpo_guard_batch"])
def test_any_number_of_rows(objective, rows):
    check(given_rows.draw(objective, rows, columns=3, with_reference=True, kl_weight=0.2))


def test_no_rows():
    call = given_rows.draw("dppo", 0)
    got = log_prob_loss(*call.map(lambda x: x.to(DEVICE)).args())
    for left, right in zip(got, reference.log_prob_loss(*call.args())):
        assert torch.equal(left.cpu().nan_to_num(7.0), right.nan_to_num(7.0))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("field", ["log_prob", "old_log_prob", "drift", "advantages"])
def test_numbers_that_are_not_finite_are_reported(field, bad):
    for objective in ("dppo", "ratio_clip", "grpo_guard"):
        call = given_rows.draw(objective, 6)
        getattr(call, field)[2] = bad
        check(call)


@pytest.mark.parametrize("objective", ["dppo", "dppo_symmetric", "ratio_clip", "grpo_guard"])
def test_a_dropped_row_has_no_gradient_even_where_its_ratio_overflows(objective):
    call = given_rows.draw(objective, 4)
    call.log_prob[1], call.drift[1], call.advantages[1] = 2000.0, 50.0, 1.0
    _, rows, _ = check(call)
    assert rows[RowField.RATIO, 1] == float("inf")
    assert rows[RowField.GRAD_P :, 1].tolist() == [0.0] * 3
