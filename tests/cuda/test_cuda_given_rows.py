"""``log_prob_loss``, one launch of one block, on the emulator."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import some
from support import given_rows

# every objective, each with one option or another
FEW = given_rows.CASES[::5]


@pytest.mark.parametrize(
    ("objective", "option", "columns"), some(FEW, [case for case in given_rows.CASES if case not in FEW])
)
def test_objectives_and_options(cuda, objective, option, columns):
    given_rows.check(cuda.log_prob_loss, given_rows.draw(objective, 12, columns=columns, **given_rows.OPTIONS[option]))
    assert cuda.launches == 1


@pytest.mark.parametrize("rows", [1, 33, 300])
@pytest.mark.parametrize("objective", ["dppo", "grpo_guard_batch"])
def test_any_number_of_rows(cuda, objective, rows):
    given_rows.check(cuda.log_prob_loss, given_rows.draw(objective, rows, columns=3, with_reference=True))


def test_a_dropped_row_has_no_gradient_even_where_its_ratio_overflows(cuda):
    given_rows.check_overflow(cuda.log_prob_loss, "dppo")


def test_no_rows_are_no_launch(cuda):
    loss, rows, summary = cuda.log_prob_loss(*given_rows.draw("dppo", 0).args())
    assert cuda.launches == 0
    assert loss == 0.0
    assert rows.shape[1] == 0
    assert summary.isnan().any()
    assert torch.equal(summary[:2], torch.zeros(2))
