"""Opt-in: the integrations against the trainers' own code, taken from checkouts below ``FLOWDPPO_PEER_REPOS``.

Only the functions and classes at hand are executed, cut out of their files by the parser, so that nothing of a trainer
has to be installed. With the variable set, a trainer that has no checkout is a failure.
``FLOWDPPO_PEER_REPOS=<folder with checkouts> pytest tests/integrations/test_real_peers.py -rs``
"""

from __future__ import annotations

import ast
import dataclasses
import itertools
import math
import os
import sys
import typing
from abc import ABC, abstractmethod
from collections import defaultdict
from pathlib import Path
from types import ModuleType

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from diffusers.utils.torch_utils import randn_tensor

from flowdppo_fast.integrations import dance_grpo, flow_grpo, mix_grpo

from . import test_flow_factory, test_unirl, test_verl_omni
from .recorded import ETA, LATENTS, SIGMAS, record
from .standins import flow_factory as flow_factory_standin
from .standins import installed
from .standins import unirl as unirl_standin

FOLDER = os.environ.get("FLOWDPPO_PEER_REPOS")
pytestmark = pytest.mark.skipif(
    not FOLDER, reason="FLOWDPPO_PEER_REPOS is not set; it names a folder of checkouts of the trainers"
)
CLOSE = {"rtol": 2e-4, "atol": 1e-5}


