"""What a pipeline brings along: seen once, when it is given to a trainer.

Training starts where the given pipeline stands, and the reference policy is that pipeline: adapters that are on stay
on. What would change between the rollout and its replay, or could not be trained or saved, is refused by name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.distributed.tensor import DTensor

from .adapters import active_adapters, adapter_layers, trained_adapter
from .names import bare

# of diffusers' hooks, by the name they are registered under; a hook that is not here runs in rollout and replay alike
_HOOKS = {
    "layerwise_casting": "enable_layerwise_casting() keeps weights in another dtype than they are trained in; load the "
    "pipeline again without it (model.mixed_precision chooses what is computed in)",
    "group_offloading": "group offloading moves weights while they are trained; load the pipeline again without it "
    "(model.offload_idle moves what is not trained)",
}
# weights that do not go with autocast to the other half-precision format
_CLASHES = {"bf16": torch.float16, "fp16": torch.bfloat16}
_CACHES = ("cache", "fbc_", "pyramid_attention_broadcast")


def check_arrival(pipeline: Any, modules: Mapping[str, nn.Module], *, train: str, precision: str = "no") -> None:
    """Looks at everything that a pipeline may bring along.

    Args:
        modules: the transformers that will be trained, by name.
        train: ``"lora"`` or ``"full"``.
        precision: ``model.mixed_precision``.

    Raises:
        ValueError: what cannot be kept, every one on a line.
    """
    problems = [
        f"pipeline: {name} {problem}"
        for name, module in modules.items()
        for problem in _problems(bare(module), train=train)
    ]
    for name, component in pipeline.components.items():
        if name not in modules and isinstance(component, nn.Module) and hasattr(component, "_hf_hook"):
            problems.append(f"pipeline: {name} {_OFFLOADED}")
    for name, module in modules.items():
        dtypes = {parameter.dtype for parameter in module.parameters() if parameter.is_floating_point()}
        clash = dtypes & {_CLASHES.get(precision)}
        if clash:
            problems.append(
                f"pipeline: {name} has weights in {clash.pop()}, expected others with "
                f"model.mixed_precision={precision!r}"
            )
        elif train == "full" and precision == "no" and dtypes - {torch.float32, torch.float64}:
            problems.append(
                f"pipeline: {name} has weights in {', '.join(sorted(map(str, dtypes)))}, expected torch.float32 with "
                "model.train='full' and model.mixed_precision='no', since the rest of the pipeline hands it its own "
                "dtype; load it in float32, or choose mixed precision"
            )
    if problems:
        raise ValueError("\n".join(problems))


def check_unchanged(modules: Mapping[str, nn.Module]) -> None:
    """Looks again when a run begins: what was done to the pipeline since it was given to the trainer.

    Raises:
        ValueError: the trained adapter is off or gone, or hooks move the weights.
    """
    problems = []
    for name, module in modules.items():
        adapter = trained_adapter(module)
        layers = adapter_layers(module)
        carrying = [layer for layer in layers if adapter in layer.lora_A] if adapter is not None else []
        if adapter is not None and not (carrying and all(adapter in active_adapters(layer) for layer in carrying)):
            problems.append(
                f"pipeline: the trained adapter {adapter!r} of {name} was switched off or removed since the trainer "
                "was made, expected it on; call pipeline.set_adapters() with it, or load other adapters before the "
                "trainer is made"
            )
        if adapter is not None and any(layer.merged for layer in carrying):
            problems.append(f"pipeline: the trained adapter {adapter!r} of {name} is fused; call unfuse_lora() first")
        if hasattr(module, "_hf_hook"):
            problems.append(f"pipeline: {name} {_OFFLOADED}")
        problems += [f"pipeline: {name} {problem}" for problem in _hooked(module)]
    if problems:
        raise ValueError("\n".join(problems))


_OFFLOADED = (
    "is moved by hooks (enable_model_cpu_offload, enable_sequential_cpu_offload or a device_map), expected a pipeline "
    "that stays where it is put; call pipeline.remove_all_hooks() first (model.offload_idle moves what is not trained)"
)


def _problems(module: nn.Module, *, train: str) -> Iterator[str]:
    if not hasattr(module, "config") and hasattr(module, "module"):
        yield f"is wrapped in {type(module).__name__}, expected the model itself; the trainer splits work by processes"
        return
    if hasattr(module, "get_base_model"):
        yield (
            f"is wrapped in {type(module).__name__}, expected the model itself; take get_base_model(), or add the "
            "adapter by pipeline.load_lora_weights() or transformer.add_adapter()"
        )
        return
    if trained_adapter(module) is not None:
        yield (
            f"has the adapter {trained_adapter(module)!r} of another trainer, which this pipeline was given to before; "
            "load the pipeline again to start afresh, or go on with that trainer (train(resume=True))"
        )
        return
    tensors = [*module.parameters(), *module.buffers()]
    if any(tensor.is_inference() for tensor in tensors):
        yield "was loaded under torch.inference_mode(), whose tensors cannot be trained; load it under torch.no_grad()"
    if any(tensor.is_meta for tensor in tensors):
        yield "has weights on the meta device, expected weights that are loaded"
    elif any(isinstance(tensor, DTensor) for tensor in tensors):
        yield "is sharded already, expected whole weights; the trainer shards them (docs/distributed.md)"
    if hasattr(module, "_hf_hook"):
        yield _OFFLOADED
    yield from _hooked(module)
    layers = adapter_layers(module)
    on = sorted({name for layer in layers for name in active_adapters(layer)})
    if train == "full" and layers:
        yield (
            f"carries the adapter {', '.join(map(repr, _names(layers)))} and model.train is 'full', expected a model "
            "without adapters; call pipeline.fuse_lora() and pipeline.unload_lora_weights() first, or train a LoRA"
        )
        return
    fused = sorted({name for layer in layers for name in layer.merged_adapters})
    if fused:
        yield (
            f"has the adapter {', '.join(map(repr, fused))} fused and still loaded: adapters beside it would do "
            "nothing; call pipeline.unload_lora_weights() after fuse_lora(), or unfuse_lora()"
        )
    others = sorted({type(layer).__name__ for layer in layers if not isinstance(layer, LoraLayer)})
    if others:
        yield (
            f"carries adapters of another kind than LoRA ({', '.join(others)}; {', '.join(on) or 'off'}), beside which "
            "none can be trained; merge them into the weights first"
        )


def _hooked(module: nn.Module) -> Iterator[str]:
    hooks = {hook for part in module.modules() for hook in getattr(getattr(part, "_diffusers_hook", None), "hooks", ())}
    for hook in sorted(hooks):
        if hook in _HOOKS:
            yield f"cannot be trained as it is: {_HOOKS[hook]}"
        elif any(kind in hook.lower() for kind in _CACHES):
            yield (
                f"has the hook {hook!r}, which reuses what another denoising step computed: no step could be replayed "
                "alone; call transformer.disable_cache() first"
            )


def _names(layers: list[Any]) -> list[str]:
    return sorted({name for layer in layers for group in layer.adapter_layer_names for name in getattr(layer, group)})
