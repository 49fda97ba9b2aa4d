"""The invariants on the reference and the C++ library, and a fault for each that it notices.

``tests/triton`` and ``tests/cuda`` hold their kernels to the same ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from support.backends import CPU, REFERENCE, Backend, require

import flowdppo_fast.autograd
import flowdppo_fast.losses
from flowdppo_fast.objectives import RowField

from .invariants import INVARIANTS, hold


@pytest.mark.bits(across="rows")
@pytest.mark.parametrize("backend", [REFERENCE, CPU], ids=lambda backend: backend.name)
@pytest.mark.parametrize("name", INVARIANTS)
def test_it_holds(backend: Backend, name: str):
    require(backend)
    hold(name, backend.name, 60)


class Fault(NamedTuple):
    """Something that an operator might get wrong: changes its results in place, given its arguments."""

    operator: str
    change: Callable[..., object]


def _drop_everything_beyond_a_loose_bound(args, rows, summary, grad):
    bound = args[-2][0]
    if bound > 1e-3:
        rows[RowField.KEPT] = 0.0


def _leave_dropped_rows_a_gradient(args, rows, summary, grad):
    grad.flatten(0, 1)[rows[RowField.KEPT] == 0] = 1e-4


WHOLE = "policy_loss_and_grad"
FAULTS = {
    "equal_policies_give_kl_0_ratio_1_and_the_plain_policy_gradient": Fault(
        WHOLE, lambda args, rows, summary, grad: rows[RowField.KL].add_(1e-9)
    ),
    "permuting_rows_permutes_results": Fault(
        WHOLE, lambda args, rows, summary, grad: rows[RowField.KL].mul_(1.0 + 1e-6 * torch.arange(rows.shape[1]))
    ),
    "scaling_the_difference_scales_q_by_its_square": Fault("row_stats", lambda args, stats: stats[1].add_(1e-6)),
    "the_mirrored_step_is_the_same_step": Fault(
        WHOLE, lambda args, rows, summary, grad: grad.add_(grad.abs(), alpha=1e-2)
    ),
    "the_mask_only_loosens_as_the_bound_grows": Fault(WHOLE, _drop_everything_beyond_a_loose_bound),
    "dropped_rows_have_gradients_of_exactly_zero": Fault(WHOLE, _leave_dropped_rows_a_gradient),
    "splitting_a_batch_adds_up": Fault(
        WHOLE, lambda args, rows, summary, grad: rows[RowField.LOSS].mul_(1.0 + 1e-6 * rows.shape[1])
    ),
    "advantages_scale_loss_and_gradient": Fault(WHOLE, lambda args, rows, summary, grad: grad.add_(1e-3)),
}


@pytest.mark.parametrize("name", INVARIANTS)
def test_a_fault_is_noticed(monkeypatch, name):
    fault, original = FAULTS[name], flowdppo_fast.losses.operator

    def operator(op, backend, device_type):
        right = original(op, backend, device_type)
        if op != fault.operator:
            return right

        def wrong(*args):
            outcome = right(*args)
            # (loss, rows, summary, gradient), or one tensor
            fault.change(args, *(outcome[1:] if isinstance(outcome, tuple) else [outcome]))
            return outcome

        return wrong

    for module in (flowdppo_fast.autograd, flowdppo_fast.losses):
        monkeypatch.setattr(module, "operator", operator)
    with pytest.raises(AssertionError):
        hold(name, REFERENCE.name, 60, shrink=False)
