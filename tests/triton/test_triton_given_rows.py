"""``log_prob_loss`` in one launch of the epilogue against the reference in float64."""

from __future__ import annotations

import pytest
import torch
from problems_for_kernels import DEVICE, MARKS
from support import given_rows

from flowdppo_fast.kernels import log_prob_loss

pytestmark = MARKS


def run(*args):
    """On the device."""
    return log_prob_loss(*(x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in args))


@pytest.mark.parametrize(("objective", "option", "columns"), given_rows.CASES)
def test_objectives_and_options(objective, option, columns):
    given_rows.check(run, given_rows.draw(objective, 12, columns=columns, **given_rows.OPTIONS[option]))


@pytest.mark.parametrize("columns", [0, 1, 3])
def test_float64(columns):
    given_rows.check(run, given_rows.draw("dppo", 12, dtype=torch.float64, columns=columns, with_reference=True))


@pytest.mark.parametrize("rows", [1, 33, 1300])
@pytest.mark.parametrize("objective", ["dppo", "grpo_guard_batch"])
def test_any_number_of_rows(objective, rows):
    given_rows.check(run, given_rows.draw(objective, rows, columns=3, with_reference=True, kl_weight=0.2))


def test_no_rows():
    given_rows.check_no_rows(run, "dppo")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("field", ["log_prob", "old_log_prob", "drift", "advantages"])
def test_numbers_that_are_not_finite_are_reported(field, bad):
    for objective in ("dppo", "ratio_clip", "grpo_guard"):
        given_rows.check_not_finite(run, objective, field, bad)


@pytest.mark.parametrize("objective", ["dppo", "dppo_symmetric", "ratio_clip", "grpo_guard"])
def test_a_dropped_row_has_no_gradient_even_where_its_ratio_overflows(objective):
    given_rows.check_overflow(run, objective)
