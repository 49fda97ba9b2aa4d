"""The four numbers of every sampler's step, against the papers' updates, and the fused sampler step."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from support import oracle
from support.layouts import LAYOUTS, channels_last, trajectory_slice
from support.problems import ETA, SIGMAS, STOCHASTIC, make_problem
from support.steps import StepCall, check_step, eager_step
from support.tolerance import check_within

import flowdppo_fast as fast

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
SCHEDULE = fast.ScheduleLevels.from_sigmas(SIGMAS)


@pytest.mark.parametrize("sampler", fast.SAMPLERS)
@pytest.mark.parametrize("index", range(10))
def test_update_is_the_papers(sampler, index):
    """Index 0 starts at sigma == 1, index 9 ends at 0."""
    step = fast.SDEStep.from_sigmas(sampler, SIGMAS[index], SIGMAS[index + 1], eta=ETA, schedule=SCHEDULE)
    x, v = torch.randn(2, 3, 5, dtype=F64)
    levels = (torch.full((3,), SIGMAS[i], dtype=F64) for i in (index, index + 1))
    mean, std = oracle.sampler_step(sampler, x, v, *levels, ETA, SIGMAS)
    torch.testing.assert_close(step.sample_coef * x + step.velocity_coef * v, mean, rtol=1e-12, atol=1e-13)
    assert step.std == pytest.approx(float(std[0]), rel=1e-12, abs=1e-15)
    assert step.dt == pytest.approx(SIGMAS[index + 1] - SIGMAS[index], rel=1e-12)
    assert (step.sampler, step.sigma, step.sigma_next) == (sampler, SIGMAS[index], SIGMAS[index + 1])
    assert (step.std == 0.0) == (sampler == "ode" or (sampler in ("cps", "precise", "dance_precise") and index == 9))
    if step.std > 0.0:
        assert step.kl_scale == pytest.approx(step.velocity_coef / step.std, rel=1e-15)


def test_flow_sde_at_one_takes_the_second_level_of_the_schedule():
    step = fast.SDEStep.from_sigmas("flow_sde", 1.0, SIGMAS[1], eta=ETA, schedule=SCHEDULE)
    expected = ETA * math.sqrt(1.0 / (1.0 - SIGMAS[1])) * math.sqrt(1.0 - SIGMAS[1])
    assert step.std == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("sampler", STOCHASTIC)
def test_no_noise_level_is_the_ode(sampler):
    step = fast.SDEStep.from_sigmas(sampler, 0.7, 0.6, eta=0.0, schedule=SCHEDULE)
    assert step.sample_coef == pytest.approx(1.0, abs=1e-15)
    assert step.velocity_coef == pytest.approx(-0.1, abs=1e-15)
    assert step.std == 0.0


@pytest.mark.parametrize("sampler", ["cps", "precise", "dance_precise"])
@pytest.mark.parametrize("eta", [0.1, 0.7, 1.0, 1.5])
def test_cps_and_precise_keep_the_marginals(sampler, eta):
    """From ``x = (1-sigma)*x0 + sigma*e``, ``v = e - x0``: the next state is ``(1-sigma')*x0 + sigma'*e'``."""
    sigma, sigma_next = 0.8, 0.55
    step = fast.SDEStep.from_sigmas(sampler, sigma, sigma_next, eta=eta)
    of_data = step.sample_coef * (1.0 - sigma) - step.velocity_coef
    of_noise = step.sample_coef * sigma + step.velocity_coef
    assert of_data == pytest.approx(1.0 - sigma_next, rel=1e-12)
    assert of_noise**2 + step.std**2 == pytest.approx(sigma_next**2, rel=1e-12)


@pytest.mark.parametrize("sampler", ["flow_sde", "dance", "wan", "flash"])
def test_sde_keeps_the_marginals_to_first_order(sampler):
    """Halving a short step has to quarter what is missing from the variance of the marginal."""
    sigma, defect = 0.8, []
    for dt in (-0.02, -0.01):
        step = fast.SDEStep.from_sigmas(sampler, sigma, sigma + dt, eta=ETA, schedule=SCHEDULE)
        of_noise = step.sample_coef * sigma + step.velocity_coef
        defect.append(abs(of_noise**2 + step.std**2 - (sigma + dt) ** 2))
    assert defect[0] / defect[1] == pytest.approx(4.0, rel=0.1)


def test_precise_draws_the_same_noise_in_one_step_as_in_two():
    """Composed steps are the step between their ends: what no other sampler here has."""
    for sampler in ("precise", "dance_precise"):
        levels = (0.8, 0.6, 0.3)
        whole, first, second = (
            fast.SDEStep.from_sigmas(sampler, levels[i], levels[j], eta=0.9) for i, j in ((0, 2), (0, 1), (1, 2))
        )

        def kept(step):
            return math.sqrt(1.0 - (step.std / step.sigma_next) ** 2)

        assert kept(whole) == pytest.approx(kept(first) * kept(second), rel=1e-12)


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_ddim_is_the_papers(eta):
    """arXiv 2010.02502, Eq. 12 and 16, on predicted data and noise; at ``eta=1`` the posterior of DDPM."""
    x, noise = torch.randn(2, 3, 5, dtype=F64)
    alpha, alpha_next = 0.3, 0.45
    step = fast.SDEStep.from_alphas(alpha, alpha_next, eta=eta)
    data = (x - math.sqrt(1.0 - alpha) * noise) / math.sqrt(alpha)
    sigma = eta * math.sqrt((1.0 - alpha_next) / (1.0 - alpha)) * math.sqrt(1.0 - alpha / alpha_next)
    mean = math.sqrt(alpha_next) * data + math.sqrt(1.0 - alpha_next - sigma**2) * noise
    torch.testing.assert_close(step.sample_coef * x + step.velocity_coef * noise, mean, rtol=1e-12, atol=1e-13)
    assert step.std == pytest.approx(sigma, rel=1e-12)
    if eta == 1.0:
        beta = 1.0 - alpha / alpha_next
        posterior = math.sqrt(alpha_next) * beta / (1.0 - alpha) * data
        posterior += math.sqrt(1.0 - beta) * (1.0 - alpha_next) / (1.0 - alpha) * x
        torch.testing.assert_close(mean, posterior)
        assert step.std**2 == pytest.approx(beta * (1.0 - alpha_next) / (1.0 - alpha))
        assert torch.isfinite(torch.tensor(step.row_values())).all()


@pytest.mark.parametrize(
    ("alphas", "eta", "message"),
    [
        ((0.5, 0.4), 1.0, "alpha, alpha_next: got 0.5 -> 0.4"),
        ((0.0, 0.5), 1.0, "alpha"),
        ((0.3, 0.5), 1.1, "eta: got 1.1"),
    ],
)
def test_products_that_are_no_step_are_refused(alphas, eta, message):
    with pytest.raises(ValueError, match=message):
        fast.SDEStep.from_alphas(*alphas, eta=eta)


@pytest.mark.parametrize("kind", [float, torch.tensor, lambda x: torch.tensor(x, dtype=F64)])
def test_levels_may_be_tensors_of_a_scheduler(kind):
    """Schedulers hold float32 tensors; the step's numbers are python floats all the same."""
    levels = [kind(level) for level in SIGMAS]
    step = fast.SDEStep.from_sigmas(
        "flow_sde", levels[0], levels[1], eta=ETA, schedule=fast.ScheduleLevels.from_sigmas(levels)
    )
    plain = [float(level) for level in levels]
    expected = fast.SDEStep.from_sigmas(
        "flow_sde", plain[0], plain[1], eta=ETA, schedule=fast.ScheduleLevels.from_sigmas(plain)
    )
    assert step == expected
    assert step.is_scalar
    assert all(type(x) is float for x in (*step.row_values(), *step.sampler_values(), step.dt, step.sigma))


def test_schedule_of_steps():
    steps = fast.sde_schedule("flow_sde", SIGMAS, eta=ETA)
    assert [(s.sigma, s.sigma_next) for s in steps] == list(itertools.pairwise(SIGMAS))
    for i, step in enumerate(steps):
        assert step == fast.SDEStep.from_sigmas("flow_sde", SIGMAS[i], SIGMAS[i + 1], eta=ETA, schedule=SCHEDULE)
    assert fast.sde_schedule("flow_sde", torch.tensor(SIGMAS))[3].std == pytest.approx(steps[3].std, rel=1e-5)


def test_stacked_steps():
    steps = fast.sde_schedule("dance", SIGMAS, eta=ETA)[2:5]
    stacked = fast.SDEStep.stack(steps)
    assert not stacked.is_scalar
    assert stacked.sampler == "dance"
    assert fast.SDEStep.stack([steps[0], fast.sde_schedule("cps", SIGMAS)[1]]).sampler == "mixed"
    table = stacked.row_table((2, 3), torch.device("cpu"), F32)
    expected = torch.tensor([step.row_values() for step in steps], dtype=F64).float()
    assert torch.equal(table, expected.repeat(2, 1))
    assert stacked.row_table((2, 3), torch.device("cpu"), F32) is table, "the table is made once"
    assert stacked.row_table((2, 3), torch.device("cpu"), F64).dtype == F64
    per_sample = dataclasses.replace(
        stacked, **{n: getattr(stacked, n)[:, None] for n in ("sample_coef", "velocity_coef", "std", "dt")}
    )
    assert torch.equal(per_sample.row_table((3, 2), torch.device("cpu"), F32), expected.repeat_interleave(2, 0))


@pytest.mark.parametrize("sampler", STOCHASTIC)
@pytest.mark.parametrize("dtype", [F32, BF16, F16, F64])
@pytest.mark.parametrize("source", ["noise", "seed", "prev_sample"])
@pytest.mark.parametrize("kind", ["gaussian", "unnormalized"])
@pytest.mark.parametrize(("rows", "index"), [((4,), 3), ((4,), [1, 3, 5, 8]), ((2, 3), [2, 4, 6])], ids=str)
def test_fused_step(backend, sampler, dtype, source, kind, rows, index):
    """Next state, mean, log-prob and both gradients, in one comparison with the textbook."""
    if dtype == F64 and not backend.float64:
        pytest.skip(f"{backend.name} makes no promise for float64")
    problem = make_problem(rows, (3, 5), sampler=sampler, index=index)
    sample, velocity, noise = (
        x.to(device=backend.device, dtype=dtype) for x in (problem.state, problem.velocity, problem.noise)
    )
    call = StepCall(problem, sample, velocity, noise, log_prob=kind)
    if source == "seed":
        call.noise = fast.PhiloxNoise(3, 8)
    elif source == "prev_sample":
        _, state, _ = eager_step(problem, problem.state, problem.old_velocity, problem.noise, F64)
        call.noise, call.prev_sample = None, state.to(device=backend.device, dtype=dtype)
    check_step(call, backend.name)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("seeded", [False, True])
def test_step_in_any_layout(backend, layout, seeded):
    problem = make_problem((2, 3), (3, 4, 5), index=[2, 4, 6])
    lay = LAYOUTS[layout]
    sample, velocity, noise = (x.float().to(backend.device) for x in (problem.state, problem.velocity, problem.noise))
    source = fast.PhiloxNoise(4, 4) if seeded else noise
    plain = fast.sde_step(
        sample, velocity, problem.step, noise=source, return_mean=True, log_prob="gaussian", row_dims=2,
        backend=backend.name,
    )  # fmt: skip
    other = fast.sde_step(
        lay(sample, 2), channels_last(velocity, 2), problem.step,
        noise=source if seeded else trajectory_slice(noise, 2), return_mean=True, log_prob="gaussian", row_dims=2,
        backend=backend.name,
    )  # fmt: skip
    eps = torch.finfo(F32).eps
    check_within("state", other.prev_sample.cpu(), plain.prev_sample.cpu(), 4 * eps * 4, F32)
    check_within("mean", other.mean.cpu(), plain.mean.cpu(), 4 * eps * 4, F32)
    check_within("log_prob", other.log_prob.cpu(), plain.log_prob.cpu(), 16 * eps, F32)


def test_step_without_noise_is_its_mean(backend):
    """S == 0: whatever the noise tensor holds does not matter."""
    x, v = (torch.randn(4, 3, 5, device=backend.device) for _ in range(2))
    steps = [
        fast.SDEStep.from_sigmas("ode", 0.7, 0.6),
        fast.SDEStep.from_sigmas("cps", 0.3, 0.0),
        fast.SDEStep.from_sigmas("dance", 0.7, 0.6, eta=0.0),
        fast.SDEStep.from_sigmas("dance", 0.7, 0.6),
    ]
    noise = torch.full_like(x, math.nan)
    noise[3] = 0.5
    result = fast.sde_step(x, v, fast.SDEStep.stack(steps), noise=noise, return_mean=True, backend=backend.name)
    assert torch.equal(result.prev_sample[:3], result.mean[:3])
    assert torch.isfinite(result.prev_sample).all()
    one = fast.sde_step(x, v, steps[0], noise=noise, backend=backend.name)
    torch.testing.assert_close(one.prev_sample, x - 0.1 * v, rtol=1e-5, atol=1e-6)


def test_next_state_in_another_dtype(backend):
    x, v, e = (torch.randn(4, 3, 5, device=backend.device) for _ in range(3))
    step = fast.SDEStep.from_sigmas("dance", 0.7, 0.6)
    full = fast.sde_step(x, v, step, noise=e, backend=backend.name).prev_sample
    for dtype in (BF16, F16):
        half = fast.sde_step(x, v, step, noise=e, dtype=dtype, backend=backend.name).prev_sample
        assert half.dtype == dtype
        assert torch.equal(half, full.to(dtype)), "rounded once, to nearest even"


@pytest.mark.bits(across="rows")
def test_noise_that_was_drawn_is_returned(backend):
    x, v = (torch.randn(4, 3, 5, device=backend.device) for _ in range(2))
    step = fast.SDEStep.from_sigmas("dance", 0.7, 0.6)
    generator = torch.Generator().manual_seed(3)
    first = fast.sde_step(x, v, step, generator=generator, return_mean=True, backend=backend.name)
    expected = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(3)).to(backend.device)
    assert torch.equal(first.noise, expected)
    again = fast.sde_step(x, v, step, noise=first.noise, backend=backend.name)
    assert torch.equal(again.prev_sample, first.prev_sample)
    generators = [torch.Generator().manual_seed(i) for i in range(4)]
    per_row = fast.sde_step(x, v, step, generator=generators, backend=backend.name)
    alone = torch.randn(3, 5, generator=torch.Generator().manual_seed(2)).to(backend.device)
    assert torch.equal(per_row.noise[2], alone)
    given = fast.sde_step(x, v, step, prev_sample=first.prev_sample, backend=backend.name)
    assert given.noise is None
    assert given.prev_sample is first.prev_sample
    assert given.mean is None
    assert given.log_prob is None


