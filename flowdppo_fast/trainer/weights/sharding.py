"""How the trained weights are held by the processes of a run: whole on each, or a shard on each.

The optimizer, the moving average and the reference work on this process's own plain tensors, whatever they are shards
of, so they are the same code in every way of splitting. What differs is here and in :mod:`.zero`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from .names import plain_name

T = TypeVar("T")

# gradients travel in pieces of this many numbers
BUCKET = 1 << 25


class WholeWeights:
    """Every process holds all weights and sums gradients over processes once per update.

    Args:
        device: of the weights.
        count, rank: of the processes.

    Attributes:
        split: weights, gradients and optimizer state are split; then all processes have to make the same calls of a
            transformer and the same backwards, in the same order.
        kind: what users call this way of splitting.
        named, shapes: the trained weights of the transformers by name, in one order, and their whole shapes.
    """

    split = False
    kind = "whole weights"

    def __init__(self, device: torch.device, count: int, rank: int):
        self.device, self.count, self.rank = device, count, rank
        self.named: dict[str, nn.Parameter] = {}
        self.shapes: dict[str, torch.Size] = {}

    def prepare(self, modules: Mapping[str, nn.Module]) -> list[nn.Parameter]:
        """This process's own tensors of what is trained of ``modules`` (float32), in one order; called once."""
        self._collect(modules)
        for parameter in self.named.values():
            # always there, so that an update whose backwards were all skipped is one with zeros
            parameter.grad = torch.zeros_like(parameter)
        return list(self.named.values())

    def inside(self, function: Callable[[], T], *, update: bool = False) -> T:
        """``function()``, which calls transformers or, for an ``update``, steps the own tensors by their gradients.

        All of both go through here: it is the door to an engine that wants to be around them (:mod:`.zero`).
        """
        return function()

    def sum_gradients(self, gradients: Sequence[Tensor]) -> None:
        """Makes gradients of the own tensors, as backwards left them, sums over processes."""
        if self.count == 1:
            return
        for bucket in _buckets(gradients):
            flat = torch.cat([grad.flatten() for grad in bucket])
            torch.distributed.all_reduce(flat)
            parts = flat.split([grad.numel() for grad in bucket])
            torch._foreach_copy_(bucket, [part.view_as(grad) for part, grad in zip(parts, bucket)])

    def whole(self, values: Sequence[Tensor]) -> dict[str, Tensor]:
        """Whole tensors by the weight's name from one value for each own tensor, of its shape or a number.

        Where weights are split they are on the host of the main process, and empty elsewhere; all processes have to
        come here.
        """
        return dict(zip(self.named, values))

    def own(self, whole: Mapping[str, Tensor]) -> list[Tensor]:
        """The inverse of :meth:`whole`, from whole tensors on each process."""
        return [whole[name] for name in self.named]

    def _collect(self, modules: Mapping[str, nn.Module]) -> None:
        for name, module in modules.items():
            trained = ((plain_name(key), p) for key, p in module.named_parameters() if p.requires_grad)
            self.named |= {f"{name}.{key}": parameter for key, parameter in trained}
        self.shapes = {name: parameter.shape for name, parameter in self.named.items()}

    def _kept(self, whole: Tensor) -> Tensor:
        """What this process keeps of a gathered tensor."""
        return whole.cpu() if self.rank == 0 else whole.new_empty(0, device="cpu")


class FullyShardedWeights(WholeWeights):
    """FSDP2: torch's ``fully_shard``, block by block. Own tensors share memory with the shards.

    Args:
        kinds: names of the classes to gather as one block; None means what diffusers does not split.
    """

    split = True
    kind = "FSDP2"

    def __init__(self, device: torch.device, count: int, rank: int, kinds: Sequence[str] | None):
        super().__init__(device, count, rank)
        self._kinds = kinds

    def prepare(self, modules: Mapping[str, nn.Module]) -> list[nn.Parameter]:
        """Splits the weights and moves them to the device. Gradients come out of a backward as sums over processes."""
        for module in modules.values():
            self._shard(module)
        super().prepare(modules)
        return [self._plain(parameter) for parameter in self.named.values()]

    def sum_gradients(self, gradients: Sequence[Tensor]) -> None:
        """They are."""

    def whole(self, values: Sequence[Tensor]) -> dict[str, Tensor]:
        """Gathered one by one."""
        return {name: self._gather(like, value) for (name, like), value in zip(self.named.items(), values)}

    def own(self, whole: Mapping[str, Tensor]) -> list[Tensor]:
        """Shards of the first dimension."""
        return [self._part(whole[name]) if whole[name].ndim else whole[name] for name in self.named]

    def _shard(self, module: nn.Module) -> None:
        mesh = init_device_mesh(self.device.type, (self.count,))
        kinds = set(self._kinds or getattr(module, "_no_split_modules", None) or ())
        # inner ones first
        parts: Any = [part for part in reversed(list(module.modules())) if type(part).__name__ in kinds] + [module]
        for part in parts:
            name = type(part).__name__
            # always resharded: what is gathered must not outlive a change of the weights
            fully_shard(part, mesh=mesh, reshard_after_forward=True)
            # diffusers looks classes up by their name, and writes it into configs
            type(part).__name__ = name
            part.set_gradient_divide_factor(1.0)
            # gloo knows no scaled sums
            part.set_force_sum_reduction_for_comms(True)
        for part in parts:
            # the first gathering may move the shards; from now on they stay where they are
            part.unshard()
            part.reshard()

    def _gather(self, like: Any, value: Tensor) -> Tensor:
        if value.ndim == 0:
            return value
        split = DTensor.from_local(
            value, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
        )
        return self._kept(split.full_tensor())

    def _part(self, value: Tensor) -> Tensor:
        parts = value.chunk(self.count)
        return parts[self.rank] if self.rank < len(parts) else value[:0]

    @staticmethod
    def _plain(parameter: Any) -> nn.Parameter:
        """A parameter in the memory of this process's shard and of its gradient."""
        with torch.no_grad():
            own = nn.Parameter(parameter.to_local())
            own.grad = parameter.grad.to_local()
        return own


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if bucket and size + tensor.numel() > BUCKET:
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.numel()
    if bucket:
        yield bucket
