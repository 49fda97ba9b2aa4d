"""flow_grpo: its step functions and the inline losses of its scripts, against the convention each script has."""

from __future__ import annotations

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

import flowdppo_fast as fast
from flowdppo_fast.integrations import flow_grpo

from . import conventions
from .recorded import ADVANTAGE_CLIP, CLIP, ETA, LATENTS, SIGMAS, THRESHOLD, check, outcome, record

SAMPLERS = {"sde": "flow_sde", "cps": "cps", "wan": "wan"}
BETA = 0.04
# GRPO-Guard's ratio is exp(S * ...), so its range is that much smaller
GUARD_CLIP = 0.004
TIMESTEPS = 3


@pytest.fixture
def scheduler():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(10)
    return scheduler


def as_sample(r, column=1):
    """The dict of a script: ``[B, T, ...]`` with what was recorded in ``column`` and NaN elsewhere."""
    old = r.old
    stored = {
        "latents": r.state,
        "next_latents": r.next_state,
        "log_probs": old.log_prob,
        "advantages": r.advantages,
        "prev_sample_mean": old.mean,
        "old_velocity": r.old_velocity,
        "noise": r.noise,
    }
    sample = {}
    for key, value in stored.items():
        sample[key] = torch.full((value.shape[0], TIMESTEPS, *value.shape[1:]), torch.nan, dtype=value.dtype)
        sample[key][:, column] = value
    return sample


def script(r, sde_type, objective, *, beta=0.0, adv_clip_max=ADVANTAGE_CLIP):
    """The script's loss on ``r``, with gradient in the velocity."""
    v = r.leaf()
    new, old = r.replay(v), r.old
    if isinstance(objective, fast.DPPO):
        loss, metrics = conventions.flow_factory_dppo(
            new.log_prob, old.log_prob, new.mean, old.mean, old.std, r.advantages,
            threshold=objective.threshold, adv_clip_range=(-adv_clip_max, adv_clip_max),
        )  # fmt: skip
        metrics = {"policy_loss": metrics["policy_loss"], "masked_fraction": metrics["masked_ratio"]}
    elif isinstance(objective, fast.RatioClip):
        loss, metrics = conventions.flow_grpo_clip(
            new.log_prob, old.log_prob, r.advantages, clip_range=objective.high, adv_clip_max=adv_clip_max
        )
    elif isinstance(objective, fast.Unclipped):
        adv = r.advantages.clamp(-adv_clip_max, adv_clip_max)
        loss, metrics = (-adv * torch.exp(new.log_prob - old.log_prob)).mean(), {}
    else:
        loss, metrics = conventions.flow_grpo_guard(
            new.log_prob, old.log_prob, new.mean, old.mean, new.std_dev_t, new.sqrt_dt, r.advantages,
            clip_range=objective.high, adv_clip_max=adv_clip_max, bias=objective.bias,
        )  # fmt: skip
    if beta > 0.0:
        if sde_type == "wan":
            kl = conventions.flow_grpo_wan_reference_kl(new.mean, r.reference.mean, new.std_dev_t, new.sqrt_dt)
        else:
            kl = conventions.flow_grpo_reference_kl(new.mean, r.reference.mean, new.std_dev_t)
        loss = loss + beta * kl
        metrics["kl_loss"] = kl
    return outcome(loss, v, {**metrics, "loss": loss})


def integration(r, sde_type, objective, form, *, beta=0.0, backend="auto"):
    v = r.leaf()
    sample = as_sample(r)
    reference = r.reference.mean if beta > 0.0 else None
    if form == "velocity":
        steps = [fast.sde_schedule(SAMPLERS[sde_type], SIGMAS, eta=ETA)[i] for i in r.index]
        step = steps[0] if len(set(r.index)) == 1 else fast.SDEStep.stack(steps)
        out = flow_grpo.velocity_policy_loss_from_sample(
            objective, sample, 1, v, step, velocity_ref=r.reference_velocity if beta > 0.0 else None,
            beta=beta, adv_clip_max=ADVANTAGE_CLIP, backend=backend,
        )  # fmt: skip
    else:
        new = r.replay(v)
        out = flow_grpo.policy_loss_from_sample(
            objective, sample, 1, new.mean, new.std_dev_t, new.sqrt_dt, sde_type=sde_type,
            log_prob=new.log_prob if form == "log_prob" else None, prev_sample_mean_ref=reference,
            beta=beta, adv_clip_max=ADVANTAGE_CLIP, backend=backend,
        )  # fmt: skip
    return outcome(out.loss, v, flow_grpo.training_info(out))


