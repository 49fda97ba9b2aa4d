"""Trainers whose scripts call functions: flow_grpo, DanceGRPO, MixGRPO; all with their clipped ratio."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flowdppo_fast.integrations import dance_grpo, flow_grpo, mix_grpo

from ..inputs import CLIP_RANGE, ETA, LEVELS, Inputs, Rollout
from .common import (
    ADVANTAGE_CLIP,
    INDEX,
    SIGMAS,
    Call,
    StepOutput,
    difference,
    eager,
    look_up,
    of_tests,
    read,
    scheduler_of,
)

# with a constant diffusion this noise level is the Flow-SDE step of the inputs
DANCE_ETA = ETA * math.sqrt(LEVELS[0][0] / (1.0 - LEVELS[0][0]))


def _columns(i: Inputs) -> dict[str, Tensor]:
    """The scripts' ``sample`` dict with one timestep."""
    return {
        "advantages": i.advantages[:, None],
        "prev_sample_mean": i.old_mean[:, None],
        "next_latents": i.prev_sample[:, None],
        "log_probs": i.old_log_prob[:, None],
    }


# ---- flow_grpo: metrics stay on the device until the optimizer step


def flow_grpo_before(rollout: Rollout) -> Call:
    convention = of_tests("conventions").flow_grpo_clip
    scheduler, timestep = scheduler_of(rollout)

    def call(i: Inputs) -> StepOutput:
        levels = look_up(scheduler, timestep)
        # the stand-in for sigma == 1
        scheduler.sigmas[1].item()
        new = eager(i, *levels)
        loss, metrics = convention(
            new.log_prob, i.old_log_prob, i.advantages, clip_range=CLIP_RANGE, adv_clip_max=ADVANTAGE_CLIP
        )
        return StepOutput(loss, difference(new.log_prob, i.old_log_prob), None, metrics)

    return call


def flow_grpo_after(rollout: Rollout) -> Call:
    scheduler, timestep = scheduler_of(rollout)

    def call(i: Inputs) -> StepOutput:
        _, _, mean, std_dev_t, sqrt_dt = flow_grpo.sde_step_with_logprob(
            scheduler, i.velocity, timestep, i.sample, ETA, prev_sample=i.prev_sample, return_sqrt_dt=True
        )
        out = flow_grpo.ratio_clip_loss_from_sample(
            _columns(i), 0, mean, std_dev_t, sqrt_dt, clip_range=CLIP_RANGE, adv_clip_max=ADVANTAGE_CLIP
        )
        return StepOutput(out.loss, lambda: out.rows.log_ratio, None, flow_grpo.training_info(out))

    return call


# ---- DanceGRPO: schedule on the CPU; the loss is read at every step, in both


def dance_grpo_before(rollout: Rollout) -> Call:
    convention = of_tests("conventions").dance_grpo_clip
    device = rollout.inputs.velocity.device
    sigma, sigma_next = (torch.tensor(level, device=device) for level in LEVELS[0])

    def call(i: Inputs) -> StepOutput:
        new = eager(i, sigma, sigma_next, "dance", DANCE_ETA)
        loss, _ = convention(
            new.log_prob, i.old_log_prob, i.advantages, clip_range=CLIP_RANGE, adv_clip_max=ADVANTAGE_CLIP
        )
        return StepOutput(loss, difference(new.log_prob, i.old_log_prob), None, {"loss": loss.item()})

    return call


def dance_grpo_after(rollout: Rollout) -> Call:
    sigmas = torch.tensor(SIGMAS)

    def call(i: Inputs) -> StepOutput:
        _, _, log_prob = dance_grpo.flux_step(i.velocity, i.sample, DANCE_ETA, sigmas, INDEX, i.prev_sample, True, True)
        assert log_prob is not None
        out = dance_grpo.ratio_clip_loss(
            log_prob, i.old_log_prob, i.advantages, clip_range=CLIP_RANGE, adv_clip_max=ADVANTAGE_CLIP
        )
        return StepOutput(out.loss, lambda: out.rows.log_ratio, None, {"loss": out.loss.item()})

    return call


# ---- MixGRPO: schedule on the CPU; four numbers are read at every step, in both


def mix_grpo_before(rollout: Rollout) -> Call:
    convention = of_tests("conventions").mix_grpo_clip
    device = rollout.inputs.velocity.device
    sigma, sigma_next = (torch.tensor(level, device=device) for level in LEVELS[0])

    def call(i: Inputs) -> StepOutput:
        new = eager(i, sigma, sigma_next)
        loss, metrics = convention(
            new.log_prob, i.old_log_prob, i.advantages, clip_range=CLIP_RANGE, adv_clip_max=ADVANTAGE_CLIP
        )
        return StepOutput(loss, difference(new.log_prob, i.old_log_prob), None, read({"loss": loss, **metrics}))

    return call


def mix_grpo_after(rollout: Rollout) -> Call:
    sigmas = torch.tensor(SIGMAS)

    def call(i: Inputs) -> StepOutput:
        _, _, log_prob, _, _ = mix_grpo.flow_grpo_step(i.velocity, i.sample, ETA, sigmas, INDEX, i.prev_sample)
        assert log_prob is not None
        out, kl_loss = mix_grpo.ratio_clip_loss(
            log_prob, i.old_log_prob, i.advantages, clip_range=CLIP_RANGE, adv_clip_max=ADVANTAGE_CLIP
        )
        metrics = out.metrics()
        logged = {"policy_loss": metrics["policy_loss"], "kl_loss": kl_loss, "clip_frac": metrics["clipfrac"]}
        return StepOutput(out.loss, lambda: out.rows.log_ratio, None, read({"loss": out.loss, **logged}))

    return call
