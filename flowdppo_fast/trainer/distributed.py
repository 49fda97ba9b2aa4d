"""The processes of a run: which rows each of them samples and trains on, and the sums they exchange.

Rows, seeds and updates are numbered for the whole run, so that a run does the same on one process as on many. The
transformer is not wrapped: gradients of one update are summed once, after its last micro-batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

# gradients travel in pieces of this many numbers
_BUCKET = 1 << 25


class Workers:
    """All processes of ``accelerator``, of which this is number ``rank``."""

    def __init__(self, accelerator: Accelerator):
        self.count, self.rank = accelerator.num_processes, accelerator.process_index
        self.is_main = accelerator.is_main_process
        self._accelerator = accelerator

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

    def sum_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Replaces the gradients by their sum over processes."""
        if self.count == 1:
            return
        for bucket in _buckets([p.grad for p in parameters if p.grad is not None]):
            flat = self.sum(torch.cat([grad.flatten() for grad in bucket]))
            parts = flat.split([grad.numel() for grad in bucket])
            torch._foreach_copy_(bucket, [part.view_as(grad) for part, grad in zip(parts, bucket)])

    def wait(self) -> None:
        """Returns when all processes have come here."""
        self._accelerator.wait_for_everyone()


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