def test_next_state_is_an_action_and_carries_no_gradient(backend):
    x = torch.randn(4, 3, 5, device=backend.device)
    v = torch.randn(4, 3, 5, device=backend.device, requires_grad=True)
    result = fast.sde_step(x, v, fast.SDEStep.from_sigmas("dance", 0.7, 0.6), log_prob="gaussian", backend=backend.name)
    assert not result.prev_sample.requires_grad
    assert result.log_prob.requires_grad


def test_log_prob_ratio_is_the_losses_log_ratio(backend):
    """Replay by log-probs, as trainers do it, agrees with ``P - Q/2`` up to the cancellation they pay for."""
    problem = make_problem((4,), (3, 5, 7))
    x, v, old, e = (
        t.float().to(backend.device) for t in (problem.state, problem.velocity, problem.old_velocity, problem.noise)
    )
    rollout = fast.sde_step(x, old, problem.step, noise=e, log_prob="gaussian", backend=backend.name)
    replay = fast.sde_step(
        x, v, problem.step, prev_sample=rollout.prev_sample, log_prob="gaussian", backend=backend.name
    )
    out = fast.fused_dppo_velocity_loss(v, old, e, problem.step, problem.advantages.to(x), backend=backend.name)
    torch.testing.assert_close(replay.log_prob - rollout.log_prob, out.rows.log_ratio, rtol=1e-4, atol=2e-6)
