"""Pipelines that are called in a way of their own, trained by the trainer for an iteration."""

from __future__ import annotations

import diffusers
import pytest
import torch
from diffusers.modular_pipelines import FluxAutoBlocks

from flowdppo_fast.trainer import FlowDPPOConfig, FlowDPPOTrainer
from flowdppo_fast.trainer.pipeline_calls import images_of
from flowdppo_fast.trainer.prompts import PromptSource

from .families import FAMILIES
from .tiny import flux

# diffusers' own
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation:DeprecationWarning", "ignore:`FluxPosEmbed` is deprecated:FutureWarning"
)


def modular_flux():
    """Flux as blocks, without the one that encodes texts."""
    base = flux(vae=True)(FAMILIES["Flux"].tiny)
    blocks = FluxAutoBlocks()
    blocks.sub_blocks.pop("text_encoder")
    pipeline = blocks.init_pipeline()
    pipeline.update_components(transformer=base.transformer, scheduler=base.scheduler, vae=base.vae)
    return pipeline


def embedded(number: int) -> dict:
    torch.manual_seed(number)
    sizes = FAMILIES["Flux"].tiny
    return {
        "prompt_embeds": torch.randn(sizes.tokens, sizes.text), "pooled_prompt_embeds": torch.randn(sizes.pooled),
        "text": str(number),
    }  # fmt: skip


def brightness(images, prompts, metadata):
    return images.flatten(1).mean(1)


def train(pipeline, prompts, tmp_path, **sampling) -> tuple[FlowDPPOTrainer, list[dict]]:
    config = FlowDPPOConfig.from_dict(
        {
            "sampling": {"num_steps": 4, "prompts_per_rollout": 2, "group_size": 2, **sampling},
            "model": {"train": "full"},
            "optimizer": {"micro_batch_size": 4, "learning_rate": 1e-4},
            "run": {"iterations": 1, "output_dir": str(tmp_path), "progress": False, "plot_every": 0, "device": "cpu"},
        }
    )
    trainer = FlowDPPOTrainer(pipeline, brightness, prompts, config)
    before = [p.detach().clone() for p in pipeline.transformer.parameters()]
    history = trainer.train()
    assert not all(torch.equal(p, q) for p, q in zip(pipeline.transformer.parameters(), before))
    return trainer, history


def test_a_modular_pipeline_is_trained(tmp_path):
    sizes = {"height": 32, "width": 32, "guidance_scale": 3.5}
    trainer, history = train(modular_flux(), [embedded(i) for i in range(3)], tmp_path, pipeline_kwargs=sizes)
    assert trainer.replay_check.same_geometry == 0.0
    assert history[0]["replay_log_ratio_max"] < 1e-5


def test_what_a_modular_pipeline_would_leave_out_is_an_error():
    with pytest.raises(ValueError, match=r"FluxModularPipeline takes no argument 'depth'"):
        PromptSource([embedded(0)], modular_flux(), ["depth", "return_dict"])
    state = diffusers.modular_pipelines.PipelineState()
    state.set("width", 8)
    with pytest.raises(ValueError, match=r"pipeline: its state has \['width'\], expected one of images, videos"):
        images_of(state)


class OneGenerator(diffusers.FluxPipeline):
    """Takes no list of generators, as some pipelines for video do."""

    def __call__(self, *args, generator=None, **kwargs):
        assert isinstance(generator, torch.Generator)
        return super().__call__(*args, generator=generator, **kwargs)


def test_a_pipeline_that_takes_one_generator_is_trained_row_by_row(tmp_path):
    made = {}
    for kind in (OneGenerator, diffusers.FluxPipeline):
        torch.manual_seed(0)
        pipeline = flux(kind, vae=True)(FAMILIES["Flux"].tiny)
        options = {"height": 32, "width": 32}
        _, history = train(
            pipeline, [embedded(i) for i in range(3)], tmp_path / kind.__name__, batch_size=1, pipeline_kwargs=options
        )
        made[kind] = history[0]["loss"], [p.detach().clone() for p in pipeline.transformer.parameters()]
    (loss, weights), (other, own) = made.values()
    assert loss == other
    assert all(torch.equal(p, q) for p, q in zip(weights, own))
