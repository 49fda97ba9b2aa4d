"""LoRA adapters on any transformer, with or without diffusers' own adapter methods."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from torch import Tensor, nn

from .names import bare

LORA_FILE = "pytorch_lora_weights.safetensors"

# what diffusers calls the attention projections
ATTENTION_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
ALL_LINEAR = "all-linear"
# what no name of a layer has
_PATTERN = re.compile(r"[*+?^$|()\[\]{}\\]")


# name of the trained adapter where the model has none of that name
_NAME = "default"
# on a transformer: what :func:`add_lora` added to it, and what each layer had on before
_MARK = "_flowdppo_adapter"
# what peft puts around an adapter's name in the names of its parameters
_ADAPTER_KEY = re.compile(r"\.(lora_[A-Z])\.[^.]+\.")


def adapter_layers(module: nn.Module) -> list[Any]:
    """Layers of ``module`` that carry adapters."""
    return [layer for layer in module.modules() if isinstance(layer, BaseTunerLayer)]


def active_adapters(layer: Any) -> list[str]:
    """Adapters that ``layer`` adds to what it computes."""
    own = {name for group in layer.adapter_layer_names for name in getattr(layer, group)}
    return [] if layer.disable_adapters else [name for name in layer.active_adapters if name in own]


def trained_adapter(module: nn.Module) -> str | None:
    """Name of the adapter that :func:`add_lora` added to ``module``, or None."""
    return getattr(bare(module), _MARK, None)


def as_targets(targets: Sequence[str] | str | None) -> list[str] | str:
    """``model.lora_targets`` as peft takes them: ends of layer names, a pattern of whole names, or ``"all-linear"``."""
    if isinstance(targets, str):
        return targets if targets == ALL_LINEAR or _PATTERN.search(targets) else [targets]
    return list(targets or ATTENTION_TARGETS)


def is_target(path: str, targets: Sequence[str] | str | None) -> bool:
    """Whether the linear layer at ``path`` gets an adapter."""
    wanted = as_targets(targets)
    if isinstance(wanted, str):
        return wanted == ALL_LINEAR or re.fullmatch(wanted, path) is not None
    return any(path == target or path.endswith(f".{target}") for target in wanted)


def blocks_of(module: nn.Module) -> dict[str, int]:
    """The model's lists of blocks: name and how many there are; lists inside of blocks do not count."""
    lists = [(name, child) for name, child in bare(module).named_children() if isinstance(child, nn.ModuleList)]
    return {name: len(child) for name, child in lists if len(child) > 1}


def add_lora(module: nn.Module, rank: int, alpha: float, targets: Sequence[str] | str | None, seed: int) -> str:
    """Adds an adapter that changes nothing yet and alone is trained; adapters that are on stay on, frozen.

    Args:
        targets: ends of layer names, a pattern of whole names or ``"all-linear"``; None means
            :data:`ATTENTION_TARGETS`.
        seed: of the adapter's first matrices; the global generator is left as it was.

    Returns:
        The adapter's name.

    Raises:
        ValueError: no layer has such a name.
    """
    module = bare(module)
    settings = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]
        target_modules=as_targets(targets),
        init_lora_weights="gaussian",
    )
    before = {id(layer): active_adapters(layer) for layer in adapter_layers(module)}
    taken = getattr(module, "peft_config", {})
    name = next(n for n in (_NAME, *(f"flowdppo{i}" for i in range(len(taken) + 1))) if n not in taken)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # diffusers' method does the same and lets the model save and load the adapter
        if hasattr(module, "add_adapter"):
            module.add_adapter(settings, name)  # type: ignore[operator]
        else:
            inject_adapter_in_model(settings, module, name)
    for layer in adapter_layers(module):
        if layer.disable_adapters:
            layer.enable_adapters(True)
        layer.set_adapter([*before.get(id(layer), []), name])
        for key, parameter in layer.named_parameters():
            # set_adapter makes all that is on trainable
            parameter.requires_grad_(f".{name}." in f".{key}.")
    setattr(module, _MARK, name)
    return name


def release(module: nn.Module) -> None:
    """The adapter of :func:`add_lora` is one of the model's own from now on."""
    if hasattr(bare(module), _MARK):
        delattr(bare(module), _MARK)


def with_name(key: str, adapter: str) -> str:
    """A parameter's name with another adapter's name in it; ``""`` takes it out, as in files."""
    return _ADAPTER_KEY.sub(rf".\1.{adapter}." if adapter else r".\1.", key)


@contextlib.contextmanager
def without_adapters(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Within this context ``modules`` are what they were before :func:`add_lora`."""
    layers = [(layer, trained_adapter(module)) for module in modules for layer in adapter_layers(bare(module))]
    trainable = [p for module in modules for p in module.parameters() if p.requires_grad]
    on = [active_adapters(layer) for layer, _ in layers]
    for (layer, name), names in zip(layers, on):
        others = [other for other in names if other != name]
        if others:
            layer.set_adapter(others)
        else:
            layer.enable_adapters(False)
    try:
        yield
    finally:
        for (layer, _), names in zip(layers, on):
            layer.set_adapter(names)
            layer.enable_adapters(bool(names))
        for module in modules:
            for layer in adapter_layers(bare(module)):
                for parameter in layer.parameters():
                    parameter.requires_grad_(False)
        # switching adapters off also freezes them
        for parameter in trainable:
            parameter.requires_grad_(True)


def write_lora(
    tensors: Mapping[str, Tensor],
    settings: LoraConfig,
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    fold_alpha: bool = False,
) -> Path:
    """Writes an adapter as ``pipeline.load_lora_weights(folder)`` and ``transformer.load_lora_adapter`` read it.

    Args:
        tensors: the adapter's weights by the name of their parameter in the transformer.
        settings: rank, alpha and targets, which loaders read from the file.
        dtype: of the written weights; None keeps theirs.
        fold_alpha: multiply the weights by ``alpha / rank`` and say alpha = rank, for programs that do not read the
            alpha that diffusers keeps in the file's metadata.

    Returns:
        The file.
    """
    from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY

    scale = 1.0
    if fold_alpha:
        scale, settings = settings.lora_alpha / settings.r, dataclasses.replace(settings, lora_alpha=settings.r)
    # loaders find the transformer's entries by this prefix, whichever transformer they are loaded into
    described = {f"transformer.{key}": sorted(v) if isinstance(v, set) else v for key, v in settings.to_dict().items()}
    packed = {}
    for key, value in tensors.items():
        value = value * scale if ".lora_B." in key else value
        packed[f"transformer.{with_name(key, '')}"] = value.detach().to(dtype or value.dtype).cpu().contiguous()
    return save_lora_file(packed, folder, {LORA_ADAPTER_METADATA_KEY: json.dumps(described, indent=2, sort_keys=True)})


def save_lora_file(tensors: Mapping[str, Tensor], folder: Path, metadata: Mapping[str, str] | None = None) -> Path:
    """Writes the file that ``load_lora_weights(folder)`` looks for."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LORA_FILE
    save_file({key: value.contiguous() for key, value in tensors.items()}, path, {"format": "pt", **(metadata or {})})
    return path


def save_lora(module: nn.Module, folder: Path) -> Path:
    """Writes the adapter that :func:`add_lora` added, as :func:`write_lora` does."""
    module, name = bare(module), trained_adapter(module)
    named = {key: value for key, value in module.state_dict().items() if re.search(rf"\.lora_[A-Z]\.{name}\.", key)}
    return write_lora(named, module.peft_config[name], folder)  # type: ignore[index,union-attr,arg-type]
