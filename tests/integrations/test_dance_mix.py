"""DanceGRPO and MixGRPO: step functions and losses against the conventions, in float64 and float32."""

from __future__ import annotations

import math

import pytest
import torch

import flowdppo_fast as fast
from flowdppo_fast.integrations import dance_grpo, mix_grpo

from . import conventions
from .recorded import ADVANTAGE_CLIP, CLIP, ETA, LATENTS, SIGMAS, THRESHOLD, check, outcome, record

LEVELS = torch.tensor(SIGMAS)
STEP = 2
NORMALIZER = math.log(math.sqrt(2.0 * math.pi))


def both(compute, r):
    """``compute`` on float64 (reference backend) and on float32 (auto), as (actual, exact[, eager]) checks."""
    single = r.to(torch.float32)
    check(compute(r, "integration", "reference"), compute(r, "convention", None), scale=8.0)
    check(
        compute(single, "integration", "auto"),
        compute(single.to(torch.float64), "convention", None),
        compute(single, "convention", None),
    )


@pytest.mark.parametrize("shape", LATENTS.values(), ids=LATENTS)
@pytest.mark.parametrize("name", ["dance", "mix_dance", "mix_flow"])
def test_replayed_step(name, shape):
    """Mean, log-prob and gradients of a recorded step, under each function's signature."""

    def compute(r, who, backend):
        v = r.leaf()
        if who == "convention":
            out = r.replay(v)
            log_prob, mean = out.log_prob, out.mean
            if name == "mix_dance":
                # the normaliser is a statement of its own there and never applied
                log_prob = log_prob + torch.log(out.std).flatten() + NORMALIZER
        elif name == "mix_flow":
            _, _, log_prob, mean, std = mix_grpo.flow_grpo_step(
                v, r.state, ETA, LEVELS, STEP, r.next_state, backend=backend
            )
            assert float(std) == pytest.approx(float(r.old.std.flatten()[0]), rel=1e-6)
        else:
            step = dance_grpo.flux_step if name == "dance" else mix_grpo.dance_grpo_step
            prev, original, log_prob, mean = step(
                v, r.state, ETA, LEVELS, STEP, r.next_state, True, True, return_mean=True, backend=backend
            )
            assert torch.equal(prev, r.next_state)
            assert original is None
        return outcome(log_prob.sum() + mean.sum(), v, {"log_prob": log_prob, "mean": mean})

    both(compute, record("flow_sde" if name == "mix_flow" else "dance", shape))


@pytest.mark.parametrize("step", [dance_grpo.flux_step, mix_grpo.dance_grpo_step])
def test_drawn_step(step):
    """Three results as in the script, noise of the global generator, the data estimate for the last decode."""
    r = record("dance", LATENTS["packed"]).to(torch.float32)
    torch.manual_seed(5)
    noise = torch.randn_like(r.state)
    torch.manual_seed(5)
    prev, original, log_prob = step(r.velocity, r.state, ETA, LEVELS, STEP, None, True, True)
    expected = r.replay(r.velocity)
    torch.testing.assert_close(prev, expected.mean + expected.std * noise)
    torch.testing.assert_close(original, r.state - SIGMAS[STEP] * r.velocity)
    scored = -0.5 * noise.square().flatten(1).mean(1)
    if step is dance_grpo.flux_step:
        scored = scored - torch.log(expected.std).flatten() - NORMALIZER
    torch.testing.assert_close(log_prob, scored, rtol=1e-5, atol=1e-6)


def test_deterministic_variants():
    r = record("dance", LATENTS["image"]).to(torch.float32)
    dt = SIGMAS[STEP + 1] - SIGMAS[STEP]
    euler = r.state + dt * r.velocity
    for step in (dance_grpo.flux_step, mix_grpo.dance_grpo_step):
        mean, original = step(r.velocity, r.state, ETA, LEVELS, STEP, None, False, False)
        torch.testing.assert_close(mean, euler)
        torch.testing.assert_close(original, r.state - SIGMAS[STEP] * r.velocity)
        mean, _ = step(r.velocity, r.state, ETA, LEVELS, STEP, None, False, True)
        torch.testing.assert_close(mean, r.replay(r.velocity).mean)
    # DanceGRPO still adds noise without the correction, MixGRPO does not
    prev, _, log_prob, mean = mix_grpo.dance_grpo_step(
        r.velocity, r.state, ETA, LEVELS, STEP, None, True, False, return_mean=True
    )
    torch.testing.assert_close(prev, euler)
    torch.testing.assert_close(mean, euler)
    torch.testing.assert_close(log_prob, torch.zeros(8), rtol=0.0, atol=1e-6)
    torch.manual_seed(1)
    noise = torch.randn_like(r.state)
    torch.manual_seed(1)
    prev = dance_grpo.flux_step(r.velocity, r.state, ETA, LEVELS, STEP, None, True, False)[0]
    torch.testing.assert_close(prev, euler + ETA * math.sqrt(-dt) * noise)
    # MixGRPO's Flow-SDE step scores the ODE state under the stochastic step
    prev, _, log_prob, mean, std = mix_grpo.flow_grpo_step(
        r.velocity, r.state, ETA, LEVELS, STEP, None, determistic=True
    )
    torch.testing.assert_close(prev, euler)
    torch.testing.assert_close(log_prob, conventions.gaussian_log_prob(prev, mean, std), rtol=1e-5, atol=1e-6)


