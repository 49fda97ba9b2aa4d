"""The arguments of transformer calls: kept once where they are equal, and put together again for a batched replay."""

from __future__ import annotations

import enum
import numbers
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map, tree_unflatten

# position ids of packed latents without a batch dim: [L, 3], shared by all rows even where L happens to equal the batch
_UNBATCHED_IDS = ("img_ids", "txt_ids")
# arguments that cannot change under our hands
_PLAIN = (type(None), numbers.Number, str, bytes, enum.Enum, torch.dtype, torch.device)


@dataclass(eq=False)
class PerRow:
    """An argument with an entry per row.

    Attributes:
        values: the different entries, stacked ``[U, ...]`` or in a list.
        places: int64 ``[copies, B]``, which entry each row has; a doubled batch has two copies of the batch. On the
            CPU where ``values`` is a list.
    """

    values: Tensor | list[Any]
    places: Tensor

    def take(self, rows: Sequence[int] | None, index: Tensor | None) -> Tensor | list[Any]:
        """``[copies, b, ...]`` of ``rows`` (default all), of which ``index`` is a tensor on the device; or a list of
        ``copies`` lists."""
        if isinstance(self.values, Tensor):
            return self.values[self.places if index is None else self.places[:, index]]
        copies = self.places.tolist()
        return [[self.values[copy[row]] for row in (range(len(copy)) if rows is None else rows)] for copy in copies]


@dataclass
class Call:
    """One transformer call: its arguments as flat leaves, those with an entry per row as :class:`PerRow`."""

    module: nn.Module
    leaves: list[Any]
    spec: TreeSpec