def defined(node: ast.stmt) -> str | None:
    """The name that a top-level statement defines."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return node.name
    targets = [node.target] if isinstance(node, ast.AnnAssign) else getattr(node, "targets", [])
    return next((t.id for t in targets if isinstance(t, ast.Name)), None)


def cut_out(relative: str, names: typing.Sequence[str], with_text: str = "", without: str = "\0", **namespace) -> dict:
    """Executes the named top-level definitions of a file, from the first checkout that has them all.

    Trees of one trainer are told apart by what a file says: ``with_text`` and not ``without``.
    """
    for path in sorted(Path(FOLDER).glob(f"*/{relative}")):
        text = path.read_text()
        body = [node for node in ast.parse(text).body if defined(node) in names]
        if {defined(node) for node in body} == set(names) and with_text in text and without not in text:
            break
    else:
        told = "".join(
            f", {word} {part!r}" for word, part in (("with", with_text), ("without", without)) if part.strip("\0")
        )
        pytest.fail(f"no checkout below FLOWDPPO_PEER_REPOS has a {relative} that defines {', '.join(names)}{told}")
    future = ast.parse("from __future__ import annotations").body
    common = {
        "torch": torch, "math": math, "randn_tensor": randn_tensor, "dataclass": dataclasses.dataclass,
        "ABC": ABC, "abstractmethod": abstractmethod, "__name__": relative, **vars(typing),
    }  # fmt: skip
    scope = {**common, **namespace}
    exec(compile(ast.Module(future + body, []), relative, "exec"), scope)
    return {name: scope[name] for name in names}


def as_module(name: str, members: dict) -> ModuleType:
    made = ModuleType(name)
    vars(made).update(members)
    return made


@pytest.mark.parametrize("shape", LATENTS.values(), ids=LATENTS)
@pytest.mark.parametrize("sde_type", ["sde", "cps"])
def test_flow_grpo_step(sde_type, shape):
    theirs = cut_out(
        "flow_grpo/diffusers_patch/sd3_sde_with_logprob.py", ["sde_step_with_logprob"], "sde_type",
        FlowMatchEulerDiscreteScheduler=FlowMatchEulerDiscreteScheduler,
    )["sde_step_with_logprob"]  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(10)
    r = record("flow_sde" if sde_type == "sde" else "cps", shape).to(torch.float32)
    replayed = (scheduler.timesteps[[0, 1, 2, 3, 4, 5, 6, 7]], r.next_state)
    for timestep, prev_sample in (replayed, (scheduler.timesteps[2:3], None)):
        results = []
        for step in (theirs, flow_grpo.sde_step_with_logprob):
            v = r.leaf()
            generator = None if prev_sample is not None else torch.Generator().manual_seed(2)
            out = step(
                scheduler, v, timestep, r.state, ETA, prev_sample, generator, sde_type=sde_type, return_sqrt_dt=True
            )
            out[1].sum().backward()
            results.append((*out, v.grad))
        for expected, actual in zip(*results):
            assert actual.shape == expected.shape
            torch.testing.assert_close(actual, expected, **CLOSE)


def test_flow_grpo_step_of_an_older_tree():
    """The July 2025 signature, before ``sde_type``: the replayed step agrees."""
    theirs = cut_out(
        "flow_grpo/diffusers_patch/sd3_sde_with_logprob.py", ["sde_step_with_logprob"],
        FlowMatchEulerDiscreteScheduler=FlowMatchEulerDiscreteScheduler,
    )["sde_step_with_logprob"]  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(10)
    r = record("flow_sde", LATENTS["image"]).to(torch.float32)
    index = [0, 1, 2, 3, 4, 5, 6, 7]
    arguments = {"noise_level": 0.7} if "noise_level" in theirs.__code__.co_varnames else {}
    expected = theirs(scheduler, r.velocity, scheduler.timesteps[index], r.state, prev_sample=r.next_state, **arguments)
    actual = flow_grpo.sde_step_with_logprob(
        scheduler, r.velocity, scheduler.timesteps[index], r.state, 0.7, r.next_state, return_sqrt_dt=True
    )
    torch.testing.assert_close(actual[1], expected[1], **CLOSE)
    torch.testing.assert_close(actual[2], expected[2], **CLOSE)


@pytest.mark.parametrize("determistic", [False, True])
def test_flow_grpo_wan_step(determistic):
    theirs = cut_out(
        "flow_grpo/diffusers_patch/wan_pipeline_with_logprob.py", ["sde_step_with_logprob"],
        UniPCMultistepScheduler=UniPCMultistepScheduler,
    )["sde_step_with_logprob"]  # fmt: skip
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    scheduler.set_timesteps(10)
    r = record("wan", LATENTS["video"]).to(torch.float32)
    timestep = scheduler.timesteps[[0, 1, 2, 3, 4, 5, 6, 7]]
    for apart in (False, True):
        results = []
        for step in (theirs, flow_grpo.wan_sde_step_with_logprob):
            v = r.leaf()
            out = step(
                scheduler, v, timestep, r.state, None if determistic else r.next_state,
                determistic=determistic, return_dt_and_std_dev_t=apart,
            )  # fmt: skip
            (out[1].sum() + out[2].sum()).backward()
            results.append((*out, v.grad))
        if determistic:
            # there the next state keeps its graph and the log-prob detaches it
            results = [[x.detach() for x in out] for out in results]
        for expected, actual in zip(*results):
            torch.testing.assert_close(actual, expected, **CLOSE)


SCRIPTS = ["flux", "flux_lora", "hunyuan", "qwenimage", "qwenimage_edit", "skyreels_i2v", "wan_2_1"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_dance_grpo_step(script):
    theirs = cut_out(f"fastvideo/train_grpo_{script}.py", ["flux_step"])["flux_step"]
    _same_dance_step(theirs, dance_grpo.flux_step)


def test_mix_grpo_dance_step():
    theirs = cut_out("fastvideo/utils/sampling_utils.py", ["dance_grpo_step"])["dance_grpo_step"]
    _same_dance_step(theirs, mix_grpo.dance_grpo_step)


def _same_dance_step(theirs, ours):
    sigmas = torch.tensor(SIGMAS)
    r = record("dance", LATENTS["packed"]).to(torch.float32)
    for grpo, sde_solver in itertools.product((True, False), repeat=2):
        for prev_sample in (None, r.next_state) if grpo else (None,):
            results = []
            for step in (theirs, ours):
                v = r.leaf()
                torch.manual_seed(9)
                out = step(v, r.state, ETA, sigmas, 2, prev_sample, grpo, sde_solver)
                if prev_sample is not None:
                    out[2].sum().backward()
                    out = (out[0], out[2], v.grad)
                results.append(out)
            for expected, actual in zip(*results):
                torch.testing.assert_close(actual.detach(), expected.detach(), **CLOSE)


@pytest.mark.parametrize("determistic", [False, True])
def test_mix_grpo_flow_step(determistic):
    theirs = cut_out("fastvideo/utils/sampling_utils.py", ["flow_grpo_step"])["flow_grpo_step"]
    sigmas = torch.tensor(SIGMAS)
    r = record("flow_sde", LATENTS["packed"]).to(torch.float32)
    for index in (0, 4):
        for prev_sample in (None, r.next_state):
            generators = [None if prev_sample is not None else torch.Generator().manual_seed(1) for _ in range(2)]
            expected, actual = (
                step(r.velocity, r.state, ETA, sigmas, index, prev_sample, g, determistic)
                for step, g in zip((theirs, mix_grpo.flow_grpo_step), generators)
            )
            for i in (0, 2, 3, 4):
                torch.testing.assert_close(actual[i], expected[i], **CLOSE)


# ---- verl-omni: this project's classes on top of its own


@pytest.fixture
def verl_omni():
    names = [
        "DiffusionLossResult", "_format_available_keys", "DiffusionLossFn", "DIFFUSION_LOSS_REGISTRY",
        "register_diffusion_loss", "FlowGRPOLoss", "FlowDPPOLoss", "GRPOGuardLoss", "KLLoss",
    ]  # fmt: skip
    members = cut_out("verl_omni/trainer/diffusion/diffusion_algos.py", names)
    algos = as_module("verl_omni.trainer.diffusion.diffusion_algos", members)
    members = cut_out(
        "verl_omni/pipelines/schedulers/flow_match_sde.py",
        ["FlowMatchSDEDiscreteSchedulerOutput", "FlowMatchSDEDiscreteScheduler"],
        FlowMatchEulerDiscreteScheduler=FlowMatchEulerDiscreteScheduler, BaseOutput=dict,
    )  # fmt: skip
    schedulers = as_module("verl_omni.pipelines.schedulers.flow_match_sde", members)
    with installed([algos, schedulers], "flowdppo_fast.integrations.verl_omni") as integration:
        yield integration


@pytest.mark.parametrize("mode", test_verl_omni.MODES)
@pytest.mark.parametrize("sde_type", test_verl_omni.SAMPLERS)
def test_verl_omni_losses(verl_omni, sde_type, mode):
    """Its own class and this one in the same registry slot: loss, gradient and every metric."""
    registry = sys.modules["verl_omni.trainer.diffusion.diffusion_algos"].DIFFUSION_LOSS_REGISTRY
    r = record(test_verl_omni.SAMPLERS[sde_type], LATENTS["packed"], index=test_verl_omni.STEPS)
    settings = test_verl_omni.config(mode, sde_type)
    results = []
    for ours in (False, True):
        if ours:
            verl_omni.register(fused_step=False, backend="reference", sigma="verl-omni", guard_scale="batch")
        v = r.leaf()
        model_output, data = test_verl_omni.batch(r, sde_type, r.replay(v), weights=True)
        registry[mode].validate_inputs(loss_name=mode, model_output=model_output, data=data)
        result = registry[mode](config=settings, model_output=model_output, data=data)
        result.loss.backward()
        results.append((result, v.grad))
    (theirs, grad), (result, our_grad) = results
    torch.testing.assert_close(result.loss, theirs.loss, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(our_grad, grad, rtol=1e-8, atol=1e-12)
    assert result.metrics == pytest.approx(theirs.metrics, rel=1e-8, abs=1e-12)


@pytest.mark.parametrize("sde_type", test_verl_omni.SAMPLERS)
def test_verl_omni_step(verl_omni, sde_type):
    scheduler_class = sys.modules["verl_omni.pipelines.schedulers.flow_match_sde"].FlowMatchSDEDiscreteScheduler
    r = record(test_verl_omni.SAMPLERS[sde_type], LATENTS["packed"]).to(torch.float32)
    results = []
    for ours in (False, True):
        if ours:
            verl_omni.register()
        scheduler = scheduler_class(shift=3.0)
        scheduler.set_timesteps(10)
        out = []
        for timestep, prev_sample in ((scheduler.timesteps[[0, 1, 2, 3, 4, 5, 6, 7]], r.next_state), (None, None)):
            if timestep is None:
                scheduler._step_index = 3
            v = r.leaf()
            generator = torch.Generator().manual_seed(0)
            step = scheduler.sample_previous_step(
                r.state, v, timestep=timestep, generator=generator, noise_level=ETA, prev_sample=prev_sample,
                sde_type=sde_type, return_sqrt_dt=True,
            )  # fmt: skip
            step[1].sum().backward()
            # drawn states keep their graph there; the log-prob detaches them
            out += [*(x.detach() for x in step), v.grad]
        results.append(out)
    for expected, actual in zip(*results):
        assert actual.shape == expected.shape
        torch.testing.assert_close(actual, expected, **CLOSE)


# ---- UniRL and Flow-Factory: their own loop beside this one, on the stand-in's model


@pytest.mark.parametrize("sampler", ["flow_sde", "dance", "cps"])
def test_unirl_strategies(sampler):
    names = ["StepStrategy", "SDEStrategy", "FlowSDEStrategy", "CPSSDEStrategy", "DanceSDEStrategy"]
    scope = cut_out("unirl/sde/kernels.py", names, GeneratorLike=None)
    modules = [m for m in unirl_standin.build("june") if m.__name__ != "unirl.sde.kernels"]
    modules.append(as_module("unirl.sde.kernels", scope))
    with installed(modules, "flowdppo_fast.integrations.unirl") as integration:
        name = test_unirl.STRATEGIES[sampler]
        strategies = [scope[name](), getattr(integration, name)()]
        assert strategies[1].canonical_name == strategies[0].canonical_name
        r = record(sampler, LATENTS["image"]).to(torch.float32)
        for dtype in (torch.float32, torch.bfloat16):
            for eta, prev_sample in ((ETA, None), (ETA, r.next_state), (0.0, None)):
                results = []
                for strategy in strategies:
                    torch.manual_seed(11)
                    results.append(
                        strategy.denoise(
                            r.velocity.to(dtype), r.state.to(dtype), torch.tensor(SIGMAS[2]), torch.tensor(SIGMAS[3]),
                            eta=eta, prev_sample=prev_sample, sigma_max=torch.tensor(SIGMAS[1]), step_index=2,
                        )
                    )  # fmt: skip
                for expected, actual in zip(*results):
                    assert (actual is None) == (expected is None)
                    if actual is not None:
                        assert actual.dtype == expected.dtype
                        # a state that is rounded to bfloat16 may fall to the other side
                        slack = 1e-2 if dtype == torch.bfloat16 and prev_sample is None else 1e-5
                        torch.testing.assert_close(actual, expected, rtol=slack, atol=slack)


@pytest.mark.parametrize("backward", ["segment", "step"])
@pytest.mark.parametrize("tree", ["june", "july"])
def test_unirl_algorithm(tree, backward):
    """UniRL's own ``FlowDPPO`` and the fused one on the same segment: loss, gradient and metrics."""
    helpers = ["typed_conditions", "gather_sde_field", "AlgorithmStepResult", "StageAlgorithm"]
    own = ["_flowdppo_kl_adv_loss", "FlowDPPO"]
    told = {"without": "_transition_sigma"} if tree == "june" else {"with_text": "_transition_sigma"}
    if tree == "july":
        helpers += ["_gaussian_kl_div", "_transition_sigma", "_reference_replay_means", "_reference_kl_loss"]
        helpers += ["_resolve_reference_model"]
    else:
        own.insert(0, "_gaussian_kl_div")
    base = cut_out("unirl/algorithms/base.py", helpers, **told, Remote=type("Remote", (), {}))
    theirs = cut_out(
        "unirl/algorithms/flowdppo.py", own, **told,
        require=lambda condition, message: None, **{name: base[name] for name in helpers},
    )  # fmt: skip
    names = ["StepStrategy", "SDEStrategy", "FlowSDEStrategy", "CPSSDEStrategy", "DanceSDEStrategy"]
    std = {"without": "transition_std"} if tree == "june" else {"with_text": "transition_std"}
    modules = [as_module("unirl.sde.kernels", cut_out("unirl/sde/kernels.py", names, **std, GeneratorLike=None))]
    modules += [as_module("unirl.algorithms.base", base), as_module("unirl.algorithms.flowdppo", theirs)]
    shape = (3, 4, 5)
    with installed(modules, "flowdppo_fast.integrations.unirl") as integration:
        results = []
        for cls in (theirs["FlowDPPO"], integration.FlowDPPO):
            stage = test_unirl.make_stage(integration, "flow_sde", shape=shape, dtype=torch.float32)
            # at sigma == 1 the tree of June has a sigma in its KL that is not the transition's
            stage.sde_indices = [1, 3, 4] if tree == "june" else [0, 3, 4]
            segment = test_unirl.rollout(stage, shape)
            options = {"backward": backward} if cls is integration.FlowDPPO else {}
            algo = cls(params=unirl_standin.Params(ETA), stage=stage, kl_mask_threshold=test_unirl.THRESHOLD, **options)
            assert algo.recomputes_anchor() is True
            algo.prepare_segment(conditions={}, segment=segment)
            test_unirl.update(stage)
            results.append(test_unirl.run(algo, segment, test_unirl.ADVANTAGES.float()))
    (expected, expected_grad), (actual, grad) = results
    assert 0.0 < expected.metrics["masked_fraction"] < 1.0
    assert actual.metrics == pytest.approx(expected.metrics, rel=1e-4, abs=1e-6)
    assert actual.loss == pytest.approx(expected.loss, rel=1e-5)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-3, atol=1e-4 * float(expected_grad.abs().max()))


