"""The scheduler against diffusers' own Euler step, the textbook's samplers, and its promises about noise."""

from __future__ import annotations

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
    UniPCMultistepScheduler,
)
from support import oracle

from flowdppo_fast import PhiloxNoise
from flowdppo_fast.trainer import FlowMatchSDEScheduler

# of the schedulers' own, on numpy 2
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
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
    [
        ({"shift": 3.0}, {}),
        ({"use_dynamic_shifting": True}, {"mu": 0.8}),
        ({"use_dynamic_shifting": True, "time_shift_type": "linear"}, {"mu": 0.8}),
        ({"shift_terminal": 0.1}, {}),
        ({"use_dynamic_shifting": True, "shift_terminal": 0.1}, {"mu": 1.2}),
        ({"use_karras_sigmas": True}, {}),
        ({"use_exponential_sigmas": True}, {}),
        ({"use_beta_sigmas": True}, {}),
        ({"shift": 3.0}, {"sigmas": [1.0, 0.9, 0.5, 0.3, 0.1]}),
        # CogView4 gives both, timesteps without the shift
        ({"shift": 3.0}, {"sigmas": [1.0, 0.9, 0.5, 0.3, 0.1], "timesteps": [1000, 900, 500, 300, 100]}),
    ],
)
def test_without_noise_it_is_diffusers_euler(options, arguments):
    own = FlowMatchEulerDiscreteScheduler(**options)
    expected = run(own, 5, velocity_of, **arguments)
    actual = run(FlowMatchSDEScheduler.from_config(own), 5, velocity_of, **arguments)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize(
    ("sampler", "eta"),
    [
        ("flow_sde", 0.7),
        ("dance", 0.3),
        ("wan", 1.0),
        ("flash", 0.5),
        ("cps", 0.8),
        ("precise", 1.5),
        ("dance_precise", 0.6),
    ],
)
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


FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
# what released pipelines have, and their relatives
MULTISTEP = {
    "wan": UniPCMultistepScheduler(**FLOW, flow_shift=5.0),
    "wan-karras": UniPCMultistepScheduler(**FLOW, use_karras_sigmas=True),
    "unipc-terminal": UniPCMultistepScheduler(**FLOW, final_sigmas_type="sigma_min"),
    "sana": DPMSolverMultistepScheduler(**FLOW, flow_shift=3.0),
    "stochastic-solver": DPMSolverMultistepScheduler(**FLOW, flow_shift=3.0, algorithm_type="sde-dpmsolver++"),
    "singlestep": DPMSolverSinglestepScheduler(**FLOW, flow_shift=2.0, lower_order_final=True),
    "deis": DEISMultistepScheduler(**FLOW, flow_shift=2.0),
}


@pytest.mark.parametrize("name", MULTISTEP)
def test_of_multistep_schedulers_the_levels_are_taken_and_euler_steps_made(name):
    own = MULTISTEP[name]
    own.set_timesteps(6)
    ours = FlowMatchSDEScheduler.from_config(own, sde_steps=[2])
    states = run(ours, 6, velocity_of)
    assert type(ours) is type(own)
    assert torch.equal(ours.sigmas, own.sigmas)
    assert torch.equal(ours.timesteps, own.timesteps)
    for index in (0, 1, 3, 4):
        step = (ours.sigmas[index + 1] - ours.sigmas[index]) * velocity_of(index)
        torch.testing.assert_close(states[index + 1], states[index] + step, rtol=0, atol=4e-6)
    drawn = states[3] - states[2]
    assert float((drawn - (ours.sigmas[3] - ours.sigmas[2]) * velocity_of(2)).abs().max()) > 0.1


def test_uni_pc_starts_at_pure_noise_so_that_its_first_step_can_be_trained():
    def first_of(source, *arguments, **options):
        made = []
        scheduler = FlowMatchSDEScheduler.from_config(source, sde_steps=[0], on_step=lambda _, t: made.append(t))
        scheduler.set_timesteps(*arguments, **options)
        scheduler.step(torch.zeros(SHAPE), scheduler.timesteps[0], torch.zeros(SHAPE))
        return scheduler, made[0].step

    ours, step = first_of(MULTISTEP["wan"], 10)
    _, euler = first_of(FlowMatchEulerDiscreteScheduler(), sigmas=[1.0, *ours.sigmas[1:-1].tolist()])
    assert step == euler
    assert 0 < step.std < 1


