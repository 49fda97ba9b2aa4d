"""Which calls of which pipelines are recorded, and what the recorder should find in them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import diffusers
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from flowdppo_fast.trainer.record.recorder import Trajectory, TrajectoryRecorder

from .families import FAMILIES
from .tiny import Sizes

PROMPTS, IMAGES = 2, 2


@dataclass(frozen=True)
class Case:
    """One way to call a family's pipeline.

    Attributes:
        family: name in ``families.FAMILIES``.
        options: arguments of the call besides embeddings and sizes.
        rules: what is found on each chosen step; one for all if there is one.
        groups: positions of steps that are replayed together.
        steps: the chosen ones of ``num_steps``.
        sampler: of the recorder.
    """

    family: str
    options: dict[str, Any]
    rules: tuple[str, ...]
    groups: list[list[int]] = field(default_factory=lambda: [[0, 1, 2]])
    steps: tuple[int, ...] = (1, 2, 3)
    num_steps: int = 6
    sampler: str = "flow_sde"


@dataclass
class Recording:
    """A recorded call: ``states`` are the latents after each step, as the pipeline's callback saw them, and ``call``
    makes it again."""

    pipeline: Any
    recorder: TrajectoryRecorder
    trajectory: Trajectory
    states: list[Tensor]
    call: Callable[[], Any]


OFF, HALF = {"guidance_scale": 1.0}, [[0, 1], [2]]
# Wan 2.2 changes its transformer at 0.875 of the noise, below step 1
BOUNDARY = [[0], [1, 2]]

CASES = {
    "sd3": Case("StableDiffusion3", OFF, ("b0",), steps=(0, 1, 3)),
    "sd3-guided": Case("StableDiffusion3", {"guidance_scale": 4.5}, ("b0 + 4.5*(b1 - b0)",), steps=(0, 1, 3)),
    "sd3-skip-layers": Case(
        "StableDiffusion3",
        {"guidance_scale": 4.5, "skip_guidance_layers": [1], "skip_layer_guidance_stop": 0.5},
        ("b0 + 4.5*(b1 - b0) + 2.8*(b1 - b2)", "b0 + 4.5*(b1 - b0) + 2.8*(b1 - b2)", "b0 + 4.5*(b1 - b0)"),
        HALF,
    ),
    "flux": Case("Flux", {"guidance_scale": 3.5}, ("b0",), steps=(0, 1, 3)),
    "flux-guided": Case("Flux", {"true_cfg_scale": 2.3}, ("b1 + 2.3*(b0 - b1)",)),
    "flux2": Case("Flux2", {"guidance_scale": 4.0}, ("b0",), steps=(0, 1, 3)),
    "flux2-klein": Case("Flux2Klein", OFF, ("b0",)),
    "flux2-klein-guided": Case("Flux2Klein", {"guidance_scale": 4.0}, ("b1 + 4*(b0 - b1)",)),
    "qwen": Case("QwenImage", {"true_cfg_scale": 1.0}, ("b0",)),
    "qwen-guided": Case("QwenImage", {"true_cfg_scale": 4.0}, ("(b1 + 4*(b0 - b1))*norm(b0)/norm(b1 + 4*(b0 - b1))",)),
    "qwen-edit": Case("QwenImageEdit", {"true_cfg_scale": 1.0}, ("b0",)),
    "qwen-edit-guided": Case(
        "QwenImageEdit", {"true_cfg_scale": 4.0}, ("(b1 + 4*(b0 - b1))*norm(b0)/norm(b1 + 4*(b0 - b1))",)
    ),
    "qwen-edit-plus-guided": Case(
        "QwenImageEditPlus", {"true_cfg_scale": 4.0}, ("(b1 + 4*(b0 - b1))*norm(b0)/norm(b1 + 4*(b0 - b1))",)
    ),
    "wan": Case("Wan", OFF, ("b0",), steps=(0, 1, 3)),
    "wan-guided": Case("Wan", {"guidance_scale": 5.0}, ("b1 + 5*(b0 - b1)",), steps=(0, 1, 3)),
    "wan-two": Case("Wan two transformers", {"guidance_scale": 1.0}, ("b0",), BOUNDARY),
    "wan-two-guided": Case(
        "Wan two transformers",
        {"guidance_scale": 4.0, "guidance_scale_2": 3.0},
        ("b1 + 4*(b0 - b1)", "b1 + 3*(b0 - b1)", "b1 + 3*(b0 - b1)"),
        BOUNDARY,
    ),
    "wan-per-token": Case("Wan timestep per token", {"guidance_scale": 5.0}, ("b1 + 5*(b0 - b1)",)),
    "hunyuan": Case("HunyuanVideo", {"guidance_scale": 6.0}, ("b0",)),
    "hunyuan-guided": Case("HunyuanVideo", {"true_cfg_scale": 6.0}, ("b1 + 6*(b0 - b1)",)),
    "ltx": Case("LTX", OFF, ("b0",)),
    "ltx-guided": Case("LTX", {"guidance_scale": 3.0}, ("b0 + 3*(b1 - b0)",)),
    "ltx-rescaled": Case(
        "LTX",
        {"guidance_scale": 3.0, "guidance_rescale": 0.7},
        ("0.7*(b0 + 3*(b1 - b0))*std(b1)/std(b0 + 3*(b1 - b0)) + 0.3*(b0 + 3*(b1 - b0))",),
    ),
    "sana": Case("Sana", OFF, ("b0",)),
    "sana-guided": Case("Sana", {"guidance_scale": 4.5}, ("b0 + 4.5*(b1 - b0)",)),
    "sana-variance": Case("Sana learned variance", OFF, ("b0",)),
    "sana-variance-guided": Case("Sana learned variance", {"guidance_scale": 4.5}, ("b0 + 4.5*(b1 - b0)",)),
    "lumina2": Case("Lumina2", OFF, ("-b0",)),
    "lumina2-guided": Case(
        "Lumina2", {"guidance_scale": 4.0}, ("-((b1 + 4*(b0 - b1))*norm(b0)/norm(b1 + 4*(b0 - b1)))",)
    ),
    "lumina2-truncated": Case(
        "Lumina2",
        {"guidance_scale": 4.0, "cfg_normalization": False, "cfg_trunc_ratio": 0.5},
        ("-(b1 + 4*(b0 - b1))", "-(b1 + 4*(b0 - b1))", "-b0"),
        HALF,
    ),
    "z-image": Case("ZImage", {"guidance_scale": 0.0}, ("-b0",), steps=(0, 1, 3)),
    # not 5: b1 + 6*(b0 - b1) then differs in one number of 256 or, on some processors, in none; with 4.3 in about ten
    "z-image-guided": Case("ZImage", {"guidance_scale": 4.3}, ("-(b0 + 4.3*(b0 - b1))",)),
    "z-image-capped": Case(
        "ZImage",
        {"guidance_scale": 4.3, "cfg_normalization": 0.9},
        ("-((b0 + 4.3*(b0 - b1))*0.9*norm(b0)/norm(b0 + 4.3*(b0 - b1)))",),
    ),
    "z-image-truncated": Case(
        "ZImage",
        {"guidance_scale": 4.3, "cfg_truncation": 0.2},
        ("-(b0 + 4.3*(b0 - b1))", "-(b0 + 4.3*(b0 - b1))", "-b0"),
        HALF,
    ),
    "cogview4": Case("CogView4", OFF, ("b0",)),
    "cogview4-guided": Case("CogView4", {"guidance_scale": 5.0}, ("b1 + 5*(b0 - b1)",)),
    "chroma": Case("Chroma", OFF, ("b0",)),
    "chroma-guided": Case("Chroma", {"guidance_scale": 5.0}, ("b1 + 5*(b0 - b1)",)),
    "flux-kontext": Case("FluxKontext", {"guidance_scale": 2.5}, ("b0",)),
    "flux-kontext-guided": Case("FluxKontext", {"true_cfg_scale": 2.0}, ("b1 + 2*(b0 - b1)",)),
    "flux-img2img": Case("FluxImg2Img", {}, ("b0",)),
    "flux2-image-guided": Case("Flux2 with image", {"guidance_scale": 4.0}, ("b1 + 4*(b0 - b1)",)),
    "wan-i2v": Case("WanImageToVideo", OFF, ("b0",), BOUNDARY),
    "wan-i2v-guided": Case(
        "WanImageToVideo",
        {"guidance_scale": 4.0, "guidance_scale_2": 3.0},
        ("b1 + 4*(b0 - b1)", "b1 + 3*(b0 - b1)", "b1 + 3*(b0 - b1)"),
        BOUNDARY,
    ),
    "wan-i2v-clip-guided": Case("WanImageToVideo with image encoder", {"guidance_scale": 5.0}, ("b1 + 5*(b0 - b1)",)),
    "wan-i2v-per-token": Case("WanImageToVideo timestep per token", {"guidance_scale": 4.0}, ("b1 + 4*(b0 - b1)",)),
    "ltx-i2v": Case("LTXImageToVideo", OFF, ("b0",)),
    "ltx-i2v-guided": Case("LTXImageToVideo", {"guidance_scale": 3.0}, ("b0 + 3*(b1 - b0)",)),
    "ltx-i2v-rescaled": Case(
        "LTXImageToVideo",
        {"guidance_scale": 3.0, "guidance_rescale": 0.7},
        ("0.7*(b0 + 3*(b1 - b0))*std(b1)/std(b0 + 3*(b1 - b0)) + 0.3*(b0 + 3*(b1 - b0))",),
    ),
    # its first levels are so near to 1 that Flow-SDE would overshoot
    "ltx-condition": Case("LTXCondition", OFF, ("b0",), sampler="cps"),
    "ltx-condition-image": Case(
        "LTXCondition with image", {"guidance_scale": 3.0}, ("b0 + 3*(b1 - b0)",), sampler="cps"
    ),
}


def recorder_of_sana_sprint() -> None:
    base = FAMILIES["Sana"].pipeline()
    pipeline = diffusers.SanaSprintPipeline(
        transformer=base.transformer, scheduler=diffusers.SCMScheduler(), vae=None, text_encoder=None, tokenizer=None
    )
    TrajectoryRecorder(pipeline)


def recorder_with(scheduler: type) -> Callable[[], None]:
    def make() -> None:
        pipeline = FAMILIES["StableDiffusion3"].pipeline()
        pipeline.scheduler = scheduler()
        TrajectoryRecorder(pipeline)

    return make


# what cannot be served: each raises a ValueError that says why
REFUSED: dict[str, Callable[[], Any]] = {
    "Flux2KleinKVPipeline with a reference image": lambda: record(Case("Flux2KleinKV", {}, ())),
    "SanaSprintPipeline": recorder_of_sana_sprint,
    "FlowMatchHeunDiscreteScheduler in any pipeline": recorder_with(diffusers.FlowMatchHeunDiscreteScheduler),
    "FlowMatchLCMScheduler in any pipeline": recorder_with(diffusers.FlowMatchLCMScheduler),
    "DDIMScheduler in any pipeline": recorder_with(diffusers.DDIMScheduler),
}


def generators(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(row) for row in range(count)]


def record(
    case: Case, sizes: Sizes | None = None, prompts: int = PROMPTS, images: int = IMAGES, pipeline: Any = None,
    checks: bool = True,
) -> Recording:  # fmt: skip
    """Records one call of the case's pipeline on ``images`` images of each of ``prompts`` prompts."""
    family = FAMILIES[case.family]
    sizes = sizes or family.tiny
    pipeline = pipeline or family.pipeline(sizes)
    recorder = TrajectoryRecorder(pipeline, sampler=case.sampler, checks=checks)
    arguments = family.arguments(prompts, images, sizes)
    known = inspect.signature(pipeline.__call__).parameters
    arguments |= sizes.video if "num_frames" in known else sizes.image
    states: list[Tensor] = []

    def on_step_end(_pipeline: Any, _index: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        states.append(tensors["latents"].clone())
        return {}

    @torch.no_grad()
    def call(**further: Any) -> Any:
        return pipeline(
            **arguments, **case.options, num_inference_steps=case.num_steps, generator=generators(prompts * images),
            output_type="latent", **further,
        )  # fmt: skip

    with recorder.recording(case.steps, seed=11) as trajectory:
        call(callback_on_step_end=on_step_end)
    return Recording(pipeline, recorder, trajectory, states, call)


def hollow(case: Case) -> Recording:
    """The case at the published sizes, with transformers without blocks whose outputs are replaced by random numbers:
    one image on two steps."""
    family = FAMILIES[case.family]
    pipeline = family.pipeline(family.published)

    def scatter(_module: Any, _inputs: Any, output: Any) -> Any:
        return tree_map_only(Tensor, torch.randn_like, output)

    for name, component in pipeline.components.items():
        if name.startswith("transformer") and component is not None:
            component.register_forward_hook(scatter)
    return record(replace(case, steps=(1, 2), num_steps=4), family.published, 1, 1, pipeline, checks=False)
