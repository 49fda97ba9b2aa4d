"""``log_prob_loss``, one launch of one block, on the host layer."""

from __future__ import annotations

import pytest
import torch
from host_kernels import LIBRARY, SMALL, Wish, kernels
from support import given_rows


@pytest.mark.parametrize(("objective", "option", "columns"), given_rows.CASES)
def test_objectives_and_options(host, objective, option, columns):
    given_rows.check(host.log_prob_loss, given_rows.draw(objective, 12, columns=columns, **given_rows.OPTIONS[option]))
    assert host.launches == 1


@pytest.mark.parametrize("wish", [Wish(32, 1, 2), SMALL, LIBRARY], ids=["32", "64", "library"])
@pytest.mark.parametrize("rows", [1, 33, 300])
@pytest.mark.parametrize("objective", ["dppo", "grpo_guard_batch"])
def test_any_number_of_rows(host, objective, rows, wish):
    host.wish = wish
    given_rows.check(host.log_prob_loss, given_rows.draw(objective, rows, columns=3, with_reference=True))


def test_same_bits_in_any_order_of_threads(host):
    call = given_rows.draw("grpo_guard_batch", 130, columns=3)
    results = []
    for seed in (0, 1, 2, 3):
        kernels().seed(seed)
        results.append(host.log_prob_loss(*call.args()))
    for other in results[1:]:
        assert all(torch.equal(left, right) for left, right in zip(results[0], other))


def test_a_dropped_row_has_no_gradient_even_where_its_ratio_overflows(host):
    given_rows.check_overflow(host.log_prob_loss, "dppo")
