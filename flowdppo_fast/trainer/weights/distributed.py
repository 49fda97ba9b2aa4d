"""The processes of a run: which rows each of them samples and trains on, and what they exchange besides weights.

Rows, seeds and updates are numbered for the whole run, so that a run does the same on one process as on many.
"""

from __future__ import annotations

import atexit
from collections.abc import Callable, Sequence
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
from torch import Tensor
from torch.distributed.fsdp import CPUOffloadPolicy

from .sharding import FullyShardedWeights, WholeWeights


def _leave() -> None:
    """Ends the group before the interpreter ends, as torch asks for.

    A thread of the group that wants Python's lock while Python is taken down aborts the process. Under DDP the threads
    are gone after this; where FSDP2 or DeepSpeed holds the group they stay, with nothing left to do.
    """
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


class Workers:
    """All processes of ``accelerator``, of which this is number ``rank``.

    Attributes:
        device: of this process.
        sharding: how they hold the trained weights.

    Raises:
        ValueError: a launcher's setting that this trainer cannot follow.
    """

    def __init__(self, accelerator: Accelerator):
        self.count, self.rank = accelerator.num_processes, accelerator.process_index
        self.is_main, self.device = accelerator.is_main_process, accelerator.device
        self._accelerator = accelerator
        if self.count > 1 and torch.distributed.is_initialized():
            # one that ends early, by an error of its settings, takes the store away with which others still connect
            torch.distributed.barrier()
        self.sharding = sharding_of(accelerator)
        if self.count > 1:
            atexit.register(_leave)
        self._error: Exception | None = None
        # an error that all processes were told of: they may still do things together
        self.agreed = False

    @property
    def sharded(self) -> bool:
        """Whether weights are split: then all processes make the same calls and backwards, in the same order."""
        return self.sharding.split

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
        if not self.sum(torch.tensor(float(error is not None), device=self.device)).item():
            return
        self.agreed = True
        told = self.gather_objects([None if error is None else f"{type(error).__name__}: {error}"])
        if error is not None:
            raise error
        rank = next(rank for rank, message in enumerate(told) if message is not None)
        raise RuntimeError(f"process {rank} of {self.count} failed: {told[rank]}")

    def check_same(self, value: Any, name: str) -> None:
        """Raises ``ValueError`` where ``value``, called ``name`` (a plural), is not the same on all processes."""
        values = self.gather_objects([value])
        odd = next((rank for rank, other in enumerate(values) if other != values[0]), None)
        if odd is not None:
            raise ValueError(
                f"{name} of process {odd} are others than those of process 0, expected the same on all {self.count}"
            )


def sharding_of(accelerator: Accelerator) -> WholeWeights:
    """How the launcher's settings hold the weights.

    Raises:
        ValueError: a setting that this trainer cannot follow.
    """
    place = (accelerator.device, accelerator.num_processes, accelerator.process_index)
    if accelerator.distributed_type == DistributedType.MEGATRON_LM:
        raise ValueError(
            "accelerate: got distributed_type MEGATRON_LM, expected processes with whole weights (DDP), FSDP with "
            "fsdp_version: 2, or DEEPSPEED"
        )
    # on CPUs accelerate's state knows neither
    if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        # deepspeed is imported for those who asked for it
        from .zero import ZeroWeights, zero_stage

        stage = zero_stage()
        return ZeroWeights(*place, stage) if accelerator.num_processes > 1 else WholeWeights(*place)
    if accelerator.num_processes > 1 and parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return FullyShardedWeights(*place, _block_kinds())
    return WholeWeights(*place)


def _block_kinds() -> list[str] | None:
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
    return plugin.transformer_cls_names_to_wrap
