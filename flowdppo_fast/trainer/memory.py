"""What a run keeps in memory: bytes of trajectories, trajectories on the host, and estimates from tensor sizes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ..noise import PhiloxNoise
from ..samplers import SDEStep

if TYPE_CHECKING:
    from .recorder import Trajectory

# entries of float32 per trained weight: the weight, its gradient and AdamW's two moments
_TRAINED_COPIES = 4


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


def trajectory_bytes(trajectories: Sequence[Trajectory]) -> float:
    """Bytes kept per sample: velocities, noise or its seeds, and the arguments of transformer calls."""
    return stored_bytes(trajectories) / sum(map(len, trajectories))


def offload(trajectory: Trajectory, device: torch.device) -> None:
    """Moves what was recorded to the host, to pinned memory where there is a GPU; returns when it is there.

    Row by row it comes back to ``device`` when it is replayed (:func:`fetch`). Seeds of noise and the numbers of the
    steps, a few bytes, stay where they are. A trajectory on the host already is left as it is.
    """
    _change(trajectory, _to_host, {})
    trajectory.device = device
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def fetch(value: Any, device: torch.device | None) -> Any:
    """``value`` with all its tensors on ``device`` (None: where they are); copies to a GPU do not wait for it."""
    return value if device is None else tree_map(lambda x: _to_device(x, device) if isinstance(x, Tensor) else x, value)


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