class ArgumentStore:
    """Keeps the arguments of calls; equal tensors, and equal rows of a tensor, are kept once.

    Equality is that of the numbers: it does not matter whether a pipeline passes the same tensor again, computes it
    again, or writes new numbers into the same memory.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple, list[Any]] = {}

    def call(self, module: nn.Module, args: tuple, kwargs: Mapping[str, Any], batch: int, copies: int) -> Call:
        """A call on ``copies * batch`` rows.

        Raises:
            ValueError: an argument that is neither a tensor nor plain data.
        """

        def per_row(value: Any) -> bool:
            plain = isinstance(value, list) and any(isinstance(x, (int, float, str)) for x in value)
            return isinstance(value, (Tensor, list)) and not plain and _length(value) in (batch, copies * batch)

        leaves, spec = tree_flatten((args, dict(kwargs)), is_leaf=lambda x: isinstance(x, list) and per_row(x))
        shared = [kwargs[n] for n in _UNBATCHED_IDS if isinstance(kwargs.get(n), Tensor) and kwargs[n].ndim == 2]
        kept = [
            self._rows(leaf, batch) if per_row(leaf) and not any(leaf is x for x in shared) else self._shared(leaf)
            for leaf in leaves
        ]
        return Call(module, kept, spec)

    def _shared(self, value: Any) -> Any:
        return tree_map(self._leaf, value)

    def _leaf(self, value: Any) -> Any:
        if isinstance(value, _PLAIN):
            return value
        if not isinstance(value, Tensor):
            raise ValueError(
                f"got a {type(value).__name__} among the transformer's arguments, expected tensors, numbers and text: "
                "what an object holds may change until the replay (a cache of keys and values, for one)"
            )
        value = value.detach()
        key = (value.shape, value.dtype, *_fingerprints(value.flatten()[None]))
        for kept in self._kept.setdefault(key, []):
            if torch.equal(kept, value):
                return kept
        self._kept[key].append(value.clone(memory_format=torch.contiguous_format))
        return self._kept[key][-1]

    def _rows(self, value: Tensor | list[Any], batch: int) -> PerRow:
        if isinstance(value, list):
            entries = [self._shared(entry) for entry in value]
            return PerRow(entries, torch.arange(len(entries)).view(-1, batch))
        value = value.detach()
        prints = _fingerprints(value.flatten(1) if value.ndim > 1 else value[:, None])
        key = ("rows", batch, value.shape, value.dtype, *prints)
        for kept in self._kept.setdefault(key, []):
            if torch.equal(kept.values[kept.places.flatten()], value):
                return kept
        index: dict[Any, int] = {}
        which = [index.setdefault(entry, len(index)) for entry in prints]
        firsts = [which.index(number) for number in range(len(index))]
        places, values = torch.tensor(which, device=value.device), value[torch.tensor(firsts, device=value.device)]
        if not torch.equal(values[places], value):
            # two different rows with one fingerprint, or numbers that are not equal to themselves
            places, values = torch.arange(len(value), device=value.device), value.clone()
        self._kept[key].append(PerRow(values, places.view(-1, batch)))
        return self._kept[key][-1]


def joinable(a: Call, b: Call) -> bool:
    """Whether one call can replay both: same module and structure, and what their rows share is the same."""
    if a.module is not b.module or a.spec != b.spec:
        return False
    for left, right in zip(a.leaves, b.leaves):
        if isinstance(left, PerRow) and isinstance(right, PerRow):
            if len(left.places) != len(right.places) or type(left.values) is not type(right.values):
                return False
            tensors = [x for x in (left.values, right.values) if isinstance(x, Tensor)]
            if len({(x.dtype, x.shape[1:]) for x in tensors}) > 1:
                return False
        elif isinstance(left, PerRow) or isinstance(right, PerRow) or not _same(left, right):
            return False
    return True


def join(calls: Sequence[Call], rows: Sequence[int] | None, device: torch.device) -> tuple[tuple, dict[str, Any]]:
    """Arguments of one call for all ``calls``: copies of the batch x rows x calls along the first dim."""
    index = None if rows is None else row_index(rows, device)
    leaves = [_join_leaf([call.leaves[i] for call in calls], rows, index) for i in range(len(calls[0].leaves))]
    return tree_unflatten(leaves, calls[0].spec)


def tensors_of(calls: Iterable[Call]) -> Iterator[Tensor]:
    """The tensors that calls hold; one that is shared comes as often as it is used."""
    for call in calls:
        for leaf in call.leaves:
            values = [leaf.values, leaf.places] if isinstance(leaf, PerRow) else [leaf]
            yield from (x for x in tree_flatten(values)[0] if isinstance(x, Tensor))


def row_index(rows: Sequence[int], device: torch.device) -> Tensor:
    """Row numbers as an int64 tensor on ``device``; the copy to a GPU does not wait for it."""
    index = torch.tensor(list(rows))
    return index.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else index


def _join_leaf(leaves: list[Any], rows: Sequence[int] | None, index: Tensor | None) -> Any:
    first = leaves[0]
    if not isinstance(first, PerRow):
        return first
    if isinstance(first.values, list):
        taken = [leaf.take(rows, index) for leaf in leaves]
        return [entry for copies in zip(*taken) for entries in zip(*copies) for entry in entries]
    shared = all(leaf is first for leaf in leaves)
    taken = [torch.as_tensor(leaf.take(rows, index)) for leaf in (leaves[:1] if shared else leaves)]
    return torch.stack(taken * len(leaves) if shared else taken, dim=2).flatten(0, 2)


def _fingerprints(rows: Tensor) -> list[float]:
    """A number per row, equal for equal rows. NaN where there is one, which is equal to nothing."""
    return rows.sum(1, dtype=torch.complex128 if rows.is_complex() else torch.float64).tolist()


def _length(value: Tensor | list) -> int:
    return -1 if isinstance(value, Tensor) and value.ndim == 0 else len(value)


def _same(a: Any, b: Any) -> bool:
    (left, spec), (right, other) = tree_flatten(a), tree_flatten(b)
    return spec == other and all(x is y or (not isinstance(x, Tensor) and x == y) for x, y in zip(left, right))
