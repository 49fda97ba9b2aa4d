"""The processes of a run: which rows each of them samples and trains on, and the sums they exchange.

Rows, seeds and updates are numbered for the whole run, so that a run does the same on one process as on many. The
transformer is not wrapped: gradients of one update are summed once, after its last micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed
from accelerate import Accelerator
from accelerate.utils import (
    DistributedType,
    FullyShardedDataParallelPlugin,
    broadcast_object_list,
    gather_object,
    parse_flag_from_env,
)
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

# gradients travel in pieces of this many numbers
_BUCKET = 1 << 25


class Workers:
    """All processes of ``accelerator``, of which this is number ``rank``.

    Attributes:
        sharded: weights, gradients and optimizer state are split over the processes (FSDP2); then all processes have to
            make the same calls of a transformer and the same backwards, in the same order.

    Raises:
        ValueError: a launcher's setting that this trainer cannot follow.
    """

    def __init__(self, accelerator: Accelerator):
        self.count, self.rank = accelerator.num_processes, accelerator.process_index
        self.is_main = accelerator.is_main_process
        self._accelerator = accelerator
        self._plugin = _sharding_plugin(accelerator)
        self.sharded = self._plugin is not None
        self._error: Exception | None = None
        # an error that all processes were told of: they may still do things together
        self.agreed = False

    def rows_of(self, rank: int, updates: Sequence[range]) -> list[range]:
        """Rows of process ``rank``: an equal, contiguous share of each update's."""
        return [rows[rank * len(rows) // self.count : (rank + 1) * len(rows) // self.count] for rows in updates]

    def collect(self, values: Tensor, updates: Sequence[range]) -> Tensor:
        """``[..., R]`` values of all rows from each process's ``[..., own rows]``, in order of the rows."""
        if self.count == 1:
            return values
        parts = self.gather(values.movedim(-1, 0).contiguous())
        order = [row for rank in range(self.count) for rows in self.rows_of(rank, updates) for row in rows]
        collected = torch.empty_like(parts)
        collected[torch.tensor(order, device=parts.device)] = parts
        return collected.movedim(0, -1)

    def gather(self, tensor: Tensor) -> Tensor:
        """``[W * n, ...]`` from ``[n, ...]`` of each process, in order of rank."""
        return self._accelerator.gather(tensor) if self.count > 1 else tensor  # type: ignore[return-value]

    def gather_objects(self, objects: list[Any]) -> list[Any]:
        """The lists of all processes, joined in order of rank."""
        return gather_object(objects) if self.count > 1 else objects

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over processes, in place."""
        if self.count > 1:
            torch.distributed.all_reduce(tensor)
        return tensor

    def sum_gradients(self, gradients: Sequence[Tensor]) -> None:
        """Replaces the gradients by their sum over processes."""
        if self.count == 1:
            return
        for bucket in _buckets(gradients):
            flat = self.sum(torch.cat([grad.flatten() for grad in bucket]))
            parts = flat.split([grad.numel() for grad in bucket])
            torch._foreach_copy_(bucket, [part.view_as(grad) for part, grad in zip(parts, bucket)])

    def from_main(self, value: Any) -> Any:
        """The main process's ``value``."""
        return broadcast_object_list([value])[0] if self.count > 1 else value

    def attempt(self, function: Callable[..., Any], *args: Any) -> Any:
        """``function(*args)``, which may fail on one process alone.

        On one process the error is raised at once. On several it is kept until all of them come to :meth:`agree`, so
        that none waits for numbers that will not come; until then this returns None.
        """
        if self.count == 1:
            return function(*args)
        if self._error is None:
            try:
                return function(*args)
            except Exception as error:
                self._error = error
        return None

    def agree(self) -> None:
        """Returns when all processes have come here without a failed attempt.

        Raises:
            RuntimeError: an attempt failed on another process; on that one its own error.
        """
        if self.count == 1:
            return
        error, self._error = self._error, None
        if not self.sum(torch.tensor(float(error is not None), device=self._accelerator.device)).item():
            return
        self.agreed = True
        told = self.gather_objects([None if error is None else f"{type(error).__name__}: {error}"])
        if error is not None:
            raise error
        rank = next(rank for rank, message in enumerate(told) if message is not None)
        raise RuntimeError(f"process {rank} of {self.count} failed: {told[rank]}")

    def check_same(self, value: Any, name: str) -> None:
        """Raises ``ValueError`` where ``value``, which goes by ``name``, is not the same on all processes."""
        values = self.gather_objects([value])
        odd = next((rank for rank, other in enumerate(values) if other != values[0]), None)
        if odd is not None:
            raise ValueError(
                f"{name}: process {odd} has others than process 0, expected the same on all {self.count} processes"
            )

    def shard(self, module: nn.Module) -> None:
        """Splits the weights of ``module`` over all processes, block by block, and moves them to the device.

        Gradients come out of a backward as sums over processes, as in :meth:`sum_gradients`. Blocks are what the
        launcher's settings name, or else what diffusers does not split.
        """
        assert self._plugin is not None
        mesh = init_device_mesh(self._accelerator.device.type, (self.count,))
        kinds = set(self._plugin.transformer_cls_names_to_wrap or getattr(module, "_no_split_modules", None) or ())
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


def _sharding_plugin(accelerator: Accelerator) -> FullyShardedDataParallelPlugin | None:
    kind = accelerator.distributed_type
    if kind in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise ValueError(
            f"accelerate: got distributed_type {kind.value}, expected processes with whole weights (DDP), or FSDP with "
            "fsdp_version: 2, which splits weights, gradients and optimizer state as ZeRO-3 does"
        )
    # on CPUs accelerate's state does not know the plugin
    if accelerator.num_processes == 1 or not parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return None
    plugin = FullyShardedDataParallelPlugin()
    for name, got, expected in (
        ("fsdp_version", plugin.fsdp_version, 2),
        ("fsdp_reshard_after_forward", plugin.reshard_after_forward, True),
        ("fsdp_offload_params", isinstance(plugin.cpu_offload, CPUOffloadPolicy), False),
        ("fsdp_activation_checkpointing", plugin.activation_checkpointing, False),
    ):
        if got != expected:
            hint = "; set model.gradient_checkpointing instead" if "checkpointing" in name else ""
            raise ValueError(f"accelerate: got {name}: {got}, expected {expected}{hint}")
    return plugin


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if bucket and size + tensor.numel() > _BUCKET:
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.numel()
    if bucket:
        yield bucket
