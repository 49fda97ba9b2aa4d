"""The arguments of module calls: kept once where they are equal, and put together again for a batched replay."""

from __future__ import annotations

import dataclasses
import enum
import itertools
import numbers
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map, tree_unflatten

# arguments that cannot change under our hands
_PLAIN = (type(None), numbers.Number, str, bytes, enum.Enum, torch.dtype, torch.device, torch.Size, torch.layout, slice)


@dataclass(frozen=True)
class Ref:
    """Name of a tensor that descends from the output of a replayed module, within one step."""

    index: int


@dataclass(frozen=True)
class Layout:
    """Where the rows of a batch are in a tensor or list.

    Attributes:
        dim: the dim of the rows.
        copies: entries per row; a doubled batch has two.
        within: the entries of a row are neighbours; else the whole batch comes ``copies`` times.
        listed: it is a list.
    """

    dim: int = 0
    copies: int = 1
    within: bool = False
    listed: bool = False

    def split(self, value: Tensor, rows: int) -> Tensor:
        """``[copies, rows, ...]`` of a tensor."""
        value = value.movedim(self.dim, 0)
        if self.within:
            return value.unflatten(0, (rows, self.copies)).transpose(0, 1)
        return value.unflatten(0, (self.copies, rows))

    def merge(self, value: Tensor) -> Tensor:
        """The tensor of ``[copies, rows, steps, ...]``."""
        value = value.movedim(0, 2) if self.within else value
        return value.flatten(0, 2).movedim(0, self.dim)

    def places(self, rows: int, steps: int = 1) -> list[int]:
        """Where in a list the entries ``[copies, rows, steps]`` are, in that order."""
        index = torch.arange(self.copies * rows * steps)
        index = index.view(rows, steps, self.copies).permute(2, 0, 1) if self.within else index
        return index.flatten().tolist()


@dataclass(eq=False)
class PerRow:
    """An argument with an entry per row.

    Attributes:
        values: the different entries, stacked ``[U, ...]`` or in a list.
        places: int64 ``[copies, B]``, which entry each row has; a doubled batch has two copies of the batch. On the
            CPU where ``values`` is a list.
        layout: how the entries are put together.
    """

    values: Tensor | list[Any]
    places: Tensor
    layout: Layout = Layout()

    def whole(self) -> Tensor:
        """The tensor that was kept."""
        return self.layout.merge(torch.as_tensor(self.values)[self.places].unsqueeze(2))


@dataclass
class Call:
    """One module call: its arguments as flat leaves, those with an entry per row as :class:`PerRow`.

    Attributes:
        layouts: of arguments that descend from an earlier call of the step, by their number among the leaves.
        outputs: names of the outputs that are used, by part (:func:`parts`) and place in it.
        slots: where the rows are in each of these; None where they share it.
        surroundings: what was in force during the call.
    """

    module: nn.Module
    leaves: list[Any]
    spec: TreeSpec
    batch: int
    layouts: dict[int, Layout | None] = field(default_factory=dict)
    outputs: dict[tuple[int, int], Ref] = field(default_factory=dict)
    slots: dict[tuple[int, int], Layout | None] = field(default_factory=dict)
    surroundings: Any = None


