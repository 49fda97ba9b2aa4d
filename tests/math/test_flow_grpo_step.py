"""``sde_step_with_logprob`` against flow_grpo's formula, written here in eager torch."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from support.oracle import lift
from support.problems import SIGMAS
from support.tolerance import check_within, eager_bound

import flowdppo_fast as fast

F32, F64 = torch.float32, torch.float64
LATENTS = {"image": (4, 6, 5), "packed": (12, 8), "video": (2, 3, 4, 5)}


class Scheduler:
    """The two members of diffusers' flow schedulers that the function reads."""

    def __init__(self, sigmas: list[float]):
        self.sigmas = torch.tensor(sigmas)
        self.timesteps = self.sigmas[:-1] * 1000

    def index_for_timestep(self, timestep: torch.Tensor) -> int:
        return int((self.timesteps == timestep.cpu()).nonzero()[0])


def eager(scheduler, model_output, timestep, sample, noise_level, sde_type, noise=None, prev_sample=None, dtype=F32):
    """Flow-GRPO's and Flow-CPS' step and log-prob: ``(prev_sample, log_prob, mean, std_dev_t, sqrt_dt)``."""
    index = [scheduler.index_for_timestep(t) for t in timestep]
    sigmas = scheduler.sigmas.to(dtype)
    v, x = model_output.to(dtype), sample.to(dtype)
    sigma, sigma_next = lift(sigmas[index], x), lift(sigmas[[i + 1 for i in index]], x)
    dt = sigma_next - sigma
    if sde_type == "sde":
        std_dev_t = torch.sqrt(sigma / (1 - torch.where(sigma == 1, sigmas[1], sigma))) * noise_level
        drift = v * (1 + std_dev_t**2 * (1 - sigma) / (2 * sigma)) * dt
        mean = x * (1 + std_dev_t**2 / (2 * sigma) * dt) + drift
        std = std_dev_t * torch.sqrt(-dt)
    else:
        std_dev_t = std = sigma_next * math.sin(noise_level * math.pi / 2)
        data, pure_noise = x - sigma * v, x + (1 - sigma) * v
        mean = data * (1 - sigma_next) + pure_noise * torch.sqrt(sigma_next**2 - std**2)
    if prev_sample is None:
        prev_sample = mean + std * noise.to(dtype)
    prev_sample = prev_sample.to(dtype).detach()
    log_prob = -((prev_sample - mean) ** 2)
    if sde_type == "sde":
        log_prob = log_prob / (2 * std**2) - torch.log(std) - torch.log(torch.sqrt(2 * torch.as_tensor(math.pi)))
    return prev_sample, log_prob.flatten(1).mean(1), mean, std_dev_t, torch.sqrt(-dt)


NAMES = ("prev_sample", "log_prob", "mean", "std_dev_t", "sqrt_dt")


@pytest.mark.parametrize("latent", LATENTS)
@pytest.mark.parametrize("sde_type", ["sde", "cps"])
@pytest.mark.parametrize("given", [False, True], ids=["drawn", "prev_sample"])
@pytest.mark.parametrize("steps", [[0, 0, 0], [3, 3, 3], [1, 4, 8]], ids=["first", "one", "different"])
@pytest.mark.parametrize("dtype", [F32, torch.bfloat16])
def test_same_as_eager(latent, sde_type, given, steps, dtype):
    shape = (3, *LATENTS[latent])
    scheduler = Scheduler(SIGMAS)
    timestep = scheduler.timesteps[steps]
    x, v, e = (torch.randn(shape).to(dtype) for _ in range(3))
    v.requires_grad_()
    options = {"generator": torch.Generator().manual_seed(5)}
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(5))
    prev_sample = None
    if given:
        prev_sample = eager(scheduler, v.detach(), timestep, x, 0.7, sde_type, noise)[0] + 0.01 * e
        options = {"prev_sample": prev_sample}
    result = fast.sde_step_with_logprob(
        scheduler, v, timestep, x, noise_level=0.7, sde_type=sde_type, return_sqrt_dt=True, **options
    )
    assert len(result) == 5
    answers = {}
    for precision in (F32, F64):
        leaf = v.detach().to(precision).requires_grad_()
        outputs = eager(scheduler, leaf, timestep, x, 0.7, sde_type, noise, prev_sample, precision)
        (of_log_prob,) = torch.autograd.grad(outputs[1].sum(), leaf, retain_graph=True)
        (of_mean,) = torch.autograd.grad((outputs[2] * e.to(precision)).sum(), leaf)
        answers[precision] = [*(x.detach() for x in outputs), of_log_prob, of_mean]
    (of_log_prob,) = torch.autograd.grad(result[1].sum(), v, retain_graph=True)
    (of_mean,) = torch.autograd.grad((result[2] * e.float()).sum(), v)
    assert all(x.dtype == F32 for x in result)
    assert of_log_prob.dtype == of_mean.dtype == dtype
    actual = [*result, of_log_prob, of_mean]
    for name, value, exact, rough in zip([*NAMES, "dlog_prob", "dmean"], actual, answers[F64], answers[F32]):
        check_within(name, value, exact, eager_bound(exact, rough, F32), F32)
    # shapes that their loss code relies on
    assert result[1].shape == (3,)
    assert result[3].shape == result[4].shape == (3,) + (1,) * (len(shape) - 1)


