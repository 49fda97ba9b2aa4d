"""Steps looked up on a scheduler, and steps computed on the device, against the sampler table."""

from __future__ import annotations

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

import flowdppo_fast as fast
from flowdppo_fast.samplers import diffusion
from flowdppo_fast.schedule import HostSchedule

from .recorded import ETA, SIGMAS

NUMBERS = ("sample_coef", "velocity_coef", "std", "dt")


@pytest.fixture
def scheduler():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(10)
    return scheduler


@pytest.mark.parametrize("sampler", ["flow_sde", "dance", "wan", "cps", "ode"])
def test_device_steps_are_those_of_the_sampler_table(sampler):
    """All steps of a schedule at once, ``sigma == 1`` and ``sigma' == 0`` included, from float32 levels."""
    levels = torch.tensor(SIGMAS)
    schedule = fast.ScheduleLevels.from_sigmas(levels)
    std_dev_t = diffusion(sampler, levels[:-1], levels[1:], eta=ETA, schedule=schedule)
    step = fast.SDEStep.from_levels(sampler, std_dev_t, levels[:-1], levels[1:])
    for i, expected in enumerate(fast.sde_schedule(sampler, SIGMAS, eta=ETA)):
        for name in NUMBERS:
            assert float(getattr(step, name)[i]) == pytest.approx(getattr(expected, name), rel=1e-13, abs=1e-15), name


def test_a_device_step_serves_the_sampler_and_the_losses():
    levels = torch.tensor(SIGMAS)
    step = fast.SDEStep.from_levels("dance", torch.full((3,), ETA), levels[1:4], levels[2:5])
    stacked = fast.SDEStep.stack(fast.sde_schedule("dance", SIGMAS, eta=ETA)[1:4])
    x, v, e = torch.randn(3, 3, 5).unbind(0)
    results = [fast.sde_step(x, v, s, noise=e, return_mean=True, log_prob="gaussian") for s in (step, stacked)]
    for got, expected in zip(results[0][:3], results[1][:3]):
        torch.testing.assert_close(got, expected)
    losses = [
        fast.fused_dppo_velocity_loss(v, v + 0.1, e, s, torch.ones(3), threshold=1e-3).loss for s in (step, stacked)
    ]
    torch.testing.assert_close(*losses)


def test_device_steps_refuse_an_unknown_sampler():
    level = torch.ones(1)
    with pytest.raises(ValueError, match="sampler: got 'euler', expected one of 'flow_sde'"):
        diffusion("euler", level, level / 2, eta=ETA, schedule=fast.ScheduleLevels(0.9, 0.9, 0.0))
    with pytest.raises(ValueError, match="sampler: got 'euler', expected one of 'flow_sde'"):
        fast.SDEStep.from_levels("euler", level, level, level / 2)


def test_steps_of_a_scheduler(scheduler):
    host = HostSchedule.of(scheduler)
    assert host.sigmas == scheduler.sigmas.tolist()
    assert host.indices(scheduler.timesteps[[3, 0]]) == [3, 0]
    one = host.step("flow_sde", [2, 2], ETA)
    expected = fast.sde_schedule("flow_sde", host.sigmas, eta=ETA)
    assert one.is_scalar
    assert one == expected[2]
    mixed = host.step("flow_sde", [2, 0], ETA)
    torch.testing.assert_close(mixed.std, torch.tensor([expected[2].std, expected[0].std], dtype=torch.float64))
    levels = host.step("flow_sde", [2, 2], [ETA, 0.0])
    assert levels.std.tolist() == [expected[2].std, 0.0]


def test_a_schedule_is_read_once_and_again_when_it_changes(scheduler):
    host = HostSchedule.of(scheduler)
    assert HostSchedule.of(scheduler) is host
    scheduler.set_timesteps(4)
    changed = HostSchedule.of(scheduler)
    assert changed is not host
    assert len(changed.sigmas) == 5
    scheduler.sigmas[1] = 0.5
    assert HostSchedule.of(scheduler).sigmas[1] == 0.5


def test_repeated_timesteps_mean_the_second_as_in_diffusers(scheduler):
    scheduler.timesteps = torch.tensor([900.0, 700.0, 700.0, 700.0, 100.0])
    scheduler.sigmas = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.1, 0.0])
    expected = [scheduler.index_for_timestep(t) for t in (900.0, 700.0, 100.0)]
    assert HostSchedule.of(scheduler).indices(torch.tensor([900.0, 700.0, 100.0])) == expected


def test_a_timestep_outside_the_schedule_is_an_error(scheduler):
    with pytest.raises(ValueError, match=r"timestep: got 123\.0, expected one of the scheduler's timesteps"):
        HostSchedule.of(scheduler).indices(torch.tensor([123.0]))
