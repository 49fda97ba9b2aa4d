"""Tensors on the host and back: bytes of what is kept, and moving it."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ...noise import PhiloxNoise
from ...samplers import SDEStep


def stored_bytes(values: Iterable[Any]) -> int:
    """Bytes of the memory behind all tensors in ``values``; memory that several of them share counts once.

    Args:
        values: tensors, trajectories, or nested lists, tuples, mappings and this package's dataclasses of them. Modules
            are not looked into.
    """
    seen: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        seen[storage._cdata] = storage.nbytes()
        return tensor

    known: dict[int, Any] = {}
    for value in values:
        _change(value, count, known, seeds=True)
    return sum(seen.values())


def fetch(value: Any, device: torch.device | None) -> Any:
    """``value`` with all its tensors on ``device`` (None: where they are); copies to a GPU do not wait for it."""
    return value if device is None else tree_map(lambda x: _to_device(x, device) if isinstance(x, Tensor) else x, value)


def to_host(value: Any) -> None:
    """Moves the tensors of a dataclass of this package to the host, in place; a GPU does it in its own time."""
    _change(value, _to_host, {})


@contextlib.contextmanager
def on_device(modules: Sequence[torch.nn.Module], device: torch.device) -> Iterator[None]:
    """Within this context ``modules`` are on ``device``, afterwards on the host."""
    for module in modules:
        module.to(device)
    try:
        yield
    finally:
        for module in modules:
            module.to("cpu")


def _to_host(tensor: Tensor) -> Tensor:
    if tensor.device.type != "cuda":
        return tensor.cpu()
    return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)


def _to_device(tensor: Tensor, device: torch.device) -> Tensor:
    if tensor.device == device or device.type == "cpu":
        return tensor.to(device)
    # from pageable memory the copy would wait
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def _change(value: Any, change: Callable[[Tensor], Tensor], known: dict[int, Any], *, seeds: bool = False) -> Any:
    """``value`` with ``change`` applied to its tensors, once to each; dataclasses and lists are changed in place.

    Args:
        known: what was met, by id, with its result.
        seeds: also apply it to the streams of seeded noise.
    """
    if id(value) in known:
        return known[id(value)][1]
    result = value
    if isinstance(value, Tensor):
        result = change(value)
    elif isinstance(value, PhiloxNoise):
        if seeds and isinstance(value.stream, Tensor):
            change(value.stream)
    elif isinstance(value, (list, tuple, Mapping)):
        entries = value.values() if isinstance(value, Mapping) else value
        changed = [_change(entry, change, known, seeds=seeds) for entry in entries]
        if any(new is not old for new, old in zip(changed, entries)):
            if isinstance(value, list):
                value[:] = changed
            else:
                result = dict(zip(value, changed)) if isinstance(value, Mapping) else tuple(changed)
    elif dataclasses.is_dataclass(value) and not isinstance(value, (type, SDEStep)) and _own(value):
        for field in dataclasses.fields(value):
            old = getattr(value, field.name)
            new = _change(old, change, known, seeds=seeds)
            if new is not old:
                setattr(value, field.name, new)
    # the value is kept alive, so that its id stays its own
    known[id(value)] = (value, result)
    return result


def _own(value: Any) -> bool:
    return type(value).__module__.partition(".")[0] == __name__.partition(".")[0]
