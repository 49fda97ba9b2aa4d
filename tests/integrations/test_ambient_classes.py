"""Drop-ins that are classes or registered losses, in whatever state of torch a trainer calls them."""

from __future__ import annotations

import sys

import pytest
import torch
from support.ambient import STATES

from . import test_flow_factory as of_flow_factory
from . import test_unirl as of_unirl
from . import test_verl_omni as of_verl_omni
from .recorded import LATENTS, record
from .standins import flow_factory as flow_factory_standin
from .standins import installed
from .standins import unirl as unirl_standin
from .standins import verl_omni as verl_omni_standin

# what a replay inside of the drop-in, which runs the trainer's own code and calls backward, can be made in
REPLAYED = ("float64", "bfloat16", "autocast")


def same(got: dict, expected: dict) -> None:
    assert got.keys() == expected.keys()
    different = {
        name: (got[name], value)
        for name, value in expected.items()
        if not (torch.equal(got[name], value) if isinstance(value, torch.Tensor) else got[name] == value)
    }
    assert different == {}


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("mode", of_verl_omni.MODES)
def test_verl_omni_losses(mode, state):
    r = record("flow_sde", LATENTS["packed"], index=of_verl_omni.STEPS).to(torch.float32)
    model_output, data = of_verl_omni.batch(r, "sde", r.replay(r.velocity), weights=True)
    with installed(verl_omni_standin.build(), "flowdppo_fast.integrations.verl_omni") as integration:
        integration.register(fused_step=False)
        call = sys.modules["verl_omni.workers.utils.losses"].call

        def results() -> dict:
            loss, metrics = call(of_verl_omni.config(mode), model_output, data)
            return {"loss": loss.detach(), **metrics}

        expected = results()
        with STATES[state]():
            got = results()
    assert got["loss"].dtype == torch.float32
    assert float(expected["loss"]) != 0
    same(got, expected)


@pytest.mark.parametrize("mode", of_verl_omni.MODES)
def test_what_inference_mode_made_serves_a_verl_omni_loss(mode):
    r = record("flow_sde", LATENTS["packed"], index=of_verl_omni.STEPS).to(torch.float32)
    grads = []
    with installed(verl_omni_standin.build(), "flowdppo_fast.integrations.verl_omni") as integration:
        integration.register(fused_step=False)
        call = sys.modules["verl_omni.workers.utils.losses"].call
        for made in (torch.enable_grad, torch.inference_mode):
            velocity = r.leaf()
            with made():
                _, old = of_verl_omni.batch(r, "sde", r.old, weights=True)
                old = {name: value.clone() for name, value in old.items()}
            assert all(value.is_inference() == (made is torch.inference_mode) for value in old.values())
            model_output, _ = of_verl_omni.batch(r, "sde", r.replay(velocity))
            loss, _ = call(of_verl_omni.config(mode), model_output, old)
            grads += torch.autograd.grad(loss, velocity)
    assert float(grads[0].abs().max()) > 0
    assert torch.equal(*grads)


@pytest.mark.parametrize("state", REPLAYED)
@pytest.mark.parametrize("sampler", of_unirl.STRATEGIES)
def test_unirl_algorithm(sampler, state):
    results = []
    for entered in (torch.enable_grad, STATES[state]):
        with installed(unirl_standin.build("september"), of_unirl.NAME) as integration:
            stage = of_unirl.make_stage(integration, sampler)
            segment = of_unirl.rollout(stage)
            algorithm = of_unirl.algorithm(integration, stage)
            algorithm.prepare_segment(conditions={}, segment=segment)
            of_unirl.update(stage)
            with entered():
                result, grad = of_unirl.run(algorithm, segment)
            results.append({"grad": grad, **result.metrics})
    assert float(results[0]["grad"].abs().max()) > 0
    same(results[1], results[0])


@pytest.mark.parametrize("state", REPLAYED)
@pytest.mark.parametrize("dynamics", ["Flow-SDE", "CPS"])
def test_flow_factory_trainer(dynamics, state):
    results = []
    for entered in (torch.enable_grad, STATES[state]):
        with installed(flow_factory_standin.build(), "flowdppo_fast.integrations.flow_factory") as integration:
            trainer = of_flow_factory.make(integration, dynamics, kl_beta=0.1)
            batch = of_flow_factory.rollout(trainer)
            of_flow_factory.update(trainer)
            with entered():
                grad, logged = of_flow_factory.run(trainer, batch)
            results.append({"grad": grad, **logged})
    assert float(results[0]["grad"].abs().max()) > 0
    same(results[1], results[0])
