"""Metrics of micro-batches and the moving average, against what they say they are."""

from __future__ import annotations

import pytest
import torch

from flowdppo_fast import DPPO, SDEStep, fused_policy_velocity_loss
from flowdppo_fast.trainer.metrics import micro_vector, reduce_micro
from flowdppo_fast.trainer.weights.ema import MovingAverage, holding


def loss_of(rows: int, moved: int):
    """A loss whose first ``moved`` of ``rows`` rows differ from the old policy."""
    old, noise = torch.randn(2, rows, 16)
    new = old.clone()
    new[:moved] += 0.1
    step = SDEStep.from_sigmas("dance", 0.8, 0.6, eta=0.5)
    advantages = torch.linspace(-1, 1, rows)
    return fused_policy_velocity_loss(new, old, noise, step, advantages, objective=DPPO(1e-3), single_pass=True)


def test_only_rows_after_the_first_update_count_as_moved():
    out = loss_of(8, 6)
    for on_policy in (False, True):
        values = reduce_micro([micro_vector(out, DPPO(1e-3), 16, on_policy=on_policy)], [1.0], out.metric_names)
        assert values["ratio_moved_fraction"] == (0.0 if on_policy else 0.75)
        floor = out.rows.log_ratio.abs().max() if on_policy else 0.0
        assert values["replay_log_ratio_max"] == floor


def test_micro_batches_of_unequal_size_combine_to_those_of_the_whole():
    parts = [loss_of(6, 3), loss_of(2, 2)]
    vectors = [micro_vector(out, DPPO(1e-3), 16, on_policy=False) for out in parts]
    values = reduce_micro(vectors, [0.75, 0.25], parts[0].metric_names)
    rows = [torch.cat(lines) for lines in zip(*(out.rows for out in parts))]
    _, ratio, kl, kept, loss = rows
    expected = {
        "loss": loss.mean(), "kl_new_old_mean": kl.mean(), "kl_new_old_max": kl.max(), "ratio_min": ratio.min(),
        "ratio_max": ratio.max(), "masked_fraction": (~kept).float().mean(), "ratio_moved_fraction": 5 / 8,
    }  # fmt: skip
    for name, value in expected.items():
        assert float(values[name]) == pytest.approx(float(value), rel=1e-5), name
    assert "ratio_std" not in values


def test_moving_average_is_the_recursion_and_gives_the_weights_back():
    parameters = [torch.randn(3, 4), torch.randn(5)]
    average = MovingAverage(parameters, 0.9)
    expected = [p.double() for p in parameters]
    for _ in range(4):
        for p in parameters:
            p += torch.randn_like(p)
        average.update()
        expected = [0.9 * e + 0.1 * p.double() for e, p in zip(expected, parameters)]
    own = [p.clone() for p in parameters]
    with holding(parameters, average.averages):
        for p, e in zip(parameters, expected):
            # four float32 updates
            torch.testing.assert_close(p.double(), e, rtol=4 * 1.2e-7, atol=4 * 1.2e-7)
    assert all(torch.equal(p, o) for p, o in zip(parameters, own))
