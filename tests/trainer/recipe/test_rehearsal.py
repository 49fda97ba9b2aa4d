"""What a dry run says of memory: a pipeline without weights is called as the trainer calls the real one."""

from __future__ import annotations

import copy
import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from digits_example import EXAMPLE
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from flowdppo_fast.trainer.recipe import Recipe
from flowdppo_fast.trainer.recipe.preflight import Component, inspect_pipeline
from flowdppo_fast.trainer.recipe.rehearsal import component_bytes, describe, rehearse, run_bytes
from flowdppo_fast.trainer.record.recorder import TrajectoryRecorder
from flowdppo_fast.trainer.record.trajectory import trajectory_bytes
from flowdppo_fast.trainer.weights.adapters import add_lora

ROWS = 4


def recipe_of(folder: Path, **sections) -> Recipe:
    values = {
        "pipeline": {"pretrained": str(folder), "dtype": "float32"},
        "prompts": {"train": ["a cat"]},
        "rewards": [{"name": "jpeg"}],
        "sampling": {"num_steps": 4, "sde_steps": [0, 2]},
    }
    return Recipe.from_dict({**values, **{name: {**values.get(name, {}), **given} for name, given in sections.items()}})


@pytest.fixture(scope="module")
def sd3_with_encoders(pipes, tmp_path_factory):
    """A tiny StableDiffusion3 pipeline with two CLIP text encoders, and its folder."""
    folder = tmp_path_factory.mktemp("sd3")
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77)
    config = CLIPTextConfig(
        vocab_size=len(words), hidden_size=8, intermediate_size=16, projection_dim=8, num_hidden_layers=3,
        num_attention_heads=2, bos_token_id=len(words) - 2, eos_token_id=len(words) - 1,
    )  # fmt: skip
    components = pipes.sd3().components
    for suffix in ("", "_2"):
        components[f"text_encoder{suffix}"] = CLIPTextModelWithProjection(copy.deepcopy(config)).eval()
        components[f"tokenizer{suffix}"] = tokenizer
    pipeline = StableDiffusion3Pipeline(**components)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(folder / "pipeline")
    for file in (folder / "pipeline").rglob("*.safetensors"):
        # nothing here may need weights
        file.unlink()
    return pipeline, folder / "pipeline"


def real_call(pipeline, recipe: Recipe, prompts: list[str]):
    """Trajectory of a real call, and the arguments of its last transformer call."""
    settings, seen = recipe.config.sampling, {}
    hook = pipeline.transformer.register_forward_pre_hook(lambda _m, _a, kwargs: seen.update(kwargs), with_kwargs=True)
    with TrajectoryRecorder(pipeline).recording(settings.candidate_steps) as trajectory, torch.no_grad():
        pipeline(
            prompts, num_inference_steps=settings.num_steps, output_type="latent",
            generator=[torch.Generator().manual_seed(row) for row in range(len(prompts))], **settings.pipeline_kwargs,
        )  # fmt: skip
    hook.remove()
    return trajectory, seen


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_the_transformer_is_given_what_the_real_pipeline_gives_it(sd3_with_encoders, scale):
    pipeline, folder = sd3_with_encoders
    recipe = recipe_of(
        folder, sampling={"pipeline_kwargs": {"height": 8, "width": 8, "guidance_scale": scale}, "group_size": ROWS}
    )
    found = rehearse(recipe, inspect_pipeline(recipe), "transformer")
    trajectory, seen = real_call(pipeline, recipe, ["a cat"] * ROWS)
    assert (found.calls, found.copies) == (1, 1 if scale == 1.0 else 2)
    assert found.trajectory == trajectory_bytes([trajectory])
    given = found.arguments(found.copies * ROWS)
    tensors = {name: value for name, value in seen.items() if isinstance(value, torch.Tensor)}
    assert {name: value.shape for name, value in given.items() if isinstance(value, torch.Tensor)} == {
        name: value.shape for name, value in tensors.items()
    }
    assert all(given[name].device.type == "meta" for name in tensors)


