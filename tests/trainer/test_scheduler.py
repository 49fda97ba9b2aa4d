"""The scheduler against diffusers' own Euler step, the textbook's samplers, and its promises about noise."""

from __future__ import annotations

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from support import oracle

from flowdppo_fast import PhiloxNoise
from flowdppo_fast.trainer import FlowMatchSDEScheduler

SHAPE = (3, 4, 6, 6)


def run(scheduler, steps: int, velocity_of, **arguments):
    """All states ``[T+1, B, ...]`` of a toy denoising loop."""
    scheduler.set_timesteps(steps, **arguments)
    states = [torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))]
    for index, t in enumerate(scheduler.timesteps):
        states.append(scheduler.step(velocity_of(index), t, states[-1], return_dict=False)[0])
    return torch.stack(states)


def velocity_of(index: int) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(100 + index))


@pytest.mark.parametrize(
    ("options", "arguments"),
    [({"shift": 3.0}, {}), ({"use_dynamic_shifting": True}, {"mu": 0.8}), ({"shift_terminal": 0.1}, {})],
)
def test_without_noise_it_is_diffusers_euler(options, arguments):
    own = FlowMatchEulerDiscreteScheduler(**options)
    expected = run(own, 5, velocity_of, **arguments)
    actual = run(FlowMatchSDEScheduler.from_config(own), 5, velocity_of, **arguments)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize(("sampler", "eta"), [("flow_sde", 0.7), ("dance", 0.3), ("wan", 1.0), ("cps", 0.8)])
def test_chosen_steps_follow_the_textbook(sampler, eta):
    seen = {}
    scheduler = FlowMatchSDEScheduler.from_config(
        FlowMatchEulerDiscreteScheduler(shift=3.0), sampler=sampler, eta=eta, sde_steps=[0, 2],
        on_step=lambda index, transition: seen.__setitem__(index, transition),
    )  # fmt: skip
    states = run(scheduler, 5, velocity_of).double()
    sigmas = scheduler.sigmas.double().tolist()
    assert [seen[index] is not None for index in range(5)] == [True, False, True, False, False]
    for index in range(5):
        level, following = (torch.full((3,), sigmas[index + k], dtype=torch.float64) for k in (0, 1))
        name = sampler if seen[index] is not None else "ode"
        mean, std = oracle.sampler_step(name, states[index], velocity_of(index).double(), level, following, eta, sigmas)
        if seen[index] is not None:
            mean = mean + oracle.lift(std, mean) * seen[index].noise.materialize(SHAPE, dtype=torch.float64)
            assert torch.equal(seen[index].velocity, velocity_of(index))
        # one float32 rounding of each of a handful of terms
        torch.testing.assert_close(states[index + 1], mean, rtol=0, atol=8 * 1.2e-7 * float(mean.abs().max()))


def test_rows_keep_their_noise_however_the_rollout_is_cut():
    def streams(rows: slice, first_row: int) -> torch.Tensor:
        kept = []
        scheduler = FlowMatchSDEScheduler.from_config(
            FlowMatchEulerDiscreteScheduler(), sde_steps=[0, 1], seed=5, first_row=first_row,
            on_step=lambda _, transition: kept.append(transition),
        )  # fmt: skip
        scheduler.set_timesteps(4)
        for t in scheduler.timesteps:
            scheduler.step(torch.zeros(SHAPE)[rows], t, torch.zeros(SHAPE)[rows])
        return torch.stack([transition.noise.stream for transition in kept if transition], dim=1)

    whole = streams(slice(None), 0)
    assert torch.equal(whole, torch.cat([streams(slice(0, 2), 0), streams(slice(2, 3), 2)]))
    assert whole.unique().numel() == whole.numel()


def test_stored_noise_is_the_seeded_noise():
    draws = {}
    for kind in ("seeded", "stored"):
        scheduler = FlowMatchSDEScheduler.from_config(
            FlowMatchEulerDiscreteScheduler(), sde_steps=[1], seed=9, noise=kind,
            on_step=lambda _, transition, kind=kind: transition and draws.__setitem__(kind, transition.noise),
        )  # fmt: skip
        run(scheduler, 4, velocity_of)
    assert isinstance(draws["seeded"], PhiloxNoise)
    assert torch.equal(draws["stored"], draws["seeded"].materialize(SHAPE))


def test_multistep_flow_schedulers_give_their_shift():
    own = UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=5.0)
    assert FlowMatchSDEScheduler.from_config(own).shift == 5.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sde_steps": [4]}, "last step, step 4 of 5"),
        ({"sde_steps": [7]}, "got step 7, expected 0 to 3"),
        ({"sde_steps": [1, 1]}, "different step indices"),
        ({"sde_steps": [1], "eta": 0.0}, "draw no noise"),
        ({"sde_steps": [1], "sampler": "ode"}, "draw no noise"),
        ({"sampler": "euler"}, "sampler: got 'euler'"),
        ({"noise": "none"}, "noise: got 'none'"),
        ({"sampler": "cps", "eta": 1.5, "sde_steps": [0]}, "eta: got 1.5"),
    ],
)
def test_settings_that_cannot_be_trained_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        FlowMatchSDEScheduler.from_config(FlowMatchEulerDiscreteScheduler(), **options).set_timesteps(5)


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (DDIMScheduler(), "DDIMScheduler, expected a flow-matching"),
        (FlowMatchEulerDiscreteScheduler(invert_sigmas=True), "invert_sigmas=True"),
        (FlowMatchEulerDiscreteScheduler(stochastic_sampling=True), "stochastic_sampling=True"),
    ],
)
def test_schedulers_of_another_kind_are_errors(scheduler, message):
    with pytest.raises(ValueError, match=message):
        FlowMatchSDEScheduler.from_config(scheduler)