@pytest.mark.parametrize("mask", ["x-based", "v-based"])
@pytest.mark.parametrize("dynamics", ["Flow-SDE", "Dance-SDE", "CPS"])
def test_flow_factory_optimize(dynamics, mask):
    """Flow-Factory's own ``optimize`` and the fused one on the same rollout, with the reference penalty."""
    with installed(flow_factory_standin.build(), "flowdppo_fast.integrations.flow_factory") as integration:
        standin = sys.modules["flow_factory.trainers.dppo"].DPPOTrainer
        scope = cut_out(
            "src/flow_factory/trainers/dppo.py", ["gaussian_kl_div", "DPPOTrainer"],
            GRPOTrainer=standin.__bases__[0], register_trainer=lambda name: lambda cls: cls, defaultdict=defaultdict,
            tqdm=lambda iterable, **options: iterable,
            filter_kwargs=sys.modules["flow_factory.utils.base"].filter_kwargs,
            reduce_loss_info=sys.modules["flow_factory.utils.dist"].reduce_loss_info,
        )  # fmt: skip

        class Theirs(scope["DPPOTrainer"]):
            def __init__(self, *args):
                standin.__bases__[0].__init__(self, *args)

        results, shape = [], (6, 5)
        for cls in (Theirs, integration.DPPOTrainer):
            owner = type("Integration", (), {"DPPOTrainer": cls})
            trainer = test_flow_factory.make(owner, dynamics, shape=shape, kl_mask_type=mask, kl_beta=0.2)
            batch = test_flow_factory.rollout(trainer, shape)
            test_flow_factory.update(trainer)
            trainer.training_args.kl_mask_threshold = float(test_flow_factory._median_divergence(trainer, batch))
            results.append(test_flow_factory.run(trainer, batch))
    (expected_grad, expected), (grad, actual) = results
    assert 0.0 < float(expected["train/masked_ratio"]) < 1.0
    torch.testing.assert_close(grad, expected_grad, rtol=1e-9, atol=1e-11)
    assert actual.keys() == expected.keys()
    # its policy_loss is the tensor that the penalty was added to in place, so it logs the sum
    expected["train/policy_loss"] = expected["train/policy_loss"] - expected["train/kl_loss"]
    theirs, ours = ({name: float(value) for name, value in logged.items()} for logged in (expected, actual))
    assert ours == pytest.approx(theirs, rel=1e-9)
