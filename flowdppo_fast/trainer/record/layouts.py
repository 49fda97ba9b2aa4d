"""Where the rows of a batch are in a call's arguments and outputs, found by calling the module on some of the rows."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .arguments import ArgumentStore, Call, Layout, Ref, candidates, flatten, join, parts
from .surroundings import Surroundings

# how many hypotheses are tried before a call is refused
_TRIALS = 64
Outputs = Mapping[tuple[int, int], Tensor]
Found = tuple[bool, tuple[Layout | None, ...], dict[tuple[int, int], Layout | None]]


def find_layouts(
    call: Call, value: Any, named: Mapping[Ref, Tensor], outputs: Outputs, lengths: Sequence[int | None], batch: int,
    *, checked: bool,
) -> Found:  # fmt: skip
    """Layouts of a call's arguments and used outputs, and whether lists among the arguments have an entry per row.

    Every argument's layout is a hypothesis. The module is called on some rows, and has to give what it gave for these.

    Args:
        value: positional and keyword arguments; descendants of earlier calls are names.
        named: the tensors behind these names.
        outputs, lengths: what is used of the outputs, and how many entries each part has if it is a list.
        checked: False takes the likeliest hypothesis without a call.

    Raises:
        ValueError: none fits; the message has the arguments and their shapes.
    """
    copies = _copies(value, named, outputs, lengths, batch)
    if not checked:
        leaves, _ = flatten(value, batch)
        slots = {key: _likely(output, lengths[key[0]], batch) for key, output in outputs.items()}
        return True, tuple(options[0] for options in _options(leaves, named, batch, copies)), slots
    computed = {x.dtype for x in outputs.values() if x.is_floating_point()}
    if call.surroundings is not None:
        computed |= {call.surroundings.autocast[1]} - {None}
    eps = max(torch.finfo(dtype).eps for dtype in computed)
    # in the recorded geometry with other rows around them, rows come out as they were; in another one they are rounded
    # to the dtype's last place; sums inside of a module are float32, and their order may depend on where memory lies
    near = eps + 8 * torch.finfo(torch.float32).eps
    subsets = {1: [([0, 0], 16 * eps)], 2: [([1, 1], near), ([0, 0], near), ([1], 16 * eps), ([0], 16 * eps)]}.get(
        batch, [([batch - 1, *[0] * (batch - 1)], near), ([1], 16 * eps), ([batch - 1, 0], 16 * eps)]
    )
    nearest = float("inf")
    for closed, layouts in itertools.islice(_hypotheses(value, named, batch, copies), _TRIALS):
        worst, slots = 0.0, {}
        kept = ArgumentStore(looks=False).keep(call.module, value, closed, layouts, batch)
        kept.surroundings = call.surroundings
        for subset, tolerance in subsets:
            error, slots = _try(kept, named, outputs, lengths, subset)
            worst = max(worst, error)
            if not error <= tolerance:
                break
        else:
            return closed, layouts, slots
        nearest = min(nearest, worst)
    leaves, _ = flatten(value, batch, closed=False)
    shapes = ", ".join(str(list((named[x] if isinstance(x, Ref) else x).shape)) for x in leaves if _is_tensor(x))
    raise ValueError(
        f"{type(call.module).__name__} was called with tensors {shapes} for {batch} rows, and none of the ways to take "
        "some of the rows gives what it gave for these, expected arguments with an entry per row along one dim or "
        f"shared by all, and independent rows (the nearest was off by {nearest:.3g} of its size)"
    )


def _copies(
    value: Any, named: Mapping[Ref, Tensor], outputs: Outputs, lengths: Sequence[int | None], batch: int
) -> int:
    """How often the batch comes in a call, as far as sizes tell: two times where guidance doubles it."""
    (part, _), first = next(iter(outputs.items()))
    if lengths[part] is None:
        return max((len(first) if first.ndim else 1) // batch, 1)
    # a list may have an entry per row or per layer, so it is what most arguments have
    leaves = [named[x] if isinstance(x, Ref) else x for x in flatten(value, batch)[0]]
    sizes = [len(x) for x in leaves if isinstance(x, list) or (isinstance(x, Tensor) and x.ndim)]
    counts = Counter(size // batch for size in sizes if size and size % batch == 0)
    return counts.most_common(1)[0][0] if counts else max((lengths[part] or 1) // batch, 1)


def scatter(
    part: Tensor | list[Tensor], place: int, layout: Layout | None, sizes: tuple[int, int, int], step: int,
    fill: tuple[list[int], Tensor] | None,
) -> Tensor:  # fmt: skip
    """An output for the whole batch, from that for some rows and several steps.

    Args:
        place: the entry of a list that is wanted, counted in the whole batch.
        sizes: rows and steps in ``part``, and rows of the whole batch.
        fill: which row of ``part`` each row of the whole batch is; None: it is all of them.
    """
    width, steps, batch = sizes
    if layout is not None and layout.listed:
        copy, row = divmod(layout.places(batch).index(place), batch)
        row = row if fill is None else fill[0][row]
        return part[layout.places(width, steps)[(copy * width + row) * steps + step]]
    value = part[place] if isinstance(part, list) else part
    if layout is None or (steps == 1 and fill is None):
        return value
    split = layout.split(value, width * steps).unflatten(1, (width, steps))[:, :, step]
    return layout.merge((split if fill is None else split[:, fill[1]]).unsqueeze(2))


def _hypotheses(
    value: Any, named: Mapping[Ref, Tensor], batch: int, copies: int
) -> Iterator[tuple[bool, tuple[Layout | None, ...]]]:
    """Layouts of all arguments, the likeliest first: those of few arguments are changed before those of many."""
    whole, _ = flatten(value, batch)
    opened, _ = flatten(value, batch, closed=False)
    both = [(True, whole), (False, opened)] if len(whole) != len(opened) else [(True, whole)]
    options = [(closed, _options(leaves, named, batch, copies)) for closed, leaves in both]
    for changes in range(3):
        for closed, choices in options:
            several = [i for i, choice in enumerate(choices) if len(choice) > 1]
            for which in itertools.combinations(several, changes):
                for others in itertools.product(*(choices[i][1:] for i in which)):
                    changed = dict(zip(which, others))
                    yield closed, tuple(changed.get(i, choice[0]) for i, choice in enumerate(choices))


def _options(leaves: Sequence[Any], named: Mapping[Ref, Tensor], batch: int, copies: int) -> list[list[Layout | None]]:
    return [candidates(named[leaf] if isinstance(leaf, Ref) else leaf, batch, copies) for leaf in leaves]


def _try(
    kept: Call, named: Mapping[Ref, Tensor], outputs: Outputs, lengths: Sequence[int | None], rows: list[int]
) -> tuple[float, dict[tuple[int, int], Layout | None]]:
    """How far the outputs for ``rows`` are from those of the recorded call, and where rows are in them."""
    wrong: tuple[float, dict] = (float("inf"), {})
    batch, device = kept.batch, next(iter(outputs.values())).device
    given = {i: named[leaf] for i, leaf in enumerate(kept.leaves) if isinstance(leaf, Ref)}
    args, kwargs = join([kept], rows, device, [given])
    try:
        with torch.no_grad(), Surroundings.put_back(kept):
            made = parts(kept.module(*args, **kwargs))
    except torch.OutOfMemoryError:
        # says nothing of where rows are
        raise
    except Exception:
        return wrong
    if len(made) != len(lengths):
        return wrong
    found: list[tuple[tuple[int, int], Layout | None, Tensor]] = []
    for key, whole in outputs.items():
        (which, place), before = key, len(found)
        part, length = made[which], lengths[which]
        if isinstance(part, list) and length and length % batch == 0 and len(part) * batch == length * len(rows):
            copy, row = divmod(place, batch)
            error = (
                _error(whole, part[copy * len(rows) + rows.index(row)]) if row in rows else whole.new_zeros(()).double()
            )
            found.append((key, Layout(0, length // batch, listed=True), error))
        if not isinstance(part, list) or len(part) == length:
            some = part[place] if isinstance(part, list) else part
            if whole.shape == some.shape:
                found.append((key, None, _error(whole, some)))
            for layout in candidates(whole, batch, 1, exact=False):
                if layout is not None and _scaled(whole.shape, layout, batch, len(rows)) == some.shape:
                    expected = layout.split(whole, batch)[:, rows]
                    found.append((key, layout, _error(expected, layout.split(some, len(rows)))))
        if len(found) == before:
            return wrong
    # read at once
    errors = torch.stack([error for *_, error in found]).tolist()
    best: dict[tuple[int, int], tuple[float, Layout | None]] = {}
    for (key, layout, _), number in zip(found, errors):
        size = number if math.isfinite(number) else float("inf")
        if key not in best or size < best[key][0]:
            best[key] = size, layout
    return max(error for error, _ in best.values()), {key: layout for key, (_, layout) in best.items()}


def _likely(output: Tensor, length: int | None, batch: int) -> Layout | None:
    if length is not None:
        return Layout(0, length // batch, listed=True) if length % batch == 0 else None
    return Layout(0, len(output) // batch) if output.ndim and len(output) % batch == 0 else None


def _scaled(shape: Sequence[int], layout: Layout, batch: int, rows: int) -> torch.Size:
    return torch.Size(size // batch * rows if dim == layout.dim else size for dim, size in enumerate(shape))


def _error(expected: Tensor, made: Tensor) -> Tensor:
    """Root-mean-square difference over the root-mean-square size."""
    if expected.shape != made.shape:
        return torch.full((), float("inf"), dtype=torch.float64, device=expected.device)
    expected, made = (x.double() if not x.is_complex() else torch.view_as_real(x).double() for x in (expected, made))
    return (expected - made).square().mean().sqrt() / expected.square().mean().sqrt().clamp_min(1e-30)


def _is_tensor(leaf: Any) -> bool:
    return isinstance(leaf, (Ref, Tensor))
