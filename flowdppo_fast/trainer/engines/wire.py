"""Tensors in JSON as SGLang's rollout API has them: ``{"__tensor__": true, "data": base64 of a safetensors file}``."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

_NAME = "t"


def encode(value: Any) -> Any:
    """``value`` as JSON, tensors at any depth included.

    Raises:
        TypeError: something that JSON has no form for.
    """
    if isinstance(value, Tensor):
        data = base64.b64encode(save({_NAME: value.detach().cpu().contiguous().clone()})).decode()
        dtype = str(value.dtype)
        return {"__tensor__": True, "data": data, "shape": list(value.shape), "dtype": dtype}
    if isinstance(value, Mapping):
        return {str(key): encode(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [encode(entry) for entry in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"got a {type(value).__name__}, expected tensors, texts, numbers, lists and mappings")


def decode(value: Any) -> Any:
    """The inverse of :func:`encode`; runs nothing that was sent.

    Raises:
        ValueError: a tensor that is none.
    """
    if isinstance(value, Mapping):
        if not value.get("__tensor__"):
            return {key: decode(entry) for key, entry in value.items()}
        try:
            return load(base64.b64decode(value["data"], validate=True))[_NAME]
        except (KeyError, TypeError, binascii.Error, SafetensorError) as error:
            raise ValueError(
                f"a tensor: got {type(error).__name__}: {error}, expected base64 of a safetensors file with one tensor "
                f"{_NAME!r}"
            ) from None
    return [decode(entry) for entry in value] if isinstance(value, list) else value
