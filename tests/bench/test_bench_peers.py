"""The trainers' formulas, as the benchmark times them, against the library's mathematics and against torch's own."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from bench_support import SMALL, STACKED, make_oracle
from torch.distributions import Normal, kl_divergence

from bench.ops import peers
from bench.ops.contenders import METHODS
from bench.ops.inputs import CLIP_RANGE, THRESHOLD, build_levels, build_step
from bench.ops.oracle import Oracle, Start
from bench.ops.workloads import WORKLOADS
from flowdppo_fast import sde_step

EPS = torch.finfo(torch.float64).eps


def run_double(oracle: Oracle, method: Callable) -> tuple[peers.PeerOutput, torch.Tensor]:
    """The peer formula on the oracle's own inputs, everything in float64."""
    rollout = oracle.rollout
    inputs = rollout.inputs.double()
    velocity = inputs.velocity.requires_grad_()
    levels = build_levels(rollout.workload, torch.device("cpu"), torch.float64)
    _, std = peers.step_mean(inputs.old_velocity, inputs.sample, levels)
    old_log_prob = peers.log_prob(inputs.prev_sample, inputs.old_mean, std, len(rollout.workload.rows))
    _, bound = METHODS[method]
    output = method(
        velocity, inputs.sample, inputs.prev_sample, inputs.old_mean, old_log_prob, inputs.advantages, levels, bound
    )
    return output, torch.autograd.grad(output.loss, velocity)[0]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.__name__)
@pytest.mark.parametrize("workload", [SMALL, STACKED], ids=lambda w: w.key)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_peer_formulas_equal_the_reference_in_float64(workload, dtype, method):
    oracle = make_oracle(workload, dtype)
    output, grad = run_double(oracle, method)
    objective, _ = METHODS[method]
    truth = oracle.expected(Start.CHAIN, objective)
    elements = workload.elements_per_row
    # sums of N terms, and means about 1e3 times larger than the drift between them; log-probs are of order 1
    summed, cancelled = 8 * math.sqrt(elements) * EPS, 64 * 1e3 * EPS
    assert abs(output.loss.item() - truth.loss) <= (summed + 8 * EPS) * truth.scale
    assert torch.all((output.log_ratio.reshape(-1) - truth.log_ratio).abs() <= summed)
    if objective == "dppo":
        assert torch.all((output.kl.reshape(-1) - truth.kl).abs() <= (summed + cancelled) * truth.kl)
    want = torch.stack([oracle._gradient(Start.CHAIN, objective, row) for row in range(workload.row_count)])
    assert torch.linalg.norm(grad.reshape(want.shape) - want) <= cancelled * torch.linalg.norm(want)
    assert (want == 0).all(1).any(), "no row is dropped, so the bound is not tried"


@pytest.mark.parametrize("workload", [SMALL, STACKED], ids=lambda w: w.key)
def test_step_is_the_samplers(workload):
    """Mean and standard deviation as the library's sampler has them."""
    rows, shape = len(workload.rows), (*workload.rows, *workload.latent)
    velocity, sample, noise = (torch.randn(shape, dtype=torch.float64) for _ in range(3))
    levels = build_levels(workload, torch.device("cpu"), torch.float64)
    mean, std = peers.step_mean(velocity, sample, levels)
    stepped = sde_step(
        sample, velocity, build_step(workload), noise=noise, return_mean=True, log_prob="gaussian", row_dims=rows,
        backend="reference",
    )  # fmt: skip
    torch.testing.assert_close(mean, stepped.mean, rtol=16 * EPS, atol=16 * EPS)
    prev_sample = mean + std * noise
    torch.testing.assert_close(prev_sample, stepped.prev_sample, rtol=16 * EPS, atol=16 * EPS)
    log_prob = peers.log_prob(prev_sample, mean, std, rows)
    torch.testing.assert_close(log_prob, stepped.log_prob, rtol=64 * EPS, atol=0)


def test_log_prob_and_kl_are_torchs(oracle):
    """Against torch.distributions, which shares no line with either side."""
    inputs = oracle.rollout.inputs.double()
    levels = build_levels(SMALL, torch.device("cpu"), torch.float64)
    mean, std = peers.step_mean(inputs.velocity, inputs.sample, levels)
    latent = tuple(range(1, mean.ndim))
    want = Normal(mean, std).log_prob(inputs.prev_sample).mean(latent)
    torch.testing.assert_close(peers.log_prob(inputs.prev_sample, mean, std, 1), want, rtol=64 * EPS, atol=0)
    kl = kl_divergence(Normal(inputs.old_mean, std), Normal(mean, std)).mean(latent)
    truth = oracle.expected(Start.CHAIN, "dppo").kl
    # torch divides variances and takes a logarithm: absolute rounding of order 1 per element
    torch.testing.assert_close(truth, kl, rtol=0, atol=16 * EPS)


def test_reading_metrics_gives_the_same_numbers(oracle):
    rollout = oracle.rollout
    i = rollout.inputs
    output = peers.dppo(
        i.velocity, i.sample, i.prev_sample, i.old_mean, i.old_log_prob, i.advantages, rollout.levels, THRESHOLD
    )
    read = peers.synced(output)
    assert set(read.metrics) == set(output.metrics)
    assert all(read.metrics[name] == value.item() for name, value in output.metrics.items())
    assert read.metrics["masked_fraction"] == 0.125


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("workload", [w for w in WORKLOADS if w.elements <= 1 << 20], ids=lambda w: w.key)
def test_no_decision_of_a_workload_is_left_to_rounding(workload, dtype):
    """Drops, signs and clips are as the pattern says, with room to spare in every form a contender starts from."""
    oracle = make_oracle(workload, dtype)
    for start in (Start.CHAIN, Start.VELOCITY, Start.SEEDED):
        dppo, clip = (oracle.expected(start, objective) for objective in ("dppo", "ratio_clip"))
        assert torch.all((dppo.kl / THRESHOLD - 1.0).abs() > 0.1)
        assert torch.all(dppo.log_ratio.abs() > 5e-6)
        assert torch.all((torch.expm1(dppo.log_ratio).abs() - CLIP_RANGE).abs() > 5e-6)
        assert torch.equal(dppo.kept, clip.kept)
        assert 0 < (~dppo.kept).sum() <= workload.row_count / 8