def test_bytes_of_the_digits_run():
    recipe = Recipe.from_yaml(EXAMPLE.parent / "configs" / "digits.yaml", [f"pipeline.pretrained={EXAMPLE}/checkpoint"])
    plan = inspect_pipeline(recipe)
    parts, missing = run_bytes(recipe, plan)
    assert missing is None
    entries = plan.components["transformer"].parameters
    # float32: weight, gradient and two moments
    assert parts["trained"] == 16 * entries
    # forty activations of a page's tokens for each layer and row, give or take: far more than the weights
    assert parts["activations"] > 4 * parts["trained"]
    # of 160 samples and three steps: velocity and latents of 256 pixels, and what a prompt brings
    assert 160 * 3 * 256 * 8 < parts["trajectories"] < 160 * 3 * 256 * 8 * 1.1
    assert parts["update"] == parts["trained"] + parts["activations"] + parts["trajectories"]
    said = describe(recipe, plan)
    assert f"{parts['activations'] / 2**30:.3f} GiB  activations of a micro-batch" in said
    assert f"{parts['update'] / 2**30:.3f} GiB  in an update" in said


def test_weights_are_counted_as_they_are_loaded(sd3_with_encoders):
    pipeline, folder = sd3_with_encoders
    sampling = {"pipeline_kwargs": {"height": 8, "width": 8}}
    recipe = recipe_of(
        folder,
        pipeline={"dtype": "bfloat16", "vae_dtype": "float32"},
        model={"lora_rank": 3, "lora_targets": ["to_q", "to_out.0", "k"], "ema_decay": 0.9, "mixed_precision": "bf16"},
        sampling=sampling,
    )
    plan = inspect_pipeline(recipe)
    counts = {
        name: sum(p.numel() for p in m.parameters())
        for name, m in pipeline.components.items()
        if hasattr(m, "parameters")
    }
    assert {name: part.parameters for name, part in plan.components.items() if part.parameters} == counts
    sizes = component_bytes(recipe, plan)
    assert (sizes["transformer"], sizes["vae"]) == (2 * counts["transformer"], 4 * counts["vae"])
    adapted = copy.deepcopy(pipeline.transformer)
    # the last one is the end of a name, but not a name
    add_lora(adapted, 3, 6.0, ["to_q", "to_out.0", "k"], 0)
    entries = sum(p.numel() for name, p in adapted.named_parameters() if "lora" in name)
    parts, missing = run_bytes(recipe, plan)
    assert missing is None
    assert (parts["weights"], parts["idle"]) == (sizes["transformer"], sum(sizes.values()) - sizes["transformer"])
    # with the copy in bfloat16
    assert (parts["trained"], parts["ema"]) == (18 * entries, 4 * entries)
    full = recipe_of(folder, model={"train": "full"}, sampling=sampling)
    parts, _ = run_bytes(full, plan)
    assert (parts["weights"], parts["trained"]) == (0, 16 * counts["transformer"])
    quantised = recipe_of(
        folder,
        pipeline={
            "dtype": "bfloat16", "quantization": {"backend": "torchao", "options": {"type": "Int8WeightOnlyConfig"}}
        },
        model={"mixed_precision": "bf16"},
    )  # fmt: skip
    linear = sum(m.weight.numel() for m in pipeline.transformer.modules() if isinstance(m, torch.nn.Linear))
    assert component_bytes(quantised, plan)["transformer"] == linear + 2 * (counts["transformer"] - linear)


def test_a_pipeline_that_needs_numbers_is_said_to(pipes, tmp_path):
    """Without text encoders this one cannot take texts."""
    pipes.sd3().save_pretrained(tmp_path / "sd3")
    recipe = recipe_of(tmp_path / "sd3")
    plan = inspect_pipeline(recipe)
    parts, missing = run_bytes(recipe, plan)
    assert (parts["activations"], parts["trajectories"]) == (0, 0)
    assert parts["update"] == parts["weights"] + parts["trained"] + parts["idle"]
    assert missing.startswith("StableDiffusion3Pipeline could not be called without weights (")
    assert f"without activations and trajectories: {missing}" in describe(recipe, plan)
    # an index may name any library, whose code is not imported for this
    odd = dataclasses.replace(plan, components={**plan.components, "scheduler": Component("scheduler", "this", "That")})
    assert "ValueError: scheduler is a That of this" in run_bytes(recipe, odd)[1]
    assert "this" not in sys.modules
    # adapters and frozen weights of a second transformer count too, as Wan2.2 has it
    pair = dataclasses.replace(plan, components={**plan.components, "transformer_2": plan.components["transformer"]})
    both, _ = run_bytes(recipe, pair)
    assert (both["weights"], both["trained"]) == (2 * parts["weights"], 2 * parts["trained"])
