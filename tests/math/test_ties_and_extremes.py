"""Exact ties, zeros, overflow, NaN, no rows: where a formula and its implementation part ways.

Rows are built from constants, on means with ``S = 1`` and ``old = 0``: ``u = new`` and ``e = next state`` exactly.
"""

from __future__ import annotations

import math

import pytest
import torch
from support.cases import FORM_OBJECTIVES, OBJECTIVES, PULLED_WITHOUT_ADVANTAGE, bounded_call
from support.problems import library, make_call, make_problem

import flowdppo_fast as fast
from flowdppo_fast.backend import operator

INF, NAN = math.inf, math.nan


def loss_of(objective, backend, u, e, advantages, numel=64, grad=True, **options):
    """Loss of rows with constant ``u`` and ``e``, and the gradient in the new means."""

    def rows(values):
        return torch.tensor(values, device=backend.device).float()[:, None].expand(-1, numel).contiguous()

    new = rows(u).requires_grad_(grad)
    out = fast.fused_policy_loss(
        new, torch.zeros_like(new).detach(), rows(e), 1.0, torch.tensor(advantages, device=backend.device),
        objective=objective, dt=-0.25, backend=backend.name, **options,
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(out.loss.sum(), new) if grad else (None,)
    return out, gradient


def next_above(value: float) -> float:
    return float(torch.nextafter(torch.tensor(value), torch.tensor(INF)))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("numel", [1, 64, 1024])
def test_divergence_equal_to_the_threshold_is_far(backend, symmetric, numel):
    """D = 2**-5 exactly, in any order of summation."""
    divergence = 0.25**2 / 2
    for threshold, kept in ((divergence, False), (next_above(divergence), True), (divergence / 2, False)):
        objective = fast.DPPO(threshold, symmetric)
        # both rows move away: ratio up under a positive advantage, down under a negative one
        out, grad = loss_of(objective, backend, [0.25, 0.25], [1.0, -1.0], [1.0, -1.0], numel)
        assert out.rows.kl.tolist() == [divergence] * 2
        assert out.rows.kept.tolist() == [kept] * 2
        metrics = out.metrics().to_floats()
        assert metrics["kl_mask_fraction"] == metrics["masked_fraction"] == 1.0 - kept
        assert metrics["pos_rm_fraction"] == metrics["neg_rm_fraction"] == 0.5 * (1.0 - kept)
        assert bool((grad != 0).all()) == kept


def test_threshold_is_compared_in_the_accumulation_dtype(backend):
    """D is the float32 neighbour of a threshold that float32 cannot hold: still a tie."""
    found = 0
    for threshold in (k * 10.0**-d for k in range(1, 10) for d in (3, 4, 5, 6)):
        nearest = torch.tensor(threshold)
        u = torch.sqrt(2 * nearest.double()).float()
        if float(nearest) >= threshold or 0.5 * u * u != nearest:
            continue
        found += 1
        out, _ = loss_of(fast.DPPO(threshold, symmetric=True), backend, [float(u)], [1.0], [1.0], numel=1)
        assert out.rows.kl.tolist() == [float(nearest)]
        assert out.rows.kept.tolist() == [False]
    assert found > 2


def test_rows_that_come_back_are_kept_however_far(backend):
    out, grad = loss_of(fast.DPPO(1e-6), backend, [0.5, 0.5], [-1.0, 1.0], [1.0, -1.0])
    assert out.rows.kept.tolist() == [True, True]
    assert bool((grad != 0).all())
    assert out.metrics().to_floats()["kl_mask_fraction"] == 1.0


def test_ratio_of_exactly_one_is_never_dropped(backend):
    """P = Q/2, so the log-ratio is 0 although the policies differ."""
    out, grad = loss_of(fast.DPPO(1e-6), backend, [0.5, 0.5], [0.25, 0.25], [1.0, -1.0])
    assert out.rows.log_ratio.tolist() == [0.0, 0.0]
    assert out.rows.ratio.tolist() == [1.0, 1.0]
    assert out.rows.kept.tolist() == [True, True]
    assert out.rows.loss.tolist() == [-1.0, 1.0]
    # dl/dmu = -A * (e - u) / N, which does not vanish
    torch.testing.assert_close(grad * 64, torch.tensor([[0.25], [-0.25]]).to(grad).expand(2, 64) / 2, rtol=0, atol=0)


def test_direction_is_seen_where_the_rounded_ratio_is_one(backend):
    """L = 2**-26 and -2**-27: exp() gives 1.0f, but the row does move away."""
    u, e = [0.5] * 4, [0.25 + 2.0**-25, 0.25 - 2.0**-26] * 2
    out, _ = loss_of(fast.DPPO(1e-6), backend, u, e, [1.0, 1.0, -1.0, -1.0], numel=1)
    assert out.rows.log_ratio.tolist() == [2.0**-26, -(2.0**-27)] * 2
    assert out.rows.ratio.tolist() == [1.0] * 4
    assert out.rows.kept.tolist() == [False, True, True, False]


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_clip_ranges_below_an_ulp_of_one(backend, sign):
    """Clip ranges of 2e-6 are in use, 17 ulp of 1; the decision takes r - 1, which has all its digits."""
    exponents = [2.0**-25, 2.0**-27, -(2.0**-26), -(2.0**-28)]
    dropped = [True, False, False, False] if sign > 0 else [False, False, True, False]
    # the guard's exponent is P = e * u alone; N = 1 keeps it exact
    out, grad = loss_of(
        fast.GRPOGuard(2.0**-27, 2.0**-26), backend, [0.5] * 4, [2.0 * x for x in exponents], [sign] * 4, numel=1
    )
    assert out.rows.ratio.tolist() == [1.0] * 4
    assert out.rows.kept.tolist() == [not d for d in dropped]
    assert (grad[:, 0] == 0).tolist() == dropped
    metrics = out.metrics().to_floats()
    assert (metrics["clipfrac"], metrics["clipfrac_gt_one"], metrics["clipfrac_lt_one"]) == (0.5, 0.25, 0.25)


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name not in PULLED_WITHOUT_ADVANTAGE])
def test_zero_advantage_gives_zero_loss_and_gradient(backend, name):
    if OBJECTIVES[name].velocity_only:
        name = "dppo"
    objective, _ = OBJECTIVES[name].bounded(0.01)
    out, grad = loss_of(objective, backend, [0.5, 0.1, -0.5], [1.0, 1.0, 1.0], [0.0, 0.0, 0.0])
    assert out.loss.item() == 0.0
    assert out.rows.loss.count_nonzero() == 0
    assert grad.count_nonzero() == 0
    # neither moving up nor down is away, so only the symmetric mask drops such rows
    assert out.rows.kept.all() == (name != "dppo_symmetric")


