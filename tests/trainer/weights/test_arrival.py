"""Pipelines that arrive changed: what they bring is kept, or refused by name."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from peft import LoHaConfig, LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file

from flowdppo_fast.trainer import FlowDPPOTrainer
from flowdppo_fast.trainer.export import SavedRun, apply_weights, export_run

PROMPTS = ["3", "8"]


@pytest.fixture
def config(small_config):
    def make(**sections):
        shape = {"num_steps": 4, "sde_steps": [0, 1], "prompts_per_rollout": 2, "group_size": 2}
        short = {"sampling": shape, "run": {"iterations": 1}, "optimizer": {"learning_rate": 0.05}}
        values = {"model": {"train": "lora", "lora_rank": 2, "lora_alpha": 6.0}, **sections}
        return small_config(**{name: {**short.get(name, {}), **values.get(name, {})} for name in {*short, *values}})

    return make


def bright(images, prompts, metadata):
    return images.float().flatten(1).mean(1)


def draw(pipeline, steps=3):
    seeds = [torch.Generator().manual_seed(seed) for seed in range(2)]
    with torch.no_grad():
        return pipeline(PROMPTS, num_inference_steps=steps, generator=seeds, output_type="latent")[0]


def same(a, b):
    """Up to what another place in memory makes matrix products round."""
    return float((a - b).abs().max()) < 1e-5


def with_adapter(pipeline, name="style", kind=LoraConfig, **options):
    torch.manual_seed(7)
    if kind is LoraConfig:
        options = {"init_lora_weights": False, **options}
    pipeline.transformer.add_adapter(kind(r=2, target_modules=["to_q", "to_v"], **options), adapter_name=name)
    return pipeline


@pytest.mark.parametrize("name", ["style", "default"])
def test_training_starts_at_the_adapter_that_is_on(pipes, config, name):
    pipeline = with_adapter(pipes.digits(), name)
    given = draw(pipeline)
    assert not same(given, draw(pipes.digits()))
    trainer = FlowDPPOTrainer(pipeline, bright, PROMPTS, config())
    assert same(draw(pipeline), given)
    frozen = {key: p.clone() for key, p in pipeline.transformer.named_parameters() if f".{name}." in key}
    trainer.train()
    assert not same(draw(pipeline), given)
    with trainer.weights.reference():
        assert same(draw(pipeline), given)
    after = dict(pipeline.transformer.named_parameters())
    assert frozen.keys() <= after.keys()
    assert all(torch.equal(after[key], value) and not after[key].requires_grad for key, value in frozen.items())
    # what is saved is the trained adapter alone, whatever its name
    trainer.save_pretrained(trainer.output / "out")
    fresh = with_adapter(pipes.digits(), name)
    fresh.transformer.load_lora_adapter(
        trainer.output / "out" / "transformer", weight_name="pytorch_lora_weights.safetensors", adapter_name="more"
    )
    fresh.transformer.set_adapters([name, "more"])
    assert same(draw(fresh), draw(pipeline))


def test_adapters_that_are_off_stay_off(pipes, config):
    pipeline = with_adapter(pipes.digits())
    pipeline.transformer.disable_adapters()
    trainer = FlowDPPOTrainer(pipeline, bright, PROMPTS, config())
    base = draw(pipes.digits())
    assert same(draw(pipeline), base)
    with trainer.weights.reference():
        assert same(draw(pipeline), base)


def test_a_run_on_an_adapter_continues_and_is_sampled_on_it(pipes, config):
    first = FlowDPPOTrainer(with_adapter(pipes.digits(), "default"), bright, PROMPTS, config())
    first.train()
    again = FlowDPPOTrainer(with_adapter(pipes.digits(), "default"), bright, PROMPTS, config(run={"iterations": 2}))
    again.train(resume=True)
    sampled = with_adapter(pipes.digits(), "default")
    apply_weights(SavedRun.open(again.output), sampled)
    assert same(draw(sampled), draw(again.pipeline))


@pytest.mark.slow
def test_names_of_compiled_transformers_and_blocks_are_the_models(pipes, config, tmp_path):
    whole, blocks = pipes.digits(), pipes.digits()
    whole.transformer = torch.compile(whole.transformer, backend="eager")
    layers = blocks.transformer.transformer_blocks
    layers[0] = torch.compile(layers[0], backend="eager")
    plain = {}
    for name, pipeline in (("plain", pipes.digits()), ("whole", whole), ("blocks", blocks)):
        for train in ("lora", "full"):
            settings = config(model={"train": train}, run={"output_dir": str(tmp_path / name / train)})
            trainer = FlowDPPOTrainer(pipeline if train == "lora" else pipes.digits(), bright, PROMPTS, settings)
            if train == "full" and name != "plain":
                continue
            trainer.train()
            trainer.save_pretrained(trainer.output / "out")
            file = next((trainer.output / "out" / "transformer").glob("*.safetensors"))
            plain.setdefault(train, set(load_file(file)))
            assert set(load_file(file)) == plain[train]
            kept = load_file(SavedRun.open(trainer.output).checkpoint / "weights.safetensors")
            assert not [key for key in kept if "_orig_mod" in key]


def test_what_is_exported_is_what_is_saved(pipes, config, tmp_path):
    trainer = FlowDPPOTrainer(pipes.digits(), bright, PROMPTS, config())
    trainer.train()
    trainer.save_pretrained(tmp_path / "saved")
    (exported, _) = export_run(SavedRun.open(trainer.output), tmp_path / "exported")
    saved = tmp_path / "saved" / "transformer" / exported.name
    one, other = load_file(saved), load_file(exported)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    with safe_open(saved, "pt") as a, safe_open(exported, "pt") as b:
        said = [json.loads(file.metadata()["lora_adapter_metadata"]) for file in (a, b)]
    for key in ("r", "lora_alpha", "target_modules"):
        assert said[0][f"transformer.{key}"] == said[1][f"transformer.{key}"]


def fused(pipeline):
    with_adapter(pipeline)
    pipeline.transformer.fuse_lora()


def inference(pipeline):
    with torch.inference_mode():
        pipeline.transformer.to(torch.float64)


REFUSED = {
    "fused and still loaded": (fused, r"transformer has the adapter 'style' fused and still loaded"),
    "another kind of adapter": (lambda p: with_adapter(p, kind=LoHaConfig), r"adapters of another kind than LoRA"),
    "peft's own wrapper": (
        lambda p: setattr(p, "transformer", get_peft_model(p.transformer, LoraConfig(r=2, target_modules=["to_q"]))),
        r"wrapped in PeftModel",
    ),
    "data parallel": (
        lambda p: setattr(p, "transformer", torch.nn.DataParallel(p.transformer)),
        r"wrapped in DataParallel",
    ),
    "casting hooks": (
        lambda p: p.transformer.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32),
        r"enable_layerwise_casting\(\) keeps weights in another dtype",
    ),
    "offloading hooks": (lambda p: p.enable_model_cpu_offload(device="cpu"), r"remove_all_hooks\(\) first"),
    "weights of inference mode": (inference, r"loaded under torch.inference_mode\(\)"),
    "no weights": (lambda p: p.transformer.to("meta"), r"weights on the meta device"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_kept_is_refused_by_name(pipes, config, case):
    change, message = REFUSED[case]
    pipeline = pipes.digits()
    change(pipeline)
    with pytest.raises(ValueError, match=rf"pipeline: transformer .*{message.removeprefix('transformer ')}"):
        FlowDPPOTrainer(pipeline, bright, PROMPTS, config())


def test_adapters_beside_full_weights_are_refused(pipes, config):
    with pytest.raises(ValueError, match=r"carries the adapter 'style' and model.train is 'full'"):
        FlowDPPOTrainer(with_adapter(pipes.digits()), bright, PROMPTS, config(model={"train": "full"}))


def test_a_second_trainer_is_told_of_the_first(pipes, config):
    pipeline = pipes.digits()
    FlowDPPOTrainer(pipeline, bright, PROMPTS, config())
    with pytest.raises(ValueError, match=r"adapter 'default' of another trainer.*load the pipeline again"):
        FlowDPPOTrainer(pipeline, bright, PROMPTS, config())


CHANGED = {
    "switched off": (lambda p: p.transformer.disable_adapters(), r"adapter 'default' of transformer was switched off"),
    "another one on": (with_adapter, r"adapter 'default' of transformer was switched off or removed"),
    "removed": (lambda p: p.transformer.unload_lora(), r"adapter 'default' of transformer was switched off or removed"),
    "fused": (lambda p: p.transformer.fuse_lora(), r"adapter 'default' of transformer is fused"),
    "moved by hooks": (lambda p: p.enable_model_cpu_offload(device="cpu"), r"remove_all_hooks\(\) first"),
    "casting hooks": (
        lambda p: p.transformer.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32),
        r"enable_layerwise_casting\(\) keeps weights in another dtype",
    ),
}


@pytest.mark.parametrize("case", CHANGED)
def test_what_is_done_to_the_pipeline_later_is_seen_when_a_run_begins(pipes, config, case):
    change, message = CHANGED[case]
    pipeline = pipes.digits()
    trainer = FlowDPPOTrainer(pipeline, bright, PROMPTS, config())
    change(pipeline)
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert not trainer.output.exists()


def test_a_transformer_that_is_compiled_later_is_trained(pipes, config):
    expected = FlowDPPOTrainer(pipes.digits(), bright, PROMPTS, config()).train()
    pipeline = pipes.digits()
    settings = config(run={"output_dir": f"{config().run.output_dir}2"})
    trainer = FlowDPPOTrainer(pipeline, bright, PROMPTS, settings)
    pipeline.transformer = torch.compile(pipeline.transformer, backend="eager")
    assert trainer.train()[0]["grad_norm"] == pytest.approx(expected[0]["grad_norm"], rel=1e-4)


class Squared(FlowMatchEulerDiscreteScheduler):
    def set_timesteps(self, num_inference_steps=None, device=None, sigmas=None, mu=None, timesteps=None):
        count = num_inference_steps or len(sigmas)
        super().set_timesteps(device=device, sigmas=[(1 - i / count) ** 2 for i in range(count)], mu=mu)


class Damped(FlowMatchEulerDiscreteScheduler):
    def step(self, model_output, timestep, sample, **options):
        return super().step(0.9 * model_output, timestep, sample, **options)


def set_by_hand():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.sigma_min, scheduler.sigma_max = 1 / 1000, 1.0
    return scheduler


@pytest.mark.parametrize("make", [Squared, set_by_hand, lambda: FlowMatchEulerDiscreteScheduler(shift=3.0)])
def test_a_scheduler_of_ones_own_keeps_its_levels(pipes, config, make):
    pipeline = pipes.digits()
    pipeline.scheduler = make()
    draw(pipeline, 4)
    levels = pipeline.scheduler.sigmas.clone()
    assert not torch.equal(levels, torch.linspace(1, 0, 5))
    trainer = FlowDPPOTrainer(pipeline, bright, PROMPTS, config())
    (trajectory,) = trainer.sample(0).trajectories
    assert torch.equal(trajectory.sde_step.sigma.float(), levels[:2])


def test_a_scheduler_with_steps_of_its_own_is_refused(pipes, config):
    pipeline = pipes.digits()
    pipeline.scheduler = Damped()
    with pytest.raises(ValueError, match=r"Damped has a step\(\) of its own"):
        FlowDPPOTrainer(pipeline, bright, PROMPTS, config()).sample(0)
