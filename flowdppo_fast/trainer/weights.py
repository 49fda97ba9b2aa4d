"""The weights that are trained: adapters or everything, their average, and what they were at the start."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from .adapters import add_lora, save_lora, without_adapters
from .config import ModelConfig
from .ema import MovingAverage
from .rollout import derive_seed


class PolicyWeights:
    """Prepares transformers for training; everything else of the pipeline is frozen by the caller.

    Args:
        modules: transformers by name.
        model: what is trained of them.
        seed: of the adapters.
        device: where the weights live.
        keep_start: keep what :meth:`reference` needs. Adapters need nothing, full weights a copy.

    Attributes:
        names, parameters: of the trained weights, in one order; float32, with gradients that are never None.
        ema: their moving average, or None.
    """

    def __init__(
        self, modules: Mapping[str, nn.Module], model: ModelConfig, seed: int, device: torch.device, keep_start: bool
    ):
        self.modules, self.model = dict(modules), model
        named = []
        for name, module in self.modules.items():
            # no dropout of activations or labels: the replay must be the function that the rollout was
            module.eval()
            if model.train == "lora":
                rank = model.lora_rank or 32
                alpha = 2.0 * rank if model.lora_alpha is None else model.lora_alpha
                add_lora(module, rank, alpha, model.lora_targets, derive_seed(seed, "adapters", name))
            else:
                module.requires_grad_(True)
            if model.gradient_checkpointing:
                module.enable_gradient_checkpointing()  # type: ignore[operator]
            named += [(f"{name}.{key}", p) for key, p in module.named_parameters() if p.requires_grad]
        for _, parameter in named:
            parameter.data = parameter.data.to(device=device, dtype=torch.float32)
            # always there, so that an update whose backwards were all skipped is one with zeros
            parameter.grad = torch.zeros_like(parameter)
        if model.compile:
            for module in self.modules.values():
                _compile(module)
        self.names, self.parameters = [name for name, _ in named], [parameter for _, parameter in named]
        self.ema = None if model.ema_decay is None else MovingAverage(self.parameters, model.ema_decay)
        self._start = [p.detach().clone() for p in self.parameters] if keep_start and model.train == "full" else None

    @contextlib.contextmanager
    def reference(self) -> Iterator[None]:
        """Within this context the transformers are what they were before training.

        Raises:
            RuntimeError: full weights whose start was not kept.
        """
        if self.model.train == "lora":
            with without_adapters(list(self.modules.values())):
                yield
            return
        if self._start is None:
            raise RuntimeError("reference: the weights at the start were not kept, expected keep_start=True")
        own = [p.data for p in self.parameters]
        try:
            for parameter, start in zip(self.parameters, self._start):
                parameter.data = start
            yield
        finally:
            for parameter, data in zip(self.parameters, own):
                parameter.data = data

    def averaged(self) -> contextlib.AbstractContextManager[None]:
        """Within this context the weights are their moving average, if there is one."""
        return self.ema.applied() if self.ema is not None else contextlib.nullcontext()

    def state(self) -> dict[str, dict[str, Tensor]]:
        """What a checkpoint keeps, by file."""
        kept: dict[str, Sequence[Tensor] | None] = {
            "weights": self.parameters,
            "ema": None if self.ema is None else self.ema.averages,
            "start": self._start,
        }
        return {file: dict(zip(self.names, values)) for file, values in kept.items() if values is not None}

    @torch.no_grad()
    def load_state(self, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Restores :meth:`state`."""
        own = self.state()
        for file, values in own.items():
            for name, value in values.items():
                value.copy_(tensors[file][name])

    def save_pretrained(self, folder: Path) -> None:
        """Writes the (averaged) weights as diffusers loads them, one folder per transformer."""
        with self.averaged():
            for name, module in self.modules.items():
                if self.model.train == "lora":
                    save_lora(module, folder / name)
                else:
                    module.save_pretrained(folder / name)  # type: ignore[operator]


def _compile(module: nn.Module) -> None:
    # block by block where the model knows its blocks: minutes less, and the hooks on the whole stay outside
    if getattr(module, "_repeated_blocks", None):
        module.compile_repeated_blocks()  # type: ignore[operator]
    else:
        module.forward = torch.compile(module.forward)  # type: ignore[method-assign]
