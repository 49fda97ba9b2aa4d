"""Recorders: which steps they keep, in which order, what they leave behind, and what they refuse."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from flowdppo_fast.integrations import dance_grpo, flow_grpo, mix_grpo

from .page_scripts import registered
from .recorded import SIGMAS

LEVELS = torch.tensor(SIGMAS)


@pytest.fixture
def scheduler():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(10)
    return scheduler


@pytest.fixture
def pipeline():
    """A module of flow_grpo with a step function of its own."""
    module = ModuleType("flow_grpo.diffusers_patch.any_pipeline")

    def sde_step_with_logprob(
        self, model_output, timestep, sample, noise_level=0.7, prev_sample=None, generator=None, sde_type="sde"
    ):
        return flow_grpo.sde_step_with_logprob(
            self, model_output, timestep, sample, noise_level, prev_sample, generator, sde_type
        )

    module.sde_step_with_logprob = sde_step_with_logprob
    with registered(module):
        yield module


def rollout(pipeline, scheduler, noise_levels, rows=2, dtype=torch.float32):
    """States, velocities and means of one trajectory, by the module's own step; a silent replay after every step."""
    x, seen = torch.randn(rows, 4, 3), []
    for t, noise_level in zip(scheduler.timesteps, noise_levels):
        v = torch.randn_like(x).to(dtype)
        before = x
        x, _, mean, _ = pipeline.sde_step_with_logprob(scheduler, v, t.unsqueeze(0), before, noise_level=noise_level)
        pipeline.sde_step_with_logprob(scheduler, v, t.unsqueeze(0), before, prev_sample=x)
        seen.append((mean, v))
    return seen


@pytest.mark.parametrize("keep", ["means", "velocities"])
def test_steps_that_draw_noise_are_columns(pipeline, scheduler, keep):
    """A window as the Fast pipelines have it: no column for steps without noise or for states that are scored again."""
    step = pipeline.sde_step_with_logprob
    with flow_grpo.record(keep=keep) as old:
        assert pipeline.sde_step_with_logprob is not step
        seen = rollout(pipeline, scheduler, [0, 0.7, 0.7, 0], dtype=torch.bfloat16)
    assert pipeline.sde_step_with_logprob is step
    expected = torch.stack([pair[keep == "velocities"] for pair in seen[1:3]], dim=1)
    kept = old.means() if keep == "means" else old.velocities()
    assert torch.equal(kept, expected)
    assert kept.dtype == (torch.float32 if keep == "means" else torch.bfloat16)
    with pytest.raises(ValueError, match=r"got a record that keeps \w+, expected record\(keep="):
        _ = old.velocities() if keep == "means" else old.means()


def test_trajectories_are_rows_in_their_order(pipeline, scheduler):
    """Several sampling calls under one record, and a record that is opened again starts anew."""
    old = flow_grpo.record()
    for rows in ((2, 3), (1,)):
        with old:
            runs = [rollout(pipeline, scheduler, [0.7] * 3, rows=count) for count in rows]
        expected = torch.cat([torch.stack([mean for mean, _ in run], dim=1) for run in runs])
        assert torch.equal(old.means(), expected)


def test_an_error_in_the_rollout_leaves_the_step_in_place(pipeline, scheduler):
    step = pipeline.sde_step_with_logprob
    with pytest.raises(ZeroDivisionError), flow_grpo.record():
        _ = 1 / 0
    assert pipeline.sde_step_with_logprob is step


def test_wans_step_is_seen_too():
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    scheduler.set_timesteps(10)
    module = ModuleType("elsewhere")
    module.sde_step_with_logprob = flow_grpo.wan_sde_step_with_logprob
    x = torch.randn(1, 2, 1, 3, 3)
    with flow_grpo.record(modules=[module]) as old:
        for t, determistic in zip(scheduler.timesteps[:3], (True, False, False)):
            module.sde_step_with_logprob(scheduler, x, t.unsqueeze(0), x, determistic=determistic)
    assert module.sde_step_with_logprob is flow_grpo.wan_sde_step_with_logprob
    assert old.means().shape == (1, 2, 2, 1, 3, 3)


def test_what_a_record_cannot_do_is_said(pipeline, scheduler):
    with pytest.raises(ValueError, match="keep: got 'noise', expected 'means' or 'velocities'"):
        flow_grpo.record(keep="noise")
    with pytest.raises(RuntimeError, match="got no flux_step in the script or in a loaded module of fastvideo"):
        dance_grpo.record().__enter__()
    with flow_grpo.record() as old:
        rollout(pipeline, scheduler, [0, 0])
    with pytest.raises(RuntimeError, match="means: got no step that drew noise"):
        old.means()
    with old:
        rollout(pipeline, scheduler, [0.7, 0.7])
        rollout(pipeline, scheduler, [0.7])
    with pytest.raises(RuntimeError, match=r"means: got trajectories of \[1, 2\] steps"):
        old.means()


