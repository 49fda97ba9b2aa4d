"""``log_prob_loss``, the epilogue of rows whose log-probs the trainer has, on every backend of this machine."""

from __future__ import annotations

import math

import pytest
import torch
from support import given_rows
from support.backends import CPU, require

from flowdppo_fast import reference
from flowdppo_fast.backend import operator
from flowdppo_fast.objectives import SUMMARY, EpilogueOptions, GRPOGuard, RowField

DTYPES = [torch.float32, torch.float64]


def on(backend):
    """The backend's operator, on the backend's device."""

    def run(*args):
        moved = [x.to(backend.device) if isinstance(x, torch.Tensor) else x for x in args]
        return operator("log_prob_loss", backend.name, backend.device)(*moved)

    return run


def dtypes_of(backend):
    return DTYPES if backend.name != "cuda" else DTYPES[:1]


@pytest.mark.parametrize(("objective", "option", "columns"), given_rows.CASES)
def test_objectives_and_options(backend, objective, option, columns):
    for dtype in dtypes_of(backend):
        call = given_rows.draw(objective, 12, dtype=dtype, columns=columns, **given_rows.OPTIONS[option])
        _, rows, _ = given_rows.check(on(backend), call)
        if objective == "dppo" and option == "plain":
            assert 0 < int(rows[RowField.KEPT].sum()) < 12


@pytest.mark.parametrize("rows", [1, 2, 31, 33, 200, 3000])
@pytest.mark.parametrize("objective", ["dppo", "grpo_guard_batch"])
def test_any_number_of_rows(backend, objective, rows):
    given_rows.check(on(backend), given_rows.draw(objective, rows, columns=3))


@pytest.mark.parametrize("objective", ["dppo", "grpo_guard_batch"])
def test_no_rows(backend, objective):
    given_rows.check_no_rows(on(backend), objective)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("field", ["log_prob", "old_log_prob", "drift", "advantages"])
@pytest.mark.parametrize("objective", ["dppo", "ratio_clip", "grpo_guard"])
def test_numbers_that_are_not_finite_are_reported(backend, objective, field, bad):
    given_rows.check_not_finite(on(backend), objective, field, bad)


@pytest.mark.parametrize("objective", ["dppo", "dppo_symmetric", "ratio_clip", "grpo_guard"])
def test_a_dropped_row_has_no_gradient_even_where_its_ratio_overflows(backend, objective):
    given_rows.check_overflow(on(backend), objective)


def test_a_log_ratio_below_float32s_resolution_of_ratios_decides(backend):
    """``exp(3e-8)`` is 1 in float32, and yet the row moves up."""
    call = given_rows.draw("dppo", 2)
    call.old_log_prob[:] = torch.tensor([0.0, 0.0])
    call.log_prob[:] = torch.tensor([3e-8, -3e-8])
    call.drift[:], call.advantages[:] = 1e3, 1.0
    _, rows, _ = on(backend)(*call.args())
    assert rows[RowField.KEPT].tolist() == [0.0, 1.0]


@pytest.mark.parametrize("bias", ["row", "batch"])
def test_the_gradient_lines_are_those_of_the_loss(bias):
    """Central differences of the mean loss in float64: log-probs, ``Q`` through the drift, and ``R``."""
    options = EpilogueOptions.make(GRPOGuard(0.5, 0.5, bias), kl_weight=0.2)
    call = given_rows.draw("grpo_guard", 5, dtype=torch.float64, columns=3, with_reference=True)
    call.ints, call.floats = options.ints, options.floats
    std = call.step[:, 0]
    rows = reference.log_prob_loss(*call.args())[1]
    for field, name, chain in (
        (RowField.GRAD_P, "log_prob", torch.ones_like(std)),
        (RowField.GRAD_Q, "drift", 1.0 / std**2),
        (RowField.GRAD_R, "reference_drift", 1.0 / std**2),
    ):
        for row in range(5):
            losses = []
            for sign in (1.0, -1.0):
                moved = call.map(torch.clone)
                getattr(moved, name)[row] += sign * 1e-6
                losses.append(reference.log_prob_loss(*moved.args())[0])
            slope = (losses[0] - losses[1]) / 2e-6 * 5
            assert float(slope) == pytest.approx(float(rows[field, row] * chain[row]), rel=1e-6, abs=1e-9)


@pytest.mark.bits(across="again")
def test_repeats_bit_by_bit(backend):
    call = given_rows.draw("grpo_guard_batch", 200, columns=3)
    first, second = (on(backend)(*call.args()) for _ in range(2))
    for left, right in zip(first, second):
        assert torch.equal(left, right)


def test_the_loss_is_a_tensor_of_its_own(backend):
    loss, _, summary = on(backend)(*given_rows.draw("dppo", 3).args())
    before = summary.clone()
    loss.mul_(2.0)
    assert torch.equal(summary, before)
    assert SUMMARY[0] == "loss"


WRONG = {
    "dtype": ({"old_log_prob": torch.zeros(4, dtype=torch.float64)}, "old_log_prob: got dtype Double"),
    "rows": ({"advantages": torch.zeros(3)}, "advantages: got shape"),
    "stride": ({"drift": torch.zeros(8)[::2]}, "drift: got shape.*not contiguous"),
    "table": ({"step": torch.ones(4, 2)}, "step: got shape"),
    "values": ({"step_values": [1.0]}, "step_values: got 1 numbers"),
    "rule": ({"ints": [99, 0, 0, 0, 0, 0]}, "ints: got objective rule 99"),
}


@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=WRONG)
def test_wrong_arguments_are_named(change, message):
    require(CPU)
    call = given_rows.draw("dppo", 4)
    for name, value in change.items():
        setattr(call, name, value)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.flowdppo.log_prob_loss(*call.args())