OBJECTIVES = {
    "dppo": fast.DPPO(THRESHOLD),
    "clip": fast.RatioClip(CLIP, CLIP),
    "guard": fast.GRPOGuard(GUARD_CLIP, GUARD_CLIP),
}


@pytest.mark.parametrize("form", ["means", "log_prob", "velocity"])
@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
@pytest.mark.parametrize("sde_type", SAMPLERS)
def test_losses_in_float64(sde_type, objective, form):
    """Every script's convention, with its reference KL and rows at different steps."""
    if sde_type == "cps" and isinstance(objective, fast.GRPOGuard):
        # the guard script knows no CPS: its log-ratio would not have the scale of its bias
        objective = fast.Unclipped()
    r = record(SAMPLERS[sde_type], LATENTS["image"], index=[1, 1, 1, 1, 3, 3, 3, 3])
    exact = script(r, sde_type, objective, beta=BETA)
    check(integration(r, sde_type, objective, form, beta=BETA, backend="reference"), exact, scale=8.0)


@pytest.mark.parametrize("form", ["means", "log_prob", "velocity"])
@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
@pytest.mark.parametrize("shape", LATENTS.values(), ids=LATENTS)
def test_losses_in_float32(shape, objective, form):
    """On image, packed and video latents, in the dtype the scripts run in, on the backend that ``auto`` takes."""
    r = record("flow_sde", shape).to(torch.float32)
    exact, eager = script(r.to(torch.float64), "sde", objective, beta=BETA), script(r, "sde", objective, beta=BETA)
    check(integration(r, "sde", objective, form, beta=BETA), exact, eager)


@pytest.mark.parametrize("index", [2, [1, 1, 1, 1, 3, 3, 3, 3]], ids=["one step", "mixed steps"])
def test_the_guard_script_with_its_batch_means(index):
    """``bias="batch"`` with the script's log-probs is the script, mixed steps included."""
    r = record("flow_sde", LATENTS["image"], index=index)
    objective = fast.GRPOGuard(GUARD_CLIP, GUARD_CLIP, "batch")
    exact = script(r, "sde", objective)
    check(integration(r, "sde", objective, "log_prob", backend="reference"), exact, scale=8.0)
    row_wise = script(r, "sde", fast.GRPOGuard(GUARD_CLIP, GUARD_CLIP))
    assert abs(float(row_wise.loss - exact.loss)) > 1e-6
    if index == 2:
        check(integration(r, "sde", objective, "means", backend="reference"), exact, scale=8.0)


def test_the_named_losses_are_the_objectives():
    r = record("flow_sde", LATENTS["packed"])
    sample, new = as_sample(r), r.replay(r.velocity)
    replayed = (sample, 1, new.mean, new.std_dev_t, new.sqrt_dt)
    for named, objective in (
        (flow_grpo.dppo_loss_from_sample(*replayed, threshold=2e-2), fast.DPPO(2e-2)),
        (flow_grpo.ratio_clip_loss_from_sample(*replayed, clip_range=(1e-2, 2e-2)), fast.RatioClip(1e-2, 2e-2)),
        (flow_grpo.grpo_guard_loss_from_sample(*replayed, clip_range=1e-3), fast.GRPOGuard(1e-3, 1e-3)),
    ):
        assert named.loss == flow_grpo.policy_loss_from_sample(objective, *replayed).loss
    step = fast.sde_schedule("flow_sde", SIGMAS, eta=ETA)[2]
    out = flow_grpo.dppo_velocity_loss_from_sample(sample, 1, r.velocity, step, threshold=2e-2)
    torch.testing.assert_close(out.loss, flow_grpo.dppo_loss_from_sample(*replayed, threshold=2e-2).loss)


def test_a_clip_with_log_probs_needs_no_stored_mean():
    r = record("flow_sde", LATENTS["packed"])
    sample, new = as_sample(r), r.replay(r.velocity)
    for key in ("prev_sample_mean", "next_latents"):
        sample.pop(key)
    out = flow_grpo.ratio_clip_loss_from_sample(sample, 1, new.mean, new.std_dev_t, new.sqrt_dt, log_prob=new.log_prob)
    expected, _ = conventions.flow_grpo_clip(new.log_prob, r.old.log_prob, r.advantages, clip_range=1e-4)
    torch.testing.assert_close(out.loss, expected)


