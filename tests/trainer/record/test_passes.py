"""Several passes through the schedule in one call, and several latents in one step."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import DiffusionPipeline

from flowdppo_fast.losses import row_statistics
from flowdppo_fast.trainer import TrajectoryRecorder


def nudge(module: torch.nn.Module, size: float) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += size * torch.randn_like(parameter)


class Several(DiffusionPipeline):
    """Denoises a second latent with a copy of the scheduler, as LTX-2 does with sound, in some chunks."""

    def __init__(self, transformer, scheduler):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, latents, sound=None, chunks=1, sound_levels=None, states=None):
        seen = []
        other = copy.deepcopy(self.scheduler)
        for chunk in range(chunks):
            first, second = latents, sound
            for scheduler in (other, self.scheduler):
                scheduler.set_timesteps(sigmas=sound_levels if scheduler is other else None, num_inference_steps=6)
            for t in self.scheduler.timesteps:
                given = first if sound is None else first + second.mean((1, 2), keepdim=True)
                velocity = self.transformer(given, timestep=t.expand(len(first)), shift=first[:, 0] * 0 + chunk)[0]
                first, before = self.scheduler.step(velocity, t, first, return_dict=False)[0], (first, second)
                if sound is not None:
                    heard = velocity[:, :3] * 2.0
                    second = other.step(heard, t, second, return_dict=False)[0]
                seen.append((*before, first, second))
                if states is not None:
                    first, second = states[len(seen) - 1][2:]
            latents = latents + 0.1 * first
        return seen


@pytest.mark.parametrize("noise", ["seeded", "stored"])
def test_latents_that_move_together_are_one_density(pipes, noise):
    toy = pipes.toy()
    pipeline, given = Several(toy.transformer, toy.scheduler), (torch.randn(3, 4, 6), torch.randn(3, 3, 6))
    recorder = TrajectoryRecorder(pipeline, noise=noise)
    with recorder.recording([1, 2], seed=3) as trajectory:
        seen = pipeline(*given)
    assert trajectory.velocity.shape == (3, 2, 24 + 18)
    check = recorder.verify(trajectory, [2, 0])
    assert check.same_geometry == 0.0
    # both latents follow from the joint velocity and noise
    drawn = trajectory.noise
    drawn = drawn.materialize((3, 2, 42), row_dims=2) if noise == "seeded" else drawn
    for place, index in enumerate([1, 2]):
        step = trajectory.sde_step[place : place + 1]
        x, after = (torch.cat([v.flatten(1) for v in pair], 1) for pair in (seen[index][:2], seen[index][2:]))
        a, b, s = (float(c) for c in (step.sample_coef, step.velocity_coef, step.std))
        torch.testing.assert_close(after, a * x + b * trajectory.velocity[:, place] + s * drawn[:, place])
    assert drawn.unique().numel() == drawn.numel()
    # log-ratios of the two add
    new = trajectory.velocity + 0.01 * torch.randn_like(trajectory.velocity)
    parts = [
        row_statistics(new[..., part].contiguous(), trajectory.velocity[..., part].contiguous(),
                       drawn[..., part].contiguous(), trajectory.sde_step, row_dims=2)
        for part in (slice(0, 24), slice(24, 42))
    ]  # fmt: skip
    whole = row_statistics(new, trajectory.velocity, drawn.contiguous(), trajectory.sde_step, row_dims=2)
    for total, first, second in zip(whole, *parts):
        torch.testing.assert_close(total * 42, first * 24 + second * 18)
    nudge(pipeline.transformer, 0.05)
    with recorder.recording([1, 2], seed=3) as fresh:
        pipeline(*given, states=seen)
    assert not torch.equal(fresh.velocity, trajectory.velocity)
    alone = torch.cat([recorder.replay(trajectory, steps=[place]) for place in range(2)], dim=1)
    assert torch.equal(alone, fresh.velocity)


def test_latents_at_different_levels_in_one_step_are_an_error(pipes):
    toy = pipes.toy()
    pipeline = Several(toy.transformer, toy.scheduler)
    with (
        pytest.raises(ValueError, match=r"Several, step 1: 2 latents are at different noise levels"),
        TrajectoryRecorder(pipeline).recording([1]),
    ):
        pipeline(torch.randn(3, 4, 6), torch.randn(3, 3, 6), sound_levels=[1.0, 0.8, 0.6, 0.4, 0.2, 0.1])


def test_every_pass_through_the_schedule_is_recorded(pipes):
    toy = pipes.toy()
    pipeline, given = Several(toy.transformer, toy.scheduler), torch.randn(3, 4, 6)
    recorder = TrajectoryRecorder(pipeline)
    with recorder.recording([0, 2], seed=3) as trajectory:
        seen = pipeline(given, chunks=3)
    assert [step.index for step in trajectory.steps] == [0, 2, 0, 2, 0, 2]
    assert recorder.verify(trajectory, [2, 0]).same_geometry == 0.0
    drawn = trajectory.noise.materialize((3, 6, 24), row_dims=2)
    assert drawn.unique().numel() == drawn.numel()
    for place, number in enumerate([0, 2, 6, 8, 12, 14]):
        step, (x, _, after, _) = trajectory.sde_step[place : place + 1], seen[number]
        a, b, s = (float(c) for c in (step.sample_coef, step.velocity_coef, step.std))
        expected = a * x + b * trajectory.velocity[:, place] + s * drawn[:, place].view_as(x)
        torch.testing.assert_close(after, expected)
    # the first pass draws what an only pass draws
    with recorder.recording([0, 2], seed=3) as only:
        pipeline(given)
    assert torch.equal(only.noise.stream, trajectory.noise.stream[:, :2])


def test_a_pass_without_a_chosen_step_is_an_error(pipes):
    class Shorter(Several):
        def __call__(self, latents):
            for count in (6, 1):
                self.scheduler.set_timesteps(6)
                for t in self.scheduler.timesteps[:count]:
                    velocity = self.transformer(latents, timestep=t.expand(3), shift=latents[:, 0])[0]
                    latents = self.scheduler.step(velocity, t, latents, return_dict=False)[0]

    toy = pipes.toy()
    pipeline = Shorter(toy.transformer, toy.scheduler)
    with (
        pytest.raises(
            ValueError, match=r"ran the chosen steps \[0\] in pass 1 through the schedule, expected \[0, 2\]"
        ),
        TrajectoryRecorder(pipeline).recording([0, 2]),
    ):
        pipeline(torch.randn(3, 4, 6))