def test_a_config_without_its_scheduler_gives_the_same_levels():
    for own in (MULTISTEP["wan"], FlowMatchEulerDiscreteScheduler(shift=3.0)):
        levels = []
        for given in (own, {**own.config, "_class_name": type(own).__name__}):
            ours = FlowMatchSDEScheduler.from_config(given)
            ours.set_timesteps(5)
            levels.append(ours.sigmas)
        assert torch.equal(levels[0], levels[1])
    # a config that was never in a file names no class: Euler's is known by its keys
    plain = FlowMatchSDEScheduler.from_config(FlowMatchEulerDiscreteScheduler(shift=3.0).config)
    plain.set_timesteps(5)
    assert torch.equal(plain.sigmas, levels[0])
    with pytest.raises(ValueError, match=r"config: got a FrozenDict with _class_name='', expected a scheduler"):
        FlowMatchSDEScheduler.from_config(MULTISTEP["wan"].config)


def test_a_shift_that_was_set_by_hand_is_kept():
    own = FlowMatchEulerDiscreteScheduler(shift=3.0)
    own.set_shift(7.0)
    ours = FlowMatchSDEScheduler.from_config(own)
    own.set_timesteps(5)
    ours.set_timesteps(5)
    assert torch.equal(ours.sigmas, own.sigmas)


def test_img2img_starts_in_the_middle_of_the_schedule():
    seen = []
    scheduler = FlowMatchSDEScheduler.from_config(
        FlowMatchEulerDiscreteScheduler(), sde_steps=[3],
        on_step=lambda index, transition: seen.append((index, transition is not None)),
    )  # fmt: skip
    scheduler.set_timesteps(6)
    scheduler.set_begin_index(2)
    x = torch.randn(SHAPE)
    torch.testing.assert_close(
        scheduler.scale_noise(x, scheduler.timesteps[2:3], torch.zeros(SHAPE)), (1 - scheduler.sigmas[2]) * x
    )
    for t in scheduler.timesteps[2:]:
        x = scheduler.step(velocity_of(0), t, x, return_dict=False)[0]
    assert seen == [(2, False), (3, True), (4, False), (5, False)]


def test_tokens_at_another_timestep_are_held_still():
    seen = {}
    scheduler = FlowMatchSDEScheduler.from_config(
        FlowMatchEulerDiscreteScheduler(), sde_steps=[1],
        on_step=lambda index, transition: seen.__setitem__(index, transition),
    )  # fmt: skip
    scheduler.set_timesteps(4)
    state, velocity = torch.randn(2, 5, 3), torch.randn(2, 5, 3)
    moving = torch.tensor([False, True, True, True, True]).expand(2, -1)
    for t in scheduler.timesteps[:2]:
        before = state
        # with a timestep per token pipelines give the negated velocity
        state = scheduler.step(-velocity, t, state, per_token_timesteps=t * moving, return_dict=False)[0]
        assert torch.equal(state[:, 0], before[:, 0])
        assert (state[:, 1:] != before[:, 1:]).all()
    assert torch.equal(seen[1].active[..., 0], moving)
    assert torch.equal(seen[1].velocity, velocity)
    step, noise = seen[1].step, seen[1].noise.materialize(velocity.shape)
    expected = step.sample_coef * before + step.velocity_coef * velocity + step.std * noise
    torch.testing.assert_close(state[:, 1:], expected[:, 1:], rtol=0, atol=1e-5)


