"""The ready configs: readable, consistent with the pipelines they name, and with the numbers they cite."""

from __future__ import annotations

import inspect
from pathlib import Path

import diffusers
import pytest
from digits_example import EXAMPLE

from flowdppo_fast.trainer.recipe import Recipe
from flowdppo_fast.trainer.rewards import build_rewards

ROOT = EXAMPLE.parents[1]
CONFIGS = sorted(path.stem for path in (ROOT / "examples" / "configs").glob("*.yaml"))

PIPELINES = {
    "flux1_dev": "FluxPipeline",
    "flux1_dev_24gb": "FluxPipeline",
    "flux2_klein": "Flux2KleinPipeline",
    "qwen_image_ocr": "QwenImagePipeline",
    "sd3_5_medium_ocr": "StableDiffusion3Pipeline",
    "sd3_5_medium": "StableDiffusion3Pipeline",
    "wan2_1_14b_80gb": "WanPipeline",
    "wan2_1_1_3b": "WanPipeline",
}

# threshold, sampler, eta, steps, trained steps, prompts, group, learning rate, LoRA rank, LoRA alpha
PUBLISHED = {
    "sd3_5_medium": (1e-5, "flow_sde", 0.7, 10, 3, 48, 16, 3e-4, 32, 64.0),
    "flux2_klein": (1e-6, "flow_sde", 0.7, 14, 3, 64, 24, 3e-4, 64, 128.0),
    "qwen_image_ocr": (1e-5, "flow_sde", 1.2, 10, 2, 32, 16, 3e-4, 64, 128.0),
    # the threshold is UniRL's for this model, the others are flow_grpo's
    "sd3_5_medium_ocr": (1e-5, "flow_sde", 0.7, 10, None, 48, 24, 3e-4, 32, 64.0),
    # only the threshold of the two below is from Flow-DPPO, see their comments
    "flux1_dev": (1e-5, "flow_sde", 0.9, 6, None, 48, 24, 3e-4, 32, 64.0),
    "wan2_1_1_3b": (1e-5, "wan", 0.7, 20, 5, 16, 4, 1e-4, 32, 64.0),
}


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


def load(name: str) -> Recipe:
    return Recipe.from_yaml(Path("examples/configs") / f"{name}.yaml")


def test_all_configs_are_checked_here():
    assert set(CONFIGS) == {*PIPELINES, "digits", "words"}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_is_consistent(name):
    recipe = load(name)
    train, evaluation = recipe.load_prompts()
    assert len(train) == len({str(prompt) for prompt in train}) >= 10
    if evaluation is not None:
        # held out for real
        assert not {str(prompt) for prompt in evaluation} & {str(prompt) for prompt in train}
    assert recipe.config.run.output_dir == f"runs/{name}"
    # with one update per rollout no bound does anything
    assert recipe.config.optimizer.updates_per_rollout * recipe.config.optimizer.inner_epochs >= 2
    build_rewards(list(recipe.rewards))


@pytest.mark.parametrize("name", PIPELINES)
def test_the_call_of_the_pipeline_takes_the_arguments(name):
    recipe = load(name)
    known = inspect.signature(getattr(diffusers, PIPELINES[name]).__call__).parameters
    used = {*recipe.config.sampling.pipeline_kwargs, *recipe.config.evaluation.pipeline_kwargs}
    first = recipe.load_prompts()[0][0]
    used |= set() if isinstance(first, str) else set(first) - {"text", "metadata"}
    assert used <= set(known)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_numbers(name):
    recipe = load(name)
    s, o, model = recipe.config.sampling, recipe.config.optimizer, recipe.config.model
    assert (
        recipe.config.objective.threshold, s.sampler, s.eta, s.num_steps, s.sde_steps_per_rollout,
        s.prompts_per_rollout, s.group_size, o.learning_rate, model.lora_rank, model.lora_alpha,
    ) == PUBLISHED[name]  # fmt: skip
    assert recipe.config.objective.name == "dppo"
    assert o.updates_per_rollout == 2


def test_the_small_card_recipe_saves_what_can_be_saved():
    recipe = load("flux1_dev_24gb")
    config, quantization = recipe.config, recipe.pipeline.quantization
    assert quantization.backend == "bitsandbytes_4bit"
    assert quantization.components == ("transformer",)
    assert recipe.pipeline.vae_tiling
    assert config.model.gradient_checkpointing
    assert config.model.offload_idle
    assert config.sampling.offload_trajectories
    assert (config.optimizer.micro_batch_size, config.optimizer.steps_per_micro_batch) == (1, 1)
