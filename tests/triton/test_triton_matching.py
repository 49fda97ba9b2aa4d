"""The forward process in Triton: statistics, losses and gradients of noised samples against the float64 reference."""

from __future__ import annotations

import pytest
import torch
from problems_for_kernels import DEVICE, FIRST_STREAM, MARKS, SEED
from support.tolerance import check_within, sum_bound

from flowdppo_fast import reference
from flowdppo_fast.kernels import policy_loss, policy_loss_and_grad, row_grad, row_stats
from flowdppo_fast.objectives import DPPO, EpilogueOptions, RowField
from flowdppo_fast.rows import Form

pytestmark = MARKS
F32, BF16 = torch.float32, torch.bfloat16
# of a seeded normal with functions of the hardware
NORMAL = 1e-4


def source(dtype, *, seeded=False, table=False, shape=(2, 3, 300)):
    x0, noise, off, change = (torch.randn(shape) for _ in range(4))
    old = noise - x0 + 0.5 * off
    latents = [x.to(DEVICE, dtype) for x in (old + 0.2 * change, old, noise, x0)]
    if seeded:
        latents[2] = None
    rows = shape[0] * shape[1]
    step = torch.tensor([[0.7, 1.0, float("nan")]]).repeat(rows, 1).to(DEVICE) if table else None
    values = [] if table else [0.7, 1.0, float("nan")]
    return [*latents, None, step, values, SEED, FIRST_STREAM, int(Form.MATCHING)]


def exact(arguments):
    return [x.cpu().double() if isinstance(x, torch.Tensor) else x for x in arguments]


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("seeded", [False, True])
@pytest.mark.parametrize("numel", [300, 2049])
def test_statistics(dtype, seeded, numel):
    arguments = source(dtype, seeded=seeded, shape=(2, 3, numel))
    wide = exact(arguments)
    found, wanted = row_stats(*arguments, True).cpu().double(), reference.row_stats(*wide, True)
    u, e, _, _ = reference._differences(reference.RowSource(*wide))
    for line, terms in enumerate((e * u, u * u, e * e)):
        allowed = sum_bound(terms, F32) + 32 * torch.finfo(F32).eps * (terms.abs() + u.abs() + e.abs()).mean(-1)
        allowed += NORMAL * seeded * (u.abs() + 2.0 * e.abs()).mean(-1)
        assert bool(((found[line] - wanted[line]).abs() <= allowed).all()), "PQE"[line]
    assert found[3].count_nonzero() == 0


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(("seeded", "table"), [(False, True), (True, False)])
def test_loss_and_gradient(dtype, seeded, table):
    arguments = source(dtype, seeded=seeded, table=table)
    options = EpilogueOptions.make(DPPO(0.02, pull=0.5), log_prob="unnormalized")
    advantages = torch.randn(6)
    given = (advantages.to(DEVICE), None, None, options.ints, options.floats)
    loss, rows, summary, grad = policy_loss_and_grad(*arguments, *given, 0.25)
    wide = (advantages.double(), None, None, options.ints, options.floats)
    _, exact_rows, _, wanted = reference.policy_loss_and_grad(*exact(arguments), *wide, 0.25)
    slack = 64 * torch.finfo(F32).eps + NORMAL * seeded
    for field in RowField:
        want = exact_rows[field]
        allowed = 0.0 if field == RowField.KEPT else slack * (1.0 + float(want.abs().max()))
        check_within(field.name, rows[field].cpu(), want, allowed, F32)
    check_within("gradient", grad.cpu(), wanted, slack * float(wanted.abs().max()), F32)
    assert torch.equal(policy_loss(*arguments, *given)[1], rows)
    apart = row_grad(*arguments, rows[RowField.GRAD_P :], torch.ones(1, device=DEVICE), 0.25)
    assert torch.equal(apart, grad)
    assert torch.equal(loss, summary[0])