def test_timesteps_per_token_must_be_of_this_step_and_of_tokens():
    scheduler = FlowMatchSDEScheduler.from_config(FlowMatchEulerDiscreteScheduler(), sde_steps=[0])
    scheduler.set_timesteps(4)
    image, tokens = torch.zeros(2, 3, 4, 4), torch.zeros(2, 5, 3)
    with pytest.raises(ValueError, match=r"per_token_timesteps: .* for a sample \[2, 3, 4, 4\]"):
        scheduler.step(image, scheduler.timesteps[0], image, per_token_timesteps=torch.full((2, 3), 1000.0))
    scheduler.timesteps[0] = 900.0
    with pytest.raises(ValueError, match=r"at timestep level 0.9, expected tokens \[B, L, C\] at sigma=1"):
        scheduler.step(tokens, scheduler.timesteps[0], tokens, per_token_timesteps=torch.full((2, 5), 900.0))


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
        ({"sampler": "cps", "eta": 2.5, "sde_steps": [0]}, "eta: got 2.5"),
        ({"eta": 3.0, "sde_steps": [0]}, "step 0 of 5 .* overshoots .* lower eta"),
    ],
)
def test_settings_that_cannot_be_trained_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        FlowMatchSDEScheduler.from_config(FlowMatchEulerDiscreteScheduler(), **options).set_timesteps(5)


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (DDIMScheduler(), "DDIMScheduler, expected a flow-matching"),
        (UniPCMultistepScheduler(), "UniPCMultistepScheduler, expected a flow-matching"),
        (
            UniPCMultistepScheduler(use_flow_sigmas=True),
            "expected a flow-matching .* prediction_type='flow_prediction'",
        ),
        (
            FlowMatchHeunDiscreteScheduler(),
            "FlowMatchHeunDiscreteScheduler, expected one Euler step per transformer call",
        ),
        (FlowMatchLCMScheduler(), "FlowMatchLCMScheduler, expected one Euler step .* sampler 'cps' with eta=1"),
        (FlowMatchEulerDiscreteScheduler(invert_sigmas=True), "invert_sigmas=True"),
        (FlowMatchEulerDiscreteScheduler(stochastic_sampling=True), "stochastic_sampling=True"),
    ],
)
def test_schedulers_of_another_kind_are_errors(scheduler, message):
    with pytest.raises(ValueError, match=message):
        FlowMatchSDEScheduler.from_config(scheduler)


class Stretched(FlowMatchEulerDiscreteScheduler):
    """A scheduler of a user's own, with levels of its own."""

    def set_timesteps(self, *args, **kwargs):
        super().set_timesteps(*args, **kwargs)
        self.sigmas = self.sigmas**0.5
        self.timesteps = self.sigmas[:-1] * 1000


class Counting(FlowMatchEulerDiscreteScheduler):
    def step(self, *args, **kwargs):
        return super().step(*args, **kwargs)


def test_levels_of_a_subclass_and_edited_ones_are_those_of_the_steps():
    made = []
    own = Stretched(shift=3.0)
    scheduler = FlowMatchSDEScheduler.from_config(own, sde_steps=[1, 3], on_step=lambda _, t: made.append(t))
    assert isinstance(scheduler, Stretched)
    own.set_timesteps(6)
    scheduler.set_timesteps(6)
    assert torch.equal(scheduler.sigmas, own.sigmas)
    x = torch.zeros(SHAPE)
    for index, t in enumerate(scheduler.timesteps):
        if index == 3:
            # as pipelines do that move the schedule on the way
            scheduler.sigmas[3] -= 0.01
        x = scheduler.step(velocity_of(index), t, x, return_dict=False)[0]
    levels = own.sigmas.tolist()
    assert [made[1].step.sigma, made[1].step.sigma_next] == levels[1:3]
    assert made[3].step.sigma == pytest.approx(levels[3] - 0.01)


@pytest.mark.parametrize("patched", [False, True])
def test_a_step_of_ones_own_is_refused_by_name(patched):
    own = FlowMatchEulerDiscreteScheduler() if patched else Counting()
    if patched:
        own.step = lambda *args, **kwargs: None
    with pytest.raises(ValueError, match=rf"config: {type(own).__name__} has a step\(\) of its own, expected Euler's"):
        FlowMatchSDEScheduler.from_config(own)


def test_levels_that_do_not_descend_are_an_error():
    scheduler = FlowMatchSDEScheduler.from_config(FlowMatchEulerDiscreteScheduler())
    with pytest.raises(
        ValueError, match=r"scheduler: got levels \[0.5, 0.9, 0.1, 0.0\] for 3 timesteps, expected one more"
    ):
        scheduler.set_timesteps(sigmas=[0.5, 0.9, 0.1])