BOUNDED = {
    "dppo": (fast.DPPO(0.01), 0.0),
    "dppo_symmetric": (fast.DPPO(0.01, symmetric=True), 0.0),
    "ratio_clip": (fast.RatioClip(0.1, 0.25), -2.0 * 1.25),
    "grpo_guard": (fast.GRPOGuard(0.1, 0.25), -2.0 * 1.25 * 4.0),
}


@pytest.mark.parametrize("name", BOUNDED)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_overflowed_ratio_in_a_dropped_row_stays_there(backend, name, reduction, weight):
    """The first row's ratio is inf; it is dropped: its loss is exact, its gradient is 0, and the rest is untouched."""
    objective, bound = BOUNDED[name]
    weights = torch.tensor([weight] * 3, device=backend.device)
    out, grad = loss_of(
        objective, backend, [200.0, 0.05, 0.02], [200.0, 1.0, -1.0], [2.0, 1.0, 1.0],
        reduction=reduction, row_weights=weights,
    )  # fmt: skip
    rest, rest_grad = loss_of(
        objective, backend, [0.05, 0.02], [1.0, -1.0], [1.0, 1.0], reduction=reduction, row_weights=weights[1:]
    )
    assert out.rows.ratio[0].item() == INF
    assert out.rows.kept.tolist() == [False, True, True]
    assert out.rows.loss[0].item() == bound * weight
    assert torch.isfinite(out.loss).all()
    assert grad[0].count_nonzero() == 0
    assert torch.equal(out.rows.loss[1:], rest.rows.loss)
    scale = 2 / 3 if reduction == "mean" else 1.0
    torch.testing.assert_close(grad[1:], rest_grad * scale, rtol=1e-6, atol=0)
    metrics = out.metrics().to_floats()
    assert metrics["ratio_max"] == INF
    assert metrics["nonfinite_rows"] == 1.0
    assert metrics["policy_loss"] == pytest.approx(out.rows.loss.mean().item(), rel=1e-6)