class ArgumentStore:
    """Keeps the arguments of calls; equal tensors, and equal rows of a tensor, are kept once.

    Equality is that of the numbers: it does not matter whether a pipeline passes the same tensor again, computes it
    again, or writes new numbers into the same memory.

    Args:
        looks: look for equal ones, which reads numbers on the host.
    """

    def __init__(self, *, looks: bool = True) -> None:
        self._looks = looks
        self._kept: dict[tuple, list[Any]] = {}
        # by identity, for a copy that is given twice
        self._known: dict[tuple, tuple[Any, Any]] = {}

    def call(self, module: nn.Module, args: tuple, kwargs: Mapping[str, Any], batch: int, copies: int) -> Call:
        """A call whose arguments with ``batch`` or ``copies * batch`` entries have one per row.

        Raises:
            ValueError: an argument that is neither a tensor nor plain data.
        """
        value = (args, dict(kwargs))
        layouts = [candidates(leaf, batch, copies)[0] for leaf in flatten(value, batch)[0]]
        return self.keep(module, value, True, layouts, batch)

    def keep(self, module: nn.Module, value: Any, closed: bool, layouts: Sequence[Layout | None], batch: int) -> Call:
        """A call with known layouts.

        Args:
            value: positional and keyword arguments, which nobody else writes to.
            closed: lists with an entry per row are one argument.
        """
        leaves, spec = flatten(value, batch, closed=closed)
        kept = [
            leaf
            if isinstance(leaf, Ref)
            else self._rows(leaf, batch, layout)
            if layout is not None
            else tree_map(self._leaf, leaf)
            for leaf, layout in zip(leaves, layouts)
        ]
        named = {i: layout for i, (leaf, layout) in enumerate(zip(leaves, layouts)) if isinstance(leaf, Ref)}
        return Call(module, kept, spec, batch, named)

    def next_step(self) -> None:
        """Copies that were given are let go."""
        self._known.clear()

    def constant(self, value: Tensor, batch: int) -> Tensor | PerRow:
        """What is kept of a constant: small ones as they are, as looking for equal ones has a cost."""
        if value.numel() <= 16:
            return value
        layout = candidates(value, batch, 1)[0]
        return self._leaf(value) if layout is None else self._rows(value, batch, layout)

    def _leaf(self, value: Any) -> Any:
        if isinstance(value, (Ref, *_PLAIN)):
            return value
        if not isinstance(value, Tensor):
            if _is_empty(value):
                return value
            raise ValueError(
                f"got a {type(value).__name__} among the transformer's arguments, expected tensors, numbers and text: "
                "what an object holds may change until the replay (a cache of keys and values, for one)"
            )
        value = value.detach()
        if not self._looks:
            return value
        key = (value.shape, value.dtype, *_fingerprints(value.flatten()[None]))
        for kept in self._kept.setdefault(key, []):
            if torch.equal(kept, value):
                return kept
        self._kept[key].append(value.clone(memory_format=torch.contiguous_format))
        return self._kept[key][-1]

    def _rows(self, value: Tensor | list[Any], batch: int, layout: Layout) -> PerRow:
        if isinstance(value, list):
            entries = [tree_map(self._leaf, entry) for entry in value]
            order = layout.places(batch)
            return PerRow(entries, torch.tensor(order).view(-1, batch), layout)
        known = self._known.get((id(value), layout, batch))
        if known is not None:
            return known[1]
        given, value = value, layout.split(value.detach(), batch).flatten(0, 1)
        if not self._looks:
            return PerRow(value, torch.arange(len(value), device=value.device).view(-1, batch), layout)
        prints = _fingerprints(value.flatten(1) if value.ndim > 1 else value[:, None])
        key = ("rows", batch, layout, value.shape, value.dtype, *prints)
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
        made = PerRow(values, places.view(-1, batch), layout)
        self._kept[key].append(made)
        self._known[id(given), layout, batch] = given, made
        return made


def flatten(value: Any, batch: int, *, closed: bool = True) -> tuple[list[Any], TreeSpec]:
    """Flat leaves, lists with an entry per row being one of them if they are ``closed``."""

    def per_row(x: Any) -> bool:
        return (
            closed
            and isinstance(x, list)
            and len(x) > 0
            and len(x) % batch == 0
            and not any(isinstance(entry, (int, float, str, Ref)) for entry in x)
            # with one row, any list would be one
            and (batch > 1 or len(x) == 1)
        )

    return tree_flatten(value, is_leaf=per_row)


def candidates(leaf: Any, batch: int, copies: int, *, exact: bool = True) -> list[Layout | None]:
    """Where the rows of an argument may be, the likeliest first; None: it has none.

    Args:
        copies: how often the batch comes in the call.
        exact: with one row, only dims of one entry or ``copies`` can hold it.
    """
    if isinstance(leaf, list):
        count = len(leaf) // batch
        return [Layout(0, count, listed=True), *([Layout(0, count, True, True)] if count > 1 else []), None]
    if not isinstance(leaf, Tensor):
        return [None]
    found = []
    for dim, size in enumerate(leaf.shape):
        count = size // batch
        if not size or size % batch or (exact and batch == 1 and size not in (1, copies)):
            continue
        found.append(Layout(dim, count))
        if count > 1 and batch > 1:
            found.append(Layout(dim, count, True))
    usual = [x for x in found if x.dim == 0 and x.copies in (1, copies) and not x.within]
    # more entries per row are less likely
    rest = sorted((x for x in found if x not in usual), key=lambda x: (x.copies, x.dim, x.within))
    return [*usual, None, *rest]


