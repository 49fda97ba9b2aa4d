"""Drop-ins in whatever state of torch a trainer calls them, and with what a rollout made in inference mode."""

from __future__ import annotations

import math

import pytest
import torch
from support.ambient import STATES, Schedule
from torch import Tensor

from flowdppo_fast.integrations import dance_grpo, flow_grpo, mix_grpo

from .recorded import ETA, LATENTS, SIGMAS, record
from .test_flow_grpo import as_sample

STEP = 2
ROWS = 8
DT = SIGMAS[STEP + 1] - SIGMAS[STEP]


def make_given() -> dict:
    """What a rollout leaves: plain tensors on the CPU."""
    scheduler = Schedule()
    r = record("flow_sde", LATENTS["image"]).to(torch.float32)
    std = float(r.old.std.flatten()[0])
    return {
        "sample": {name: value.detach().clone() for name, value in as_sample(r).items()},
        "state": r.state.clone(),
        "action": r.next_state.clone(),
        "velocity": r.velocity.clone(),
        "levels": torch.tensor(SIGMAS),
        "scheduler": scheduler,
        "timestep": scheduler.timesteps[STEP].expand(ROWS).clone(),
        "std_dev_t": torch.full((ROWS, 1, 1, 1), std / math.sqrt(-DT)),
        "sqrt_dt": torch.full((ROWS, 1, 1, 1), math.sqrt(-DT)),
        "mean": as_sample(r)["prev_sample_mean"][:, 1].detach() + 0.01,
    }


# what the gradient is of -> how it is computed; a tensor for each result that may be differentiated
STEPS = {
    "flow_grpo sde": lambda g, v: flow_grpo.sde_step_with_logprob(
        g["scheduler"], v, g["timestep"], g["state"], prev_sample=g["action"]
    ),
    "flow_grpo cps": lambda g, v: flow_grpo.sde_step_with_logprob(
        g["scheduler"], v, g["timestep"], g["state"], prev_sample=g["action"], sde_type="cps", return_sqrt_dt=True
    ),
    "flow_grpo wan": lambda g, v: flow_grpo.wan_sde_step_with_logprob(
        g["scheduler"], v, g["timestep"], g["state"], prev_sample=g["action"], return_dt_and_std_dev_t=True
    ),
    "flow_grpo wan, ODE": lambda g, v: flow_grpo.wan_sde_step_with_logprob(
        g["scheduler"], v, g["timestep"], g["state"], determistic=True
    ),
    "dance": lambda g, v: dance_grpo.flux_step(
        v, g["state"], ETA, g["levels"], STEP, g["action"], True, True, return_mean=True
    ),
    "dance, drawn": lambda g, v: dance_grpo.flux_step(v, g["state"], ETA, g["levels"], STEP, None, True, True),
    "dance, mean": lambda g, v: dance_grpo.flux_step(v, g["state"], ETA, g["levels"], STEP, None, False, True),
    "mix, flow": lambda g, v: mix_grpo.flow_grpo_step(v, g["state"], ETA, g["levels"], STEP, g["action"]),
    "mix, drawn": lambda g, v: mix_grpo.flow_grpo_step(v, g["state"], ETA, g["levels"], STEP, None),
    "mix, dance": lambda g, v: mix_grpo.dance_grpo_step(
        v, g["state"], ETA, g["levels"], STEP, None, True, False, return_mean=True
    ),
}
LOSSES = {
    "dppo": lambda g, m: flow_grpo.dppo_loss_from_sample(g["sample"], 1, m, g["std_dev_t"], g["sqrt_dt"]),
    "dppo, log-probs": lambda g, m: flow_grpo.dppo_loss_from_sample(
        g["sample"], 1, m, g["std_dev_t"], g["sqrt_dt"], log_prob=-(m - g["action"]).square().flatten(1).mean(1)
    ),
    "dppo, reference": lambda g, m: flow_grpo.dppo_loss_from_sample(
        g["sample"], 1, m, g["std_dev_t"], g["sqrt_dt"], prev_sample_mean_ref=g["mean"] + 0.02, beta=0.1
    ),
    "ratio clip": lambda g, m: flow_grpo.ratio_clip_loss_from_sample(
        g["sample"], 1, m, g["std_dev_t"], g["sqrt_dt"], clip_range=1e-3
    ),
    "dance": lambda g, m: dance_grpo.dppo_loss_from_sample(
        {**g["sample"], "advantages": g["sample"]["advantages"][:, 1]}, 1, m, 0.1
    ),
}


@pytest.fixture(scope="module")
def given():
    return make_given()


def results(given: dict) -> dict[str, Tensor]:
    found = {}
    for name, compute in STEPS.items():
        torch.manual_seed(3)
        values = compute(given, given["velocity"])
        found |= {f"{name} {place}": value.detach() for place, value in enumerate(values) if value is not None}
    for name, compute in LOSSES.items():
        out = compute(given, given["mean"])
        found |= {f"{name} loss": out.loss.detach(), f"{name} rows": out.rows.kl, f"{name} summary": out.summary}
    return found


@pytest.mark.parametrize("state", STATES)
def test_the_callers_state_changes_no_number_of_a_drop_in(given, state):
    expected = results(given)
    with STATES[state]():
        got = results(given)
    differing = {
        name: (value.dtype, value.device, got[name].dtype, got[name].device)
        for name, value in expected.items()
        if got[name].dtype != value.dtype or got[name].device != value.device or not torch.equal(got[name], value)
    }
    assert differing == {}


@pytest.mark.parametrize("name", [*STEPS, *(f"loss {name}" for name in LOSSES)])
def test_what_inference_mode_made_serves_a_backward(given, name):
    with torch.inference_mode():
        made = make_given()
    assert made["state"].is_inference()
    grads = []
    for tensors in (given, made):
        torch.manual_seed(3)
        if name in STEPS:
            leaf = given["velocity"].clone().requires_grad_()
            values = [value for value in STEPS[name](tensors, leaf) if value is not None and value.requires_grad]
            loss = sum(value.sum() for value in values)
        else:
            leaf = given["mean"].clone().requires_grad_()
            loss = LOSSES[name.removeprefix("loss ")](tensors, leaf).loss
        (grad,) = torch.autograd.grad(loss, leaf)
        grads.append(grad)
    assert float(grads[0].abs().max()) > 0
    assert torch.equal(*grads)