def test_one_source_of_noise():
    x = torch.randn(1, 4)
    with pytest.raises(ValueError, match="generator: got one together with prev_sample"):
        mix_grpo.flow_grpo_step(x, x, ETA, LEVELS, STEP, x, generator=torch.Generator())


@pytest.mark.parametrize("shape", LATENTS.values(), ids=LATENTS)
@pytest.mark.parametrize("objective", [fast.DPPO(THRESHOLD), fast.RatioClip(CLIP, CLIP)], ids=["dppo", "clip"])
def test_loss_from_means(objective, shape):
    """From the permuted ``sample``: columns of it, advantages ``[B]``, the std of the step behind the permutation."""

    def compute(r, who, backend):
        v = r.leaf()
        new, old = r.replay(v), r.old
        if who == "integration":
            junk = torch.full_like(r.state, torch.nan)
            sample = {
                "advantages": r.advantages,
                "next_latents": torch.stack((junk, r.next_state), 1),
                "prev_sample_mean": torch.stack((junk, old.mean), 1),
            }
            std = dance_grpo.transition_std(ETA, LEVELS, STEP)
            out = dance_grpo.policy_loss_from_sample(
                objective, sample, 1, new.mean, std, adv_clip_max=ADVANTAGE_CLIP, backend=backend
            )
            return outcome(out.loss, v, out.metrics())
        if isinstance(objective, fast.RatioClip):
            loss, metrics = conventions.dance_grpo_clip(
                new.log_prob, old.log_prob, r.advantages, clip_range=CLIP, adv_clip_max=ADVANTAGE_CLIP
            )
            return outcome(loss, v, metrics)
        loss, metrics = conventions.flow_factory_dppo(
            new.log_prob, old.log_prob, new.mean, old.mean, old.std, r.advantages,
            threshold=THRESHOLD, adv_clip_range=(-ADVANTAGE_CLIP, ADVANTAGE_CLIP),
        )  # fmt: skip
        return outcome(loss, v, {"masked_fraction": metrics["masked_ratio"]})

    both(compute, record("dance", shape))


def test_dppo_by_name_and_what_is_missing():
    r = record("dance", LATENTS["image"])
    mean = r.replay(r.velocity).mean
    sample = {"advantages": r.advantages[:, None], "next_latents": r.next_state[:, None]}
    with pytest.raises(ValueError, match="expected 'prev_sample_mean' among them; store it in the sampling loop"):
        dance_grpo.dppo_loss_from_sample(sample, 0, mean, 0.3)
    sample["prev_sample_mean"] = r.old.mean[:, None]
    for module in (dance_grpo, mix_grpo):
        assert module.dppo_loss_from_sample(sample, 0, mean, 0.3, threshold=THRESHOLD).rows.kept.sum() < 8


@pytest.mark.parametrize("trainer", ["dance", "mix"])
def test_clip_loss_from_log_probs(trainer):
    """MixGRPO adds half the mean squared log-ratio to the old policy; metrics under its names."""

    def compute(r, who, backend):
        v = r.leaf()
        new, old = r.replay(v), r.old
        arguments = (new.log_prob, old.log_prob, r.advantages)
        options = {"clip_range": CLIP, "adv_clip_max": ADVANTAGE_CLIP}
        if trainer == "mix":
            options["kl_coeff"] = 0.3
        if who == "convention":
            convention = conventions.dance_grpo_clip if trainer == "dance" else conventions.mix_grpo_clip
            return outcome(*_swap(convention(*arguments, **options), v))
        if trainer == "dance":
            out = dance_grpo.ratio_clip_loss(*arguments, **options)
            return outcome(out.loss, v, out.metrics())
        out, kl_loss = mix_grpo.ratio_clip_loss(*arguments, **options)
        metrics = out.metrics()
        theirs = {"policy_loss": metrics["policy_loss"], "clip_frac": metrics["clipfrac"], "kl_loss": kl_loss}
        return outcome(out.loss, v, theirs)

    both(compute, record("dance", LATENTS["packed"]))


def _swap(result, v):
    loss, metrics = result
    return loss, v, metrics


@pytest.mark.parametrize("module", [dance_grpo, mix_grpo], ids=["dance", "mix"])
def test_a_backend_that_is_named_runs_or_is_an_error(module):
    rows = (torch.zeros(2), torch.zeros(2), torch.ones(2))
    with pytest.raises(RuntimeError, match="backend='triton' cannot run"):
        module.ratio_clip_loss(*rows, backend="triton")
