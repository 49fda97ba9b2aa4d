"""The weights that are trained: adapters or everything, their average, and what they were at the start."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .adapters import add_lora, save_lora, without_adapters
from .config import ModelConfig
from .distributed import Workers
from .ema import MovingAverage, holding
from .rollout import derive_seed


class PolicyWeights:
    """Prepares transformers for training; everything else of the pipeline is frozen by the caller.

    Args:
        modules: transformers by name.
        model: what is trained of them.
        seed: of the adapters.
        device: where the weights live.
        keep_start: keep what :meth:`reference` needs. Adapters need nothing, full weights a copy.
        workers: processes that train the same weights, or shards of them.

    Attributes:
        names, parameters: of the trained weights, in one order; float32, with gradients that are never None. In a
            sharded run plain tensors that share memory with this process's shards.
        ema: their moving average, or None.

    Raises:
        ValueError: processes that start from different weights.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        model: ModelConfig,
        seed: int,
        device: torch.device,
        keep_start: bool,
        workers: Workers,
    ):
        self.modules, self.model, self.workers = dict(modules), model, workers
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
            for parameter in module.parameters():
                if parameter.requires_grad:
                    # sharding moves what it has split
                    where = None if workers.sharded else device
                    parameter.data = parameter.data.to(device=where, dtype=torch.float32)
            if workers.count > 1:
                workers.check_same(_fingerprint(module), f"weights of {name}")
            if workers.sharded:
                workers.shard(module)
            if model.compile:
                _compile(module)
        named = {
            f"{name}.{key}": p
            for name, module in self.modules.items()
            for key, p in module.named_parameters()
            if p.requires_grad
        }
        for parameter in named.values():
            # always there, so that an update whose backwards were all skipped is one with zeros
            parameter.grad = torch.zeros_like(parameter)
        self._split = {name: p for name, p in named.items() if isinstance(p, DTensor)}
        self.names, self.parameters = list(named), [_own(parameter) for parameter in named.values()]
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
        if self.workers.sharded:
            # what is gathered is read from the memory that the shards had at first
            with holding(self.parameters, self._start):
                yield
            return
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
        """What a checkpoint keeps, by file: whole tensors; all processes have to come here."""
        return {
            file: {name: self.whole(name, value) for name, value in zip(self.names, values)}
            for file, values in self._kept().items()
        }

    def whole(self, name: str, value: Tensor) -> Tensor:
        """The whole of which ``value`` is this process's shard, of the weight ``name`` or of what belongs to it.

        In a sharded run it is on the host of the main process, and empty elsewhere; all processes have to come here.
        """
        like = self._split.get(name)
        if like is None or value.ndim == 0:
            return value
        split = DTensor.from_local(
            value, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
        )
        gathered = split.full_tensor()
        return gathered.cpu() if self.workers.is_main else gathered.new_empty(0, device="cpu")

    def shard(self, name: str, value: Tensor) -> Tensor:
        """This process's shard of a whole ``value``: the inverse of :meth:`whole`."""
        if name not in self._split or value.ndim == 0:
            return value
        parts = value.chunk(self.workers.count)
        return parts[self.workers.rank] if self.workers.rank < len(parts) else value[:0]

    @torch.no_grad()
    def load_state(self, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Restores :meth:`state`.

        Raises:
            ValueError: other weights than those of the pipeline.
        """
        for file, values in self._kept().items():
            saved = tensors.get(file, {})
            odd = sorted(set(saved) ^ set(self.names))
            if odd:
                raise ValueError(f"checkpoint: {file} has other weights than the pipeline, {odd[0]!r} among them")
            for name, value in zip(self.names, values):
                shard = self.shard(name, saved[name])
                if shard.shape != value.shape:
                    raise ValueError(
                        f"checkpoint: {file} has shape {list(saved[name].shape)} for {name!r}, expected that of the "
                        "pipeline's weight"
                    )
                value.copy_(shard)

    def save_pretrained(self, folder: Path) -> None:
        """Writes the (averaged) weights as diffusers loads them, one folder per transformer, from the main process; all
        processes have to come here."""
        with self.averaged():
            for name, module in self.modules.items():
                own = [(key, p) for key, p in zip(self.names, self.parameters) if key.startswith(f"{name}.")]
                whole = {key.removeprefix(f"{name}."): self.whole(key, p) for key, p in own if key in self._split}
                # its own state has shards
                hook = module.register_state_dict_post_hook(lambda _, state, *__, whole=whole: state.update(whole))
                try:
                    if self.workers.is_main:
                        if self.model.train == "lora":
                            save_lora(module, folder / name)
                        else:
                            module.save_pretrained(folder / name)  # type: ignore[operator]
                finally:
                    hook.remove()

    def _kept(self) -> dict[str, Sequence[Tensor]]:
        kept = {
            "weights": self.parameters,
            "ema": None if self.ema is None else self.ema.averages,
            "start": self._start,
        }
        return {file: values for file, values in kept.items() if values is not None}


def _own(parameter: nn.Parameter) -> nn.Parameter:
    """``parameter``, or a plain one in the memory of this process's shard and of its gradient."""
    if not isinstance(parameter, DTensor):
        return parameter
    assert isinstance(parameter.grad, DTensor)
    with torch.no_grad():
        own = nn.Parameter(parameter.to_local())
        own.grad = parameter.grad.to_local()
    return own


def _fingerprint(module: nn.Module) -> list[int]:
    """Sums of the bits of all plain tensors: the same on any device, and in any order of summation."""
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    tensors = [t.detach() for t in (*module.parameters(), *module.buffers()) if type(t) in (Tensor, nn.Parameter)]
    bits = [t.flatten().view(whole[t.element_size()]) for t in tensors if t.element_size() in whole]
    return torch.stack([b.sum(dtype=torch.int64).cpu() for b in bits]).tolist()


def _compile(module: nn.Module) -> None:
    # block by block where the model knows its blocks: minutes less, and the hooks on the whole stay outside
    if getattr(module, "_repeated_blocks", None):
        module.compile_repeated_blocks()  # type: ignore[operator]
    else:
        module.forward = torch.compile(module.forward)  # type: ignore[method-assign]