def test_noise_is_recovered_from_stored_states():
    r = record("cps", LATENTS["video"], index=[1, 1, 1, 1, 3, 3, 3, 3])
    steps = fast.SDEStep.stack([fast.sde_schedule("cps", SIGMAS, eta=ETA)[i] for i in r.index])
    noise = flow_grpo.recover_noise(steps, r.state, r.next_state, r.old_velocity)
    torch.testing.assert_close(noise, r.noise, rtol=1e-9, atol=1e-9)
    sample = as_sample(r)
    stored = flow_grpo.dppo_velocity_loss_from_sample(sample, 1, r.velocity, steps, threshold=THRESHOLD)
    sample.pop("noise")
    derived = flow_grpo.dppo_velocity_loss_from_sample(sample, 1, r.velocity, steps, threshold=THRESHOLD)
    torch.testing.assert_close(derived.loss, stored.loss)


def test_missing_pieces_are_named():
    r = record("flow_sde", LATENTS["packed"])
    sample, new = as_sample(r), r.replay(r.velocity)
    with pytest.raises(ValueError, match="sqrt_dt: got None"):
        flow_grpo.dppo_loss_from_sample(sample, 1, new.mean, new.std_dev_t)
    with pytest.raises(ValueError, match="sde_type: got 'ode'"):
        flow_grpo.dppo_loss_from_sample(sample, 1, new.mean, new.std_dev_t, new.sqrt_dt, sde_type="ode")
    sample.pop("prev_sample_mean")
    with pytest.raises(ValueError, match="expected 'prev_sample_mean' among them; store it in the sampling loop"):
        flow_grpo.dppo_loss_from_sample(sample, 1, new.mean, new.std_dev_t, new.sqrt_dt)


# ---- step functions


@pytest.mark.parametrize("shape", LATENTS.values(), ids=LATENTS)
@pytest.mark.parametrize("sde_type", ["sde", "cps"])
def test_replayed_step(scheduler, sde_type, shape):
    """float32 against the convention: all five results, gradients through the mean and the log-prob, per-row steps."""
    index = [0, 1, 2, 3, 4, 5, 6, 7]
    r = record(SAMPLERS[sde_type], shape, index=index).to(torch.float32)
    sigmas = scheduler.sigmas.tolist()

    def convention(dtype):
        v = r.velocity.to(dtype).requires_grad_()
        levels = torch.tensor(sigmas, dtype=dtype)
        out = conventions.replay(
            SAMPLERS[sde_type], r.state.to(dtype), v, r.next_state.to(dtype),
            levels[index], levels[[i + 1 for i in index]], ETA, sigmas,
        )  # fmt: skip
        return out, outcome(out.log_prob @ weights.to(dtype) + out.mean.sum(), v, out._asdict())

    weights = torch.linspace(-1.0, 1.0, 8)
    exact, eager = convention(torch.float64), convention(torch.float32)
    v = r.leaf()
    results = flow_grpo.sde_step_with_logprob(
        scheduler, v, scheduler.timesteps[index], r.state, ETA, r.next_state, sde_type=sde_type, return_sqrt_dt=True
    )
    prev_sample, log_prob, mean, std_dev_t, sqrt_dt = results
    assert torch.equal(prev_sample, r.next_state)
    assert std_dev_t.shape == sqrt_dt.shape == (8, *(1,) * len(shape))
    metrics = {"mean": mean, "log_prob": log_prob, "std_dev_t": std_dev_t, "sqrt_dt": sqrt_dt}
    exact[1].metrics.pop("std")
    check(outcome(log_prob @ weights + mean.sum(), v, metrics), exact[1], eager[1])
    short = flow_grpo.sde_step_with_logprob(scheduler, v, scheduler.timesteps[index], r.state, ETA, r.next_state)
    assert len(short) == 4


@pytest.mark.parametrize("sde_type", ["sde", "cps"])
def test_drawn_step_uses_the_same_noise(scheduler, sde_type):
    """One timestep for the whole batch as in the pipelines, the draws that ``randn`` gives for the generator."""
    r = record(SAMPLERS[sde_type], LATENTS["image"]).to(torch.float32)
    drawn, log_prob, mean, std_dev_t = flow_grpo.sde_step_with_logprob(
        scheduler, r.velocity, scheduler.timesteps[2:3], r.state, ETA,
        generator=torch.Generator().manual_seed(7), sde_type=sde_type,
    )  # fmt: skip
    noise = torch.randn(r.state.shape, generator=torch.Generator().manual_seed(7))
    step = flow_grpo.sampler_step(scheduler, scheduler.timesteps[2:3], sde_type=sde_type, noise_level=ETA)
    torch.testing.assert_close(drawn, mean + step.std * noise)
    assert std_dev_t.shape == (1, 1, 1, 1)
    expected = -(step.std**2) * noise.square().flatten(1).mean(1)
    if sde_type == "sde":
        expected = conventions.gaussian_log_prob(drawn.double(), mean.double(), torch.tensor(step.std)).float()
    torch.testing.assert_close(log_prob, expected, rtol=1e-4, atol=1e-5)