def test_dance_means_with_and_without_a_graph():
    """The rollout's means by trajectory; a replay's with its graph, and the standard deviation of its step."""
    module = ModuleType("fastvideo.train")

    def flux_step(model_output, latents, eta, sigmas, index, prev_sample, grpo, sde_solver):
        raise AssertionError("the script's own step ran")

    module.flux_step = flux_step
    exec("def sample(call):\n    return call(flux_step)\n", vars(module))
    old = dance_grpo.record()
    x, v = torch.randn(2, 1, 6, 4)

    def two_trajectories(step):
        results = []
        for _ in range(2):
            z = x
            for i in range(3):
                z, original, log_prob = step(v, z, 0.3, LEVELS, index=i, prev_sample=None, grpo=True, sde_solver=True)
                results.append((z, original, log_prob))
        return results

    assert len(old(module.sample)(two_trajectories)) == 6
    assert module.flux_step is flux_step
    assert old.means().shape == (2, 3, 6, 4)
    new, leaf = dance_grpo.record(), v.clone().requires_grad_()
    replay = new(module.sample)
    z, _, log_prob = replay(lambda step: step(leaf, x, 0.3, LEVELS, 0, x, True, True))
    assert torch.equal(z, x)
    assert log_prob.shape == (1,)
    torch.testing.assert_close(new.mean.detach(), old.means()[:1, 0])
    assert new.std == dance_grpo.transition_std(0.3, LEVELS, 0)
    new.mean.sum().backward()
    assert leaf.grad.abs().min() > 0
    mean, _ = replay(lambda step: step(v, x, 0.3, LEVELS, 0, None, False, True))
    torch.testing.assert_close(mean, old.means()[:1, 0])


def test_a_dpm_step_with_noise_is_refused():
    """Its replay would draw another state; the deterministic ones after the window are columns."""
    module = ModuleType("fastvideo.utils.sampling_utils")

    def dpm_step(args, model_output, sample, step_index, timesteps, sigmas, sde_solver=False):
        return sample + 1.0, model_output, torch.zeros(1)

    module.dpm_step = dpm_step
    x = torch.randn(1, 6, 4)
    with registered(module), mix_grpo.record() as old:
        for i in range(2):
            module.dpm_step(None, x, x, i, LEVELS[:-1], LEVELS)
        with pytest.raises(
            ValueError, match="dpm_apply_strategy: got a DPM-Solver step with noise, expected DPM-Solver"
        ):
            module.dpm_step(None, x, x, 2, LEVELS[:-1], LEVELS, sde_solver=True)
    assert torch.equal(old.means(), torch.stack([x + 1.0] * 2, dim=1))


@pytest.mark.parametrize("guard", [False, True], ids=["dppo", "guard"])
@pytest.mark.parametrize("columns", [[2, 2, 2], [1, 2, 4]], ids=["one step", "a step per row"])
def test_the_scheduler_stands_in_for_sqrt_dt(scheduler, columns, guard):
    """The loss of four values of ``compute_log_prob`` and a scheduler is that of five."""
    timesteps = scheduler.timesteps[columns]
    latents, after, v = torch.randn(3, 3, 4, 5)
    results = flow_grpo.sde_step_with_logprob(
        scheduler, v, timesteps, latents, 0.7, prev_sample=latents + 0.1 * after, return_sqrt_dt=True
    )
    mean, std_dev_t, sqrt_dt = results[2:]
    sample = {
        "timesteps": timesteps[:, None],
        "next_latents": (latents + 0.1 * after)[:, None],
        "prev_sample_mean": (mean + 0.01 * after)[:, None],
        "advantages": torch.tensor([[1.0], [-0.5], [0.3]]),
    }
    loss = flow_grpo.grpo_guard_loss_from_sample if guard else flow_grpo.dppo_loss_from_sample
    given = loss(sample, 0, mean, std_dev_t, sqrt_dt)
    made = loss(sample, 0, mean, std_dev_t, *([None] if guard else []), scheduler=scheduler)
    torch.testing.assert_close(made.loss, given.loss, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(made.rows.kl, given.rows.kl, rtol=1e-5, atol=1e-9)