def test_overflowed_ratio_in_a_kept_row_reaches_the_loss(backend):
    out, grad = loss_of(fast.Unclipped(), backend, [200.0, 0.05], [200.0, 1.0], [1.0, 1.0])
    assert out.loss.item() == -INF
    assert not torch.isfinite(grad[0]).any()
    assert torch.isfinite(grad[1]).all()
    assert out.metrics().to_floats()["nonfinite_rows"] == 1.0


def test_ratio_of_zero_is_a_number(backend):
    """exp(-20000) underflows to 0: a finite row, dropped or not."""
    out, grad = loss_of(fast.DPPO(0.01), backend, [200.0, 200.0], [-200.0, -200.0], [1.0, -1.0])
    assert out.rows.ratio.tolist() == [0.0, 0.0]
    assert out.rows.kept.tolist() == [True, False]
    assert out.rows.loss.abs().tolist() == [0.0, 0.0]
    assert grad.count_nonzero() == 0
    assert out.metrics().to_floats()["nonfinite_rows"] == 0.0


@pytest.mark.parametrize(("form", "objective"), FORM_OBJECTIVES)
@pytest.mark.parametrize("where", ["new", "old", "noise", "advantages", "row_weights"])
def test_nan_reaches_the_loss_and_is_counted(backend, form, objective, where):
    call = bounded_call(make_problem(), form, objective, dtypes=torch.float32, device=backend.device, with_weights=True)
    new, old, noise, _ = call.tensors.values()
    poisoned = {
        "new": new, "old": old, "noise": noise, "advantages": call.advantages,
        "row_weights": call.options["row_weights"],
    }[where]  # fmt: skip
    # a row near the old policy: no finite divergence or ratio drops it
    row, others = 5, [0, 1, 2, 3, 4, 6, 7]
    poisoned[(row,) + (0,) * (poisoned.ndim - 1)] = NAN
    outcome = library(call, backend.name)
    assert outcome.loss.isnan()
    assert outcome.rows["kept"][row]
    assert outcome.rows["loss"][row].isnan()
    assert outcome.grad[row].isnan().any()
    if objective == "grpo_guard_batch":
        # the bias is everybody's: a NaN divergence is in all rows, a NaN slope in all gradients
        assert outcome.metrics["nonfinite_rows"] == (8.0 if where in ("new", "old") else 1.0)
        return
    assert outcome.metrics["nonfinite_rows"] == 1.0
    assert torch.isfinite(outcome.rows["loss"][others]).all()
    assert torch.isfinite(outcome.grad[others]).all()


@pytest.mark.parametrize("objective", ["dppo", "ratio_clip", "unclipped"])
@pytest.mark.parametrize("value", [INF, -INF])
def test_infinite_velocity_is_not_hidden(backend, objective, value):
    """Log-ratio inf - inf or -inf - inf: the former is NaN in the loss; the latter is a ratio of 0, and both count."""
    call = bounded_call(make_problem(), "velocity", objective, dtypes=torch.float32, device=backend.device)
    velocity, _, noise, _ = call.tensors.values()
    velocity[2, 0, 0, 0] = value
    # k < 0, so u has the sign of -value
    toward = bool(-value * noise[2, 0, 0, 0] > 0)
    outcome = library(call, backend.name)
    assert outcome.metrics["nonfinite_rows"] == 1.0
    assert outcome.loss.isnan() == toward
    if not toward:
        assert outcome.rows["ratio"][2] == 0.0
        assert outcome.rows["log_ratio"][2] == -INF


def test_nan_in_the_reference_reaches_the_loss(backend):
    call = bounded_call(
        make_problem(), "velocity", "dppo", dtypes=torch.float32, device=backend.device, with_reference=True,
        kl_weight=0.1,
    )  # fmt: skip
    call.tensors["reference_velocity"][1, 0, 0, 0] = NAN
    outcome = library(call, backend.name)
    assert outcome.loss.isnan()
    assert outcome.metrics["kl_ref_mean"].isnan()
    assert outcome.metrics["nonfinite_rows"] == 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("with_reference", [False, True])
def test_inactive_rows_are_zeros_without_reading_them(backend, dtype, with_reference):
    """The operator's contract, which is what makes dropped rows free and overflow-safe."""
    new = torch.randn(3, 1, 37, device=backend.device).to(dtype)
    new[1] = NAN
    coefficients = torch.tensor([[1.0, 0.0, 0.5], [0.5, 0.0, 0.0], [0.0, 0.0, 0.0]], device=backend.device)
    grad = operator("row_grad", backend.name, backend.device)(
        new, new, new, new if with_reference else None, None, None, [0.1, 2.0, 0.1], 0, 0, 0,
        coefficients, torch.ones(1, device=backend.device), 1.0,
    )  # fmt: skip
    assert grad[1].count_nonzero() == 0
    assert torch.isfinite(grad).all()
    assert bool((grad[0] != 0).any())
    assert bool((grad[2] != 0).any())