def test_steps_outside_the_window_add_no_noise(scheduler):
    r = record("flow_sde", LATENTS["image"]).to(torch.float32)
    drawn, _, mean, _ = flow_grpo.sde_step_with_logprob(
        scheduler, r.velocity, scheduler.timesteps[2:3], r.state, noise_level=0.0
    )
    dt = float(scheduler.sigmas[3] - scheduler.sigmas[2])
    torch.testing.assert_close(drawn, r.state + dt * r.velocity)
    assert torch.equal(drawn, mean)


@pytest.fixture
def wan_scheduler():
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    scheduler.set_timesteps(10)
    return scheduler


@pytest.mark.parametrize("determistic", [False, True])
def test_wan_step(wan_scheduler, determistic):
    """Its own diffusion, ``std`` or its two factors as last results, the deterministic variant scored as stochastic."""
    index = [0, 1, 2, 3, 4, 5, 6, 7]
    r = record("wan", LATENTS["video"], index=index).to(torch.float32)
    sigmas = wan_scheduler.sigmas.tolist()

    def convention(dtype):
        v = r.velocity.to(dtype).requires_grad_()
        levels = torch.tensor(sigmas, dtype=dtype)
        sigma, after = levels[index], levels[[i + 1 for i in index]]
        x, x_next = r.state.to(dtype), r.next_state.to(dtype)
        if determistic:
            x_next = (x + conventions.lift(after - sigma, x) * v).detach()
        out = conventions.replay("wan", x, v, x_next, sigma, after, ETA, sigmas)
        return outcome(out.log_prob.sum() + out.mean.sum(), v, {**out._asdict(), "prev_sample": x_next})

    v = r.leaf()
    timestep = wan_scheduler.timesteps[index]
    arguments = (wan_scheduler, v, timestep, r.state, None if determistic else r.next_state)
    prev_sample, log_prob, mean, std_dev_t, sqrt_dt = flow_grpo.wan_sde_step_with_logprob(
        *arguments, determistic=determistic, return_dt_and_std_dev_t=True
    )
    std = flow_grpo.wan_sde_step_with_logprob(*arguments, determistic=determistic)[3]
    metrics = {"mean": mean, "log_prob": log_prob, "std_dev_t": std_dev_t, "sqrt_dt": sqrt_dt, "std": std}
    actual = outcome(log_prob.sum() + mean.sum(), v, {**metrics, "prev_sample": prev_sample})
    check(actual, convention(torch.float64), convention(torch.float32))
    same = wan_scheduler.timesteps[[2] * 8]
    std = flow_grpo.wan_sde_step_with_logprob(wan_scheduler, v, same, r.state, r.next_state)[3]
    assert std.shape == (8, 1, 1, 1, 1)


@pytest.mark.bits(across="again")
def test_wan_step_takes_one_source_of_noise(wan_scheduler):
    x = torch.randn(1, 2, 3)
    with pytest.raises(ValueError, match="generator: got one together with prev_sample"):
        flow_grpo.wan_sde_step_with_logprob(
            wan_scheduler, x, wan_scheduler.timesteps[:1], x, prev_sample=x, generator=torch.Generator()
        )
    first, second = (
        flow_grpo.wan_sde_step_with_logprob(
            wan_scheduler, x, wan_scheduler.timesteps[:1], x, generator=torch.Generator().manual_seed(3)
        )[0]
        for _ in range(2)
    )
    assert torch.equal(first, second)


def test_training_info_has_the_scripts_names():
    r = record("flow_sde", LATENTS["packed"])
    new = r.replay(r.velocity)
    out = flow_grpo.ratio_clip_loss_from_sample(
        as_sample(r), 1, new.mean, new.std_dev_t, new.sqrt_dt, prev_sample_mean_ref=r.reference.mean, beta=BETA
    )
    info = flow_grpo.training_info(out)
    theirs = {"approx_kl", "clipfrac", "clipfrac_gt_one", "clipfrac_lt_one", "policy_loss", "kl_loss", "loss"}
    assert theirs <= info.keys()
    assert all(value.ndim == 0 and not value.requires_grad for value in info.values())
    torch.testing.assert_close(info["loss"], info["policy_loss"] + BETA * info["kl_loss"])
