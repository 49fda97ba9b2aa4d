"""What a module's call depends on besides its arguments: attention processors, replaced forwards, scales, autocast."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

# attributes of a module's parts that pipelines set for single calls, and ones they change
_SET = ("forward", "_diffusers_hook")
_CHANGED = ("processor", "scaling")
_ABSENT = object()


@dataclass(frozen=True, eq=False)
class Surroundings:
    """What was in force when a module was called; equal ones can share a call.

    Attributes:
        parts: by part and attribute of the module, what was set on it.
        autocast: device type and dtype of autocast; None: it was off.
    """

    parts: dict[tuple[nn.Module, str], Any]
    autocast: tuple[str, torch.dtype | None]

    @classmethod
    def now(cls, module: nn.Module, device: str) -> Surroundings:
        """What is in force."""
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        return cls(_parts(module), (device, dtype))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Surroundings) or self.autocast != other.autocast:
            return False
        return self.parts.keys() == other.parts.keys() and all(_same(x, other.parts[k]) for k, x in self.parts.items())

    __hash__ = None  # type: ignore[assignment]

    @staticmethod
    @contextlib.contextmanager
    def put_back(call: Any) -> Iterator[None]:
        """Within this context everything is as it was when ``call`` was recorded.

        Raises:
            ValueError: gradient checkpointing is on, which runs blocks again in the backward, after this context.
        """
        own: Surroundings = call.surroundings
        if own is None:
            yield
            return
        now = _parts(call.module)
        # parts that came since, such as adapters, are left as they are
        changed = [key for key in now if key in own.parts and not _same(now[key], own.parts[key])]
        if changed and torch.is_grad_enabled() and any(getattr(x, "gradient_checkpointing", False) for x, _ in now):
            names = ", ".join(sorted({name for _, name in changed}))
            raise ValueError(
                f"pipeline: it had set {names} of {type(call.module).__name__} for this call, and gradient "
                "checkpointing would run its blocks without that in the backward, expected "
                "model.gradient_checkpointing=false"
            )
        try:
            for key in changed:
                _set(*key, own.parts[key])
            with _autocast(*own.autocast):
                yield
        finally:
            for key in changed:
                _set(*key, now[key])


def _parts(module: nn.Module) -> dict[tuple[nn.Module, str], Any]:
    found: dict[tuple[nn.Module, str], Any] = {}
    for part in module.modules():
        own = vars(part)
        found.update({(part, name): own.get(name, _ABSENT) for name in _SET})
        for name in _CHANGED:
            value = part._modules.get(name, own.get(name, _ABSENT))
            if value is not _ABSENT:
                found[part, name] = dict(value) if isinstance(value, dict) else value
    return found


def _autocast(device: str, dtype: torch.dtype | None) -> contextlib.AbstractContextManager:
    now = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    if now == dtype:
        return contextlib.nullcontext()
    return torch.autocast(device, dtype, enabled=dtype is not None)


def _same(a: Any, b: Any) -> bool:
    return a is b or (isinstance(a, dict) and isinstance(b, dict) and a == b)


def _set(part: nn.Module, name: str, value: Any) -> None:
    if value is _ABSENT:
        delattr(part, name)
    elif isinstance(value, dict):
        getattr(part, name).update(value)
    else:
        setattr(part, name, value)
