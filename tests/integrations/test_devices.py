"""The integrations where trainers run them: same results on the device, and no waiting for it where that is promised.

On the CPU this only exercises the test; ``gpu`` tests are what it is for.
"""

from __future__ import annotations

import contextlib
import sys

import pytest
import torch

import flowdppo_fast as fast
from flowdppo_fast.integrations import dance_grpo, flow_grpo

from . import test_flow_factory, test_unirl, test_verl_omni
from .recorded import ADVANTAGE_CLIP, ETA, LATENTS, SIGMAS, THRESHOLD, record
from .standins import flow_factory as flow_factory_standin
from .standins import installed
from .standins import unirl as unirl_standin
from .standins import verl_omni as verl_omni_standin
from .test_flow_grpo import as_sample

CLOSE = {"rtol": 1e-3, "atol": 1e-5}


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    return request.param


@contextlib.contextmanager
def no_waiting(device):
    """An error for every operation that waits for the device."""
    if device == "cpu":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def moved(r, device):
    for name, value in vars(r).items():
        if isinstance(value, torch.Tensor):
            setattr(r, name, value.to(device))
    return r


def loss_and_grad(out, leaf):
    (grad,) = torch.autograd.grad(out.loss, leaf)
    return out.loss.detach().cpu(), grad.cpu()


@pytest.mark.parametrize("form", ["means", "log_prob", "velocity"])
def test_flow_grpo_losses(device, form):
    step = fast.sde_schedule("flow_sde", SIGMAS, eta=ETA)[2]
    r = record("flow_sde", LATENTS["image"]).to(torch.float32)
    sample = {name: value.to(device) for name, value in as_sample(r).items()}

    def compute(sample, velocity):
        if form == "velocity":
            return flow_grpo.dppo_velocity_loss_from_sample(sample, 1, velocity, step, threshold=THRESHOLD)
        state, action = sample["latents"][:, 1], sample["next_latents"][:, 1]
        replayed = fast.sde_step(state, velocity, step, prev_sample=action, return_mean=True, log_prob="gaussian")
        # made on the device, as a scheduler step leaves them there
        std_dev_t = torch.full((8, 1, 1, 1), step.std / (-step.dt) ** 0.5, device=velocity.device)
        sqrt_dt = torch.full((8, 1, 1, 1), (-step.dt) ** 0.5, device=velocity.device)
        return flow_grpo.dppo_loss_from_sample(
            sample, 1, replayed.mean, std_dev_t, sqrt_dt, threshold=THRESHOLD,
            log_prob=replayed.log_prob if form == "log_prob" else None,
        )  # fmt: skip

    expected = loss_and_grad(compute(as_sample(r), v := r.leaf()), v)
    v = r.velocity.to(device).requires_grad_()
    compute(sample, v)
    with no_waiting(device):
        out = compute(sample, v)
        flow_grpo.training_info(out)
    for got, wanted in zip(loss_and_grad(out, v), expected):
        torch.testing.assert_close(got, wanted, **CLOSE)


def test_dance_grpo_step_and_loss(device):
    sigmas = torch.tensor(SIGMAS)
    r = record("dance", LATENTS["packed"]).to(torch.float32)
    std = dance_grpo.transition_std(ETA, sigmas, 2)

    def compute(r, velocity):
        mean = dance_grpo.flux_step(velocity, r.state, ETA, sigmas, 2, r.next_state, True, True, return_mean=True)[3]
        sample = {
            "advantages": r.advantages,
            "next_latents": r.next_state[:, None],
            "prev_sample_mean": mean.detach()[:, None] + 0.05 * std,
        }
        return dance_grpo.dppo_loss_from_sample(sample, 0, mean, std, threshold=THRESHOLD, adv_clip_max=ADVANTAGE_CLIP)

    expected = loss_and_grad(compute(r, v := r.leaf()), v)
    there = moved(r, device)
    v = there.leaf()
    compute(there, v)
    with no_waiting(device):
        out = compute(there, v)
    for got, wanted in zip(loss_and_grad(out, v), expected):
        torch.testing.assert_close(got, wanted, **CLOSE)


@pytest.mark.parametrize("sampler", test_unirl.STRATEGIES)
def test_unirl_strategies(device, sampler):
    """Levels on the device, per row: a transition never waits for them."""
    with installed(unirl_standin.build("september"), test_unirl.NAME) as unirl:
        strategy = getattr(unirl, test_unirl.STRATEGIES[sampler])()
        r = record(sampler, LATENTS["image"], index=[0, 1, 2, 3, 4, 5, 6, 7]).to(torch.float32)

        def compute(r, device):
            levels = [level.to(device) for level in r.levels]
            sigma_max = torch.full((), SIGMAS[1], device=device)
            arguments = {"eta": ETA, "prev_sample": r.next_state, "sigma_max": sigma_max}
            strategy.denoise(r.velocity, r.state, *levels, **arguments)
            with no_waiting(device):
                return strategy.denoise(r.velocity, r.state, *levels, **arguments)

        expected = compute(r, "cpu")
        for got, wanted in zip(compute(moved(r, device), device), expected):
            torch.testing.assert_close(got.cpu(), wanted, **CLOSE)


