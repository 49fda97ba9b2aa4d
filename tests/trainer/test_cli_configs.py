"""The ready configs: readable, consistent with the pipelines they name, and with the numbers they cite."""

from __future__ import annotations

import inspect
from pathlib import Path

import diffusers
import pytest
import torch
from digits_example import EXAMPLE

from flowdppo_fast.trainer.recipe import Recipe
from flowdppo_fast.trainer.rewards import build_rewards
from flowdppo_fast.trainer.weights.adapters import blocks_of, is_target

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

JOINT_ATTENTION = (
    "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
    "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
)  # fmt: skip
FLUX_MLP = ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2")
FLUX2_MLP = ("ff.linear_in", "ff.linear_out", "ff_context.linear_in", "ff_context.linear_out")
QWEN = (
    *(name.removeprefix("attn.") for name in JOINT_ATTENTION),
    "img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2",
)  # fmt: skip

# threshold, sampler, eta, steps, trained steps, prompts, group, learning rate, LoRA rank, LoRA alpha, LoRA layers, std
# and clip of advantages
PUBLISHED = {
    # Tencent-Hunyuan/UniRL b67c176, examples/diffusion/sd3_flowdppo.yaml
    "sd3_5_medium": (1e-5, "flow_sde", 0.7, 10, 3, 48, 16, 3e-4, 32, 64.0, JOINT_ATTENTION, "global", None),
    # X-GenGroup/Flow-Factory 5f6cda1, examples/dppo/lora/flux2_klein_base/geneval2_single.yaml; layers:
    # default_target_modules of src/flow_factory/models/flux/flux2_klein.py
    "flux2_klein": (1e-6, "flow_sde", 0.7, 14, 3, 64, 24, 3e-4, 64, 128.0,
                    (*JOINT_ATTENTION, *FLUX2_MLP, "attn.to_qkv_mlp_proj"), "global", 5.0),
    # verl-project/verl-omni 29276b3, examples/flowdppo_trainer/qwen_image/run_qwen_image_ocr_lora.sh; std: the default
    # of trainer/config/algorithm.py
    "qwen_image_ocr": (1e-5, "flow_sde", 1.2, 10, 2, 32, 16, 3e-4, 64, 128.0, QWEN, "global", None),
    # the threshold is UniRL's for this model, the others are flow_grpo's: general_ocr_sd3 of config/grpo.py and
    # scripts/train_sd3.py
    "sd3_5_medium_ocr": (1e-5, "flow_sde", 0.7, 10, None, 48, 24, 3e-4, 32, 64.0, JOINT_ATTENTION, "global", 5.0),
    # only the threshold of the two below is from Flow-DPPO, see their comments; pickscore_flux and general_ocr_wan2_1
    "flux1_dev": (1e-5, "flow_sde", 0.9, 6, None, 48, 24, 3e-4, 64, 128.0,
                  (*JOINT_ATTENTION, *FLUX_MLP), "global", 5.0),
    "wan2_1_1_3b": (1e-5, "wan", 0.7, 20, 5, 16, 4, 1e-4, 32, 64.0, None, "group", 5.0),
}  # fmt: skip
TRANSFORMERS = {
    "FluxPipeline": "FluxTransformer2DModel",
    "Flux2KleinPipeline": "Flux2Transformer2DModel",
    "QwenImagePipeline": "QwenImageTransformer2DModel",
    "StableDiffusion3Pipeline": "SD3Transformer2DModel",
    "WanPipeline": "WanTransformer3DModel",
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
        model.lora_targets and tuple(model.lora_targets), recipe.config.advantage.std, recipe.config.advantage.clip,
    ) == PUBLISHED[name]  # fmt: skip
    assert recipe.config.objective.name == "dppo"
    assert o.updates_per_rollout == 2


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_block_of_the_real_transformer_has_adapters(name):
    """On the class's own sizes, which are those of one released model; all named layers exist."""
    targets = load(name).config.model.lora_targets
    with torch.device("meta"):
        transformer = getattr(diffusers, TRANSFORMERS[PIPELINES[name]])()
    paths = [path for path, layer in transformer.named_modules() if isinstance(layer, torch.nn.Linear)]
    blocks = blocks_of(transformer)
    assert blocks
    chosen = [path for path in paths if is_target(path, targets)]
    for block, count in blocks.items():
        assert {int(path.split(".")[1]) for path in chosen if path.startswith(f"{block}.")} == set(range(count)), block
    for target in targets or ():
        assert any(is_target(path, [target]) for path in paths), target


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
