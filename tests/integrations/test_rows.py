"""The log-prob form: the same losses as from latents, with the trainer's own log-ratio."""

from __future__ import annotations

import pytest
import torch

import flowdppo_fast as fast
from flowdppo_fast.integrations._rows import log_prob_policy_loss, squared_drift

from . import conventions
from .recorded import LATENTS, THRESHOLD, record

OBJECTIVES = {
    "dppo": fast.DPPO(THRESHOLD),
    "mean_drift": fast.DPPO(THRESHOLD, trust_region="mean_drift"),
    "symmetric": fast.DPPO(THRESHOLD, symmetric=True),
    "clip": fast.RatioClip(0.02, 0.03),
    "guard": fast.GRPOGuard(0.002, 0.003),
    "guard_batch": fast.GRPOGuard(0.002, 0.003, "batch"),
    "unclipped": fast.Unclipped(),
}


@pytest.mark.parametrize("log_prob", ["gaussian", "unnormalized"])
@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
@pytest.mark.parametrize("index", [2, [0, 1, 2, 3, 4, 5, 6, 7]], ids=["one step", "step per row"])
def test_equals_the_loss_from_latents(objective, log_prob, index):
    """Float64, with weights, clamp and a reference: loss, gradient, rows and metrics of ``fused_policy_loss``."""
    r = record("flow_sde", LATENTS["image"], index=index)
    old, reference = r.old, r.reference
    dt = r.levels[1] - r.levels[0]
    options = {"advantage_clip": 1.1, "row_weights": r.weights, "kl_weight": 0.3, "reference_kl": "without_dt"}

    v = r.leaf()
    new = r.replay(v)
    expected = fast.fused_policy_loss(
        new.mean, old.mean, r.next_state, new.std, r.advantages, objective=objective, dt=dt,
        reference_prev_sample_mean=reference.mean, log_prob=log_prob, backend="reference", **options,
    )  # fmt: skip
    (expected_grad,) = torch.autograd.grad(expected.loss, v)

    v = r.leaf()
    new = r.replay(v)
    if log_prob == "unnormalized":
        density = [conventions.squared_log_prob(r.next_state, x.mean) for x in (new, old)]
    else:
        density = [new.log_prob, old.log_prob]
    mask = isinstance(objective, fast.DPPO)
    actual = log_prob_policy_loss(
        objective, *density, r.advantages, new.std, dt=dt,
        drift=squared_drift(new.mean.detach() if mask else new.mean, old.mean, backend="reference"),
        reference_drift=squared_drift(new.mean, reference.mean, backend="reference"),
        log_prob_kind=log_prob, **options,
    )  # fmt: skip
    (actual_grad,) = torch.autograd.grad(actual.loss, v)

    torch.testing.assert_close(actual.loss, expected.loss, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(actual_grad, expected_grad, rtol=1e-9, atol=1e-13)
    for name in ("log_ratio", "ratio", "kl", "kept", "loss"):
        torch.testing.assert_close(getattr(actual.rows, name), getattr(expected.rows, name), rtol=1e-10, atol=1e-12)
    assert actual.metrics().keys() == expected.metrics().keys()
    for name, value in expected.metrics().items():
        torch.testing.assert_close(actual.metrics()[name], value, rtol=1e-10, atol=1e-12, msg=name)


def test_dropped_rows_stay_out_even_where_the_ratio_overflows():
    log_prob = torch.tensor([2000.0, 0.01, -2000.0], requires_grad=True)
    advantages, far = torch.tensor([1.0, 1.0, -1.0]), torch.tensor([1.0, 0.0, 1.0])
    out = log_prob_policy_loss(fast.DPPO(1e-3), log_prob, torch.zeros(3), advantages, 1.0, drift=far)
    out.loss.backward()
    assert out.rows.kept.tolist() == [False, True, False]
    assert log_prob.grad[0] == 0.0
    assert log_prob.grad[2] == 0.0
    torch.testing.assert_close(out.loss, -torch.tensor(0.01).exp() / 3)


def test_a_large_divergence_leaves_the_log_ratio_exact():
    """A log-ratio that was ``P - Q/2`` again would lose a small ``L`` beside a large ``Q``."""
    log_prob = torch.tensor([1e-6], requires_grad=True)
    out = log_prob_policy_loss(
        fast.DPPO(1e-3), log_prob, torch.zeros(1), torch.tensor([-1.0]), 1.0, drift=torch.tensor([4e3])
    )
    assert out.rows.log_ratio.item() == pytest.approx(1e-6, rel=1e-6)
    assert out.rows.kept.item()


def test_nan_reaches_the_loss_and_is_counted():
    out = log_prob_policy_loss(fast.RatioClip(), torch.tensor([float("nan"), 0.0]), torch.zeros(2), torch.ones(2), 1.0)
    assert torch.isnan(out.loss)
    assert out.metrics()["nonfinite_rows"] == 1


def test_without_means_there_are_no_divergence_metrics():
    out = log_prob_policy_loss(fast.RatioClip(), torch.zeros(2), torch.zeros(2), torch.ones(2), 1.0)
    assert not {"kl_new_old_mean", "kl_new_old_max", "drift_mean"} & out.metrics().keys()


@pytest.mark.parametrize(
    ("objective", "options", "message"),
    [
        (fast.DPPO(), {}, "drift: got None.*DPPO needs it"),
        (fast.GRPOGuard(), {"drift": torch.ones(2)}, "dt: got None"),
        (fast.RatioClip(), {"kl_weight": 0.1}, "kl_weight: got a positive weight without a reference"),
        (fast.RatioClip(), {"reference_kl": "without_dt", "reference_drift": torch.ones(2)}, "dt: got None"),
    ],
)
def test_says_what_is_missing(objective, options, message):
    with pytest.raises(ValueError, match=message):
        log_prob_policy_loss(objective, torch.zeros(2), torch.zeros(2), torch.ones(2), 1.0, **options)


@pytest.mark.parametrize("shape", LATENTS.values(), ids=LATENTS)
def test_squared_drift_and_its_gradient(shape):
    new = torch.randn(3, 2, *shape, dtype=torch.float64, requires_grad=True)
    old = torch.randn(3, 2, *shape, dtype=torch.float64, requires_grad=True)
    drift = squared_drift(new, old, row_dims=2, backend="reference")
    torch.testing.assert_close(drift, ((new - old) ** 2).flatten(2).mean(-1))
    weights = torch.rand(3, 2, dtype=torch.float64)
    (drift * weights).sum().backward()
    expected = 2.0 * (new - old) * conventions.lift(weights, new) / old[0, 0].numel()
    torch.testing.assert_close(new.grad, expected.detach())
    assert old.grad is None