def parts(output: Any) -> list[Tensor | list[Tensor]]:
    """The tensors of a module's output in order; a list of tensors is one part, as it may have an entry per row."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, list) and output and all(isinstance(x, Tensor) for x in output):
        return [output]
    if isinstance(output, Mapping):
        output = list(output.values())
    elif dataclasses.is_dataclass(output) and not isinstance(output, type):
        output = [getattr(output, entry.name) for entry in dataclasses.fields(output)]
    return list(itertools.chain.from_iterable(map(parts, output))) if isinstance(output, (list, tuple)) else []


def joinable(a: Call, b: Call) -> bool:
    """Whether one call can replay both: same module and structure, and what their rows share is the same."""
    if a.module is not b.module or a.spec != b.spec or a.slots != b.slots or a.outputs.keys() != b.outputs.keys():
        return False
    if a.layouts != b.layouts or None in a.layouts.values() or None in a.slots.values():
        return False
    for left, right in zip(a.leaves, b.leaves):
        if isinstance(left, PerRow) and isinstance(right, PerRow):
            if left.layout != right.layout or len(left.places) != len(right.places):
                return False
            if type(left.values) is not type(right.values):
                return False
            tensors = [x for x in (left.values, right.values) if isinstance(x, Tensor)]
            if len({(x.dtype, x.shape[1:]) for x in tensors}) > 1:
                return False
        elif isinstance(left, Ref) and isinstance(right, Ref):
            continue
        elif isinstance(left, PerRow) or isinstance(right, PerRow) or not _same(left, right):
            return False
    return a.surroundings == b.surroundings


def join(
    calls: Sequence[Call],
    rows: Sequence[int] | None,
    device: torch.device,
    given: Sequence[Mapping[int, Tensor]] | None = None,
) -> tuple[tuple, dict[str, Any]]:
    """Arguments of one call for all ``calls``: copies of the batch x rows x calls along the first dim.

    Args:
        given: of each call, whole tensors of the leaves that descend from earlier calls, by their number.
    """
    index = None if rows is None else row_index(rows, device)
    leaves = []
    for number, first in enumerate(calls[0].leaves):
        if isinstance(first, Ref):
            assert given is not None
            layout = calls[0].layouts[number]
            leaves.append(_join_given([one[number] for one in given], layout, calls[0].batch, index))
        else:
            leaves.append(_join_kept([call.leaves[number] for call in calls], rows, index))
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


def _join_given(values: list[Tensor], layout: Layout | None, batch: int, index: Tensor | None) -> Tensor:
    if layout is None:
        return values[0]
    split = [layout.split(value, batch) for value in values]
    return layout.merge(torch.stack(split if index is None else [x[:, index] for x in split], dim=2))


def _join_kept(leaves: list[Any], rows: Sequence[int] | None, index: Tensor | None) -> Any:
    first = leaves[0]
    if not isinstance(first, PerRow):
        return first
    if isinstance(first.values, list):
        # [copies, rows, steps]
        some = range(first.places.shape[1]) if rows is None else rows
        copies = range(len(first.places))
        entries = [leaf.values[leaf.places[copy, row]] for copy in copies for row in some for leaf in leaves]
        ordered: list[Any] = [None] * len(entries)
        for entry, place in zip(entries, first.layout.places(len(some), len(leaves))):
            ordered[place] = entry
        return ordered
    shared = all(leaf is first for leaf in leaves)
    taken = [
        torch.as_tensor(leaf.values)[leaf.places if index is None else leaf.places[:, index]]
        for leaf in (leaves[:1] if shared else leaves)
    ]
    return first.layout.merge(torch.stack(taken * len(leaves) if shared else taken, dim=2))


def _fingerprints(rows: Tensor) -> list[float]:
    """A number per row, equal for equal rows. NaN where there is one, which is equal to nothing."""
    return rows.sum(1, dtype=torch.complex128 if rows.is_complex() else torch.float64).tolist()


def _is_empty(value: Any) -> bool:
    """Whether an object holds nothing that a model could have written, such as a cache that is not used."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return all(map(_is_empty, value))
    if isinstance(value, (Tensor, *_PLAIN)) or callable(value):
        return isinstance(value, _PLAIN)
    return hasattr(value, "__dict__") and _is_empty(vars(value))


def _same(a: Any, b: Any) -> bool:
    (left, spec), (right, other) = tree_flatten(a), tree_flatten(b)
    return spec == other and all(x is y or (not isinstance(x, Tensor) and x == y) for x, y in zip(left, right))
