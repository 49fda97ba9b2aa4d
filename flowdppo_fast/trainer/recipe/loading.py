"""From a recipe to a pipeline with weights: number formats, quantised bases, VAE tiling, attention backends."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import torch

from .preflight import PipelinePlan
from .recipe import QuantizationConfig, Recipe


def load_pipeline(recipe: Recipe, plan: PipelinePlan) -> Any:
    """The pipeline on the CPU (quantised components where their backend puts them); only safetensors are read.

    Args:
        recipe: what to load.
        plan: of the same recipe, from :func:`~flowdppo_fast.trainer.recipe.preflight.inspect_pipeline`.

    Raises:
        ValueError: unknown quantisation options, or a component that lacks what the recipe switches on.
    """
    settings = recipe.pipeline
    dtype: Any = getattr(torch, settings.dtype)
    if settings.vae_dtype is not None:
        dtype = {"default": dtype, "vae": getattr(torch, settings.vae_dtype)}
    options = dict(settings.source_options, use_safetensors=True, torch_dtype=dtype, variant=settings.variant)
    options |= dict.fromkeys((*plan.absent, *settings.without))
    if settings.quantization is not None:
        from diffusers import PipelineQuantizationConfig

        mapping = quantization_mapping(settings.quantization, plan)
        options["quantization_config"] = PipelineQuantizationConfig(quant_mapping=mapping)
    with warnings.catch_warnings():
        # the oldest diffusers that is supported knows only this name
        warnings.filterwarnings("ignore", message=".*torch_dtype.*")
        pipeline = plan.kind.from_pretrained(settings.location, **options)  # type: ignore[attr-defined]
    for wanted, method in ((settings.vae_tiling, "enable_tiling"), (settings.vae_slicing, "enable_slicing")):
        if wanted:
            if not hasattr(pipeline.vae, method):
                raise ValueError(f"pipeline.vae: {type(pipeline.vae).__name__} has no {method}, expected it off")
            getattr(pipeline.vae, method)()
    if settings.attention_backend is not None:
        for name, module in pipeline.components.items():
            if name.startswith("transformer") and module is not None:
                module.set_attention_backend(settings.attention_backend)
    return pipeline


def quantization_mapping(quantization: QuantizationConfig, plan: PipelinePlan) -> dict[str, Any]:
    """A quantisation config by component, of diffusers or of transformers, whichever the component is from.

    Raises:
        ValueError: an option that the backend does not know, or no such torchao class.
    """
    import diffusers
    import transformers

    mapping = {}
    for name in quantization.components:
        library: Any = diffusers if plan.components[name].library == "diffusers" else transformers
        if quantization.backend == "torchao":
            mapping[name] = library.TorchAoConfig(torchao_type(quantization.options))
            continue
        kind = library.BitsAndBytesConfig
        known = inspect.signature(kind.__init__).parameters
        unknown = [key for key in quantization.options if key not in known]
        if unknown:
            expected = ", ".join(key for key in known if key.startswith(("bnb_", "llm_")))
            raise ValueError(f"pipeline.quantization.options: got unknown {unknown}, expected some of {expected}")
        bits = "load_in_4bit" if quantization.backend.endswith("4bit") else "load_in_8bit"
        mapping[name] = kind(**{bits: True}, **quantization.options)
    return mapping


def torchao_type(options: dict[str, Any]) -> Any:
    """The torchao config that ``options`` describes, see :class:`QuantizationConfig`.

    Raises:
        ValueError: no such class, or an option that it does not have.
    """
    import torchao.quantization
    from torchao.core.config import AOBaseConfig

    kind = getattr(torchao.quantization, options["type"], None)
    if not (inspect.isclass(kind) and issubclass(kind, AOBaseConfig)):
        raise ValueError(
            f"pipeline.quantization.options.type: got {options['type']!r}, expected the name of a config class in "
            "torchao.quantization, such as Int8WeightOnlyConfig"
        )
    try:
        return kind(**{key: value for key, value in options.items() if key != "type"})
    except TypeError as error:
        raise ValueError(f"pipeline.quantization.options: {error}") from None