def test_signature_is_flow_grpos():
    parameters = inspect.signature(fast.sde_step_with_logprob).parameters
    assert list(parameters)[1:] == [
        "model_output", "timestep", "sample", "noise_level", "prev_sample", "generator", "sde_type", "return_sqrt_dt",
    ]  # fmt: skip
    defaults = {name: p.default for name, p in parameters.items() if p.default is not inspect.Parameter.empty}
    assert defaults == {
        "noise_level": 0.7, "prev_sample": None, "generator": None, "sde_type": "sde", "return_sqrt_dt": False,
    }  # fmt: skip


def test_four_values_unless_asked():
    scheduler = Scheduler(SIGMAS)
    x = torch.randn(2, 4, 6, 5)
    assert len(fast.sde_step_with_logprob(scheduler, x, scheduler.timesteps[[2, 2]], x)) == 4


@pytest.mark.parametrize("sde_type", ["sde", "cps"])
def test_last_steps_of_a_rollout_do_not_stop_it(sde_type):
    """Pipelines call it on every step: the last one, and evaluation without noise, have no density but a next state."""
    scheduler = Scheduler(SIGMAS)
    x, v = torch.randn(2, 2, 4, 6, 5)
    state, log_prob, mean, _ = fast.sde_step_with_logprob(
        scheduler, v, scheduler.timesteps[[9, 9]], x, sde_type=sde_type
    )
    assert torch.isfinite(state).all()
    assert torch.isfinite(log_prob).all()
    if sde_type == "cps":
        assert torch.equal(state, mean)
        torch.testing.assert_close(state, x - SIGMAS[9] * v)
    state, _, mean, std_dev_t = fast.sde_step_with_logprob(
        scheduler, v, scheduler.timesteps[[3, 3]], x, noise_level=0.0, sde_type=sde_type
    )
    assert torch.equal(state, mean)
    torch.testing.assert_close(state, x + (SIGMAS[4] - SIGMAS[3]) * v, rtol=1e-5, atol=1e-6)
    assert std_dev_t.count_nonzero() == 0


def test_given_state_and_generator_exclude_each_other():
    scheduler = Scheduler(SIGMAS)
    x = torch.randn(2, 4, 6, 5)
    with pytest.raises(ValueError, match="prev_sample"):
        fast.sde_step_with_logprob(
            scheduler, x, scheduler.timesteps[[2, 2]], x, prev_sample=x, generator=torch.Generator()
        )


def test_with_the_scheduler_of_diffusers():
    schedulers = pytest.importorskip("diffusers.schedulers")
    scheduler = schedulers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(10)
    x, v = torch.randn(2, 2, 4, 6, 5)
    timestep = scheduler.timesteps[[2, 5]]
    result = fast.sde_step_with_logprob(
        scheduler, v, timestep, x, generator=torch.Generator().manual_seed(1), return_sqrt_dt=True
    )
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    for actual, expected in zip(result, eager(scheduler, v, timestep, x, 0.7, "sde", noise)):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