@pytest.mark.parametrize("log_ratio", ["log_probs", "means"])
def test_unirl_loss(device, log_ratio):
    """The loss itself; around it UniRL reads indices, and the metrics cross in one copy."""
    with installed(unirl_standin.build("september"), test_unirl.NAME) as unirl:
        results = []
        for where in ("cpu", device):
            stage = test_unirl.make_stage(unirl, "flow_sde", dtype=torch.float32)
            segment, algo = test_unirl.rollout(stage), test_unirl.algorithm(unirl, stage, log_ratio=log_ratio)
            algo.loss_backend = "auto"
            algo.prepare_segment(conditions={}, segment=segment)
            test_unirl.update(stage)
            stage.model.to(where)
            for name in ("latents", "sigmas", "sde_logp", "sde_means"):
                setattr(segment, name, getattr(segment, name).to(where))
            stage.sigmas = stage.sigmas.to(where)
            replay = stage.replay({}, segment=segment, params=algo.params, step_indices=test_unirl.STEPS)
            advantages = test_unirl.ADVANTAGES.float().to(where)
            arguments = (segment, test_unirl.STEPS, replay, advantages)
            # UniRL's own look-up of the anchor's columns copies an index to the device
            anchors = {name: algo._anchor(segment, name, test_unirl.STEPS) for name in ("sde_logp", "sde_means")}
            algo._anchor = lambda segment, name, steps, anchors=anchors: anchors[name]
            algo._policy_loss(*arguments)
            with no_waiting(where):
                out = algo._policy_loss(*arguments)
            results.append(loss_and_grad(out, stage.model.lora_a))
        for got, wanted in zip(results[1], results[0]):
            torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("mode", ["flow_dppo", "grpo_guard"])
def test_verl_omni_losses(device, mode):
    """The metrics are floats, so each call waits once, and only for them."""
    with installed(verl_omni_standin.build(), "flowdppo_fast.integrations.verl_omni") as verl_omni:
        verl_omni.register(fused_step=False)
        loss_class = sys.modules["verl_omni.trainer.diffusion.diffusion_algos"].DIFFUSION_LOSS_REGISTRY[mode]
        results = []
        for where in ("cpu", device):
            r = record("flow_sde", LATENTS["packed"]).to(torch.float32)
            v = r.leaf()
            model_output, data = (
                {k: x.to(where) for k, x in part.items()} for part in test_verl_omni.batch(r, "sde", r.replay(v))
            )
            settings = test_verl_omni.config(mode)
            loss_class(config=settings, model_output=model_output, data=data)
            verl_omni._floats, kept = (lambda out, *names, **options: {}), verl_omni._floats
            try:
                with no_waiting(where):
                    loss = loss_class(config=settings, model_output=model_output, data=data).loss
            finally:
                verl_omni._floats = kept
            (grad,) = torch.autograd.grad(loss, v)
            results.append((loss.detach().cpu(), grad))
        for got, wanted in zip(results[1], results[0]):
            torch.testing.assert_close(got, wanted, **CLOSE)


@pytest.mark.parametrize("mask", ["x-based", "v-based"])
def test_flow_factory_loss(device, mask):
    with installed(flow_factory_standin.build(), "flowdppo_fast.integrations.flow_factory") as flow_factory:
        results = []
        for where in ("cpu", device):
            trainer = test_flow_factory.make(flow_factory, "Flow-SDE", dtype=torch.float32, kl_mask_type=mask)
            batch = test_flow_factory.rollout(trainer, dtype=torch.float32)
            test_flow_factory.update(trainer)
            adapter = trainer.adapter
            adapter.base = adapter.base.to(where)
            adapter.weight = torch.nn.Parameter(adapter.weight.detach().to(where))
            batch = {k: x.to(where) for k, x in batch.items()}
            replay = next(iter(trainer._replayed_batch(batch)))
            (latent,) = replay().latents
            loss_of = trainer._velocity_loss if mask == "v-based" else trainer._mean_loss
            loss_of(latent, batch["advantage"])
            with no_waiting(where):
                out = loss_of(latent, batch["advantage"])
            results.append(loss_and_grad(out, adapter.weight))
        for got, wanted in zip(results[1], results[0]):
            torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4)
