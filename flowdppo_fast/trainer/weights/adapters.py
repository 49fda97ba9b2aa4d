"""LoRA adapters on any transformer, with or without diffusers' own adapter methods."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn

# what diffusers calls the attention projections
ATTENTION_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


def add_lora(module: nn.Module, rank: int, alpha: float, targets: Sequence[str] | None, seed: int) -> None:
    """Adds an adapter named ``default`` that changes nothing yet.

    Args:
        targets: names of layers; None means :data:`ATTENTION_TARGETS`.
        seed: of the adapter's first matrices; the global generator is left as it was.

    Raises:
        ValueError: no layer has such a name.
    """
    settings = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]
        target_modules=list(targets or ATTENTION_TARGETS),
        init_lora_weights="gaussian",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # diffusers' method does the same and lets the model save and load the adapter
        if hasattr(module, "add_adapter"):
            module.add_adapter(settings)  # type: ignore[operator]
        else:
            inject_adapter_in_model(settings, module)


@contextlib.contextmanager
def without_adapters(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Within this context ``modules`` are what they were before their adapters were added."""
    layers = [layer for module in modules for layer in module.modules() if isinstance(layer, BaseTunerLayer)]
    trainable = [p for module in modules for p in module.parameters() if p.requires_grad]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        # switching adapters off also freezes them
        for parameter in trainable:
            parameter.requires_grad_(True)


def save_lora(module: nn.Module, folder: Path) -> None:
    """Writes ``pytorch_lora_weights.safetensors`` into ``folder``, as ``load_lora_adapter`` reads it."""
    folder.mkdir(parents=True, exist_ok=True)
    if hasattr(module, "save_lora_adapter"):
        module.save_lora_adapter(folder)  # type: ignore[operator]
    else:
        save_file(get_peft_model_state_dict(module), folder / "pytorch_lora_weights.safetensors")
        module.peft_config["default"].save_pretrained(folder)  # type: ignore[index,union-attr]