@pytest.mark.parametrize(("form", "objective"), FORM_OBJECTIVES)
@pytest.mark.parametrize("rows", [(0,), (3, 0)], ids=str)
@pytest.mark.parametrize("option", ["mean", "kept", "sum", "none", "single_pass"])
def test_empty_batch(backend, form, objective, rows, option):
    if objective == "grpo_guard_batch" and option == "none":
        option = "mean"
    options = {"single_pass": True} if option == "single_pass" else {"reduction": option}
    call = make_call(
        make_problem(rows, (3, 5)), form, *OBJECTIVES[objective].bounded(0.1), dtypes=torch.bfloat16,
        device=backend.device, with_reference=True, kl_weight=0.1, with_weights=True, **options,
    )  # fmt: skip
    outcome = library(call, backend.name)
    assert outcome.loss.shape == (rows if option == "none" else ())
    assert outcome.loss.count_nonzero() == 0
    assert not outcome.loss.isnan().any()
    assert outcome.grad.shape == (*rows, 3, 5)
    assert outcome.grad.dtype == torch.bfloat16
    assert all(x.shape == rows for x in outcome.rows.values())
    assert outcome.metrics["nonfinite_rows"] == 0.0
    assert outcome.metrics["policy_loss"] == 0.0


def test_empty_statistics_and_step(backend):
    x = torch.zeros(0, 3, 5, device=backend.device)
    step = fast.SDEStep.from_sigmas("dance", 0.7, 0.6)
    p, q = fast.row_statistics(x, x, x, step, backend=backend.name)
    assert p.shape == q.shape == (0,)
    result = fast.sde_step(x, x, step, return_mean=True, log_prob="gaussian", backend=backend.name)
    assert result.prev_sample.shape == result.mean.shape == x.shape
    assert result.log_prob.shape == (0,)


def test_one_row_has_no_spread(backend):
    out, _ = loss_of(fast.DPPO(0.01), backend, [0.1], [1.0], [1.0])
    metrics = out.metrics().to_floats()
    assert metrics["ratio_std"] == 0.0
    assert metrics["ratio_min"] == metrics["ratio_max"]
    assert metrics["ratio_mean"] == pytest.approx(metrics["ratio_max"], rel=1e-6)


@pytest.mark.parametrize(("form", "objective"), FORM_OBJECTIVES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_policies_give_the_plain_policy_gradient(backend, form, objective, dtype):
    """The first update of a rollout: ratio 1 and KL 0 to the bit, nothing dropped, gradient ``-A * k * e / (N*R)``."""
    problem = make_problem(drift=0.0)
    # nothing moved, so there is no gap to put a bound into; any bound must do
    call = bounded_call(make_problem(), form, objective, dtypes=dtype, device=backend.device)
    names = list(call.tensors)
    call.tensors[names[0]] = call.tensors[names[1]].clone()
    outcome = library(call, backend.name)
    assert outcome.rows["log_ratio"].count_nonzero() == 0
    assert outcome.rows["kl"].count_nonzero() == 0
    assert bool((outcome.rows["ratio"] == 1.0).all())
    assert outcome.rows["kept"].all()
    metrics = outcome.metrics
    assert (metrics["ratio_mean"], metrics["ratio_std"], metrics["approx_kl"], metrics["drift_mean"]) == (1, 0, 0, 0)
    step, numel = problem.step, 105
    _, old, third, _ = (None if x is None else x.cpu().double() for x in call.tensors.values())
    e = third if form == "velocity" else (third - old) / step.std
    slope = (step.velocity_coef if form == "velocity" else 1.0) / step.std
    if objective.startswith("grpo_guard"):
        slope *= step.std / -step.dt
    advantages = call.advantages.cpu().double()[:, None, None, None]
    expected = -advantages * slope * e / (numel * 8)
    bound = 8 * torch.finfo(torch.float32).eps * expected.abs().max() + torch.finfo(dtype).eps * expected.abs()
    assert bool(((outcome.grad.double() - expected).abs() <= bound).all())
