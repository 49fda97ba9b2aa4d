"""From whatever users hold to the canonical ``[R0, R1, N]`` the operators see, without a copy where memory is dense."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

LATENT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def latent_order(x: Tensor, row_dims: int) -> tuple[int, ...] | None:
    """Latent dims of ``x`` in memory order where that differs from the logical one (channels-last), else None."""
    strides = x.stride()[row_dims:]
    dims = [d for d in range(len(strides)) if x.shape[row_dims + d] != 1]
    # insertion sort: torch.compile compares symbolic strides but cannot sort() them
    ordered: list[int] = []
    for d in dims:
        place = len(ordered)
        while place > 0 and strides[ordered[place - 1]] < strides[d]:
            place -= 1
        ordered.insert(place, d)
    if ordered == dims:
        return None
    unit = [d for d in range(len(strides)) if d not in dims]
    return tuple(row_dims + d for d in ordered + unit)


def to_rows(x: Tensor, row_dims: int, order: tuple[int, ...] | None) -> Tensor:
    """``x`` as ``[R0, R1, N]``, latents in memory order ``order``; a view where the latents are dense, else a copy."""
    shape = x.shape
    if order is not None:
        x = x.permute(*range(row_dims), *order)
    numel = math.prod(shape[row_dims:])
    if row_dims == 1:
        rows = x.reshape(shape[0], 1, numel)
    else:
        rows = x.reshape(math.prod(shape[: row_dims - 1]), shape[row_dims - 1], numel)
    # evenly spaced latents (x[..., ::2]) collapse to a view, but the kernels read neighbours
    return rows if numel == 1 or rows.stride(2) == 1 else rows.contiguous()


def from_rows(rows: Tensor, shape: torch.Size, row_dims: int, order: tuple[int, ...] | None) -> Tensor:
    """The inverse of :func:`to_rows` for a contiguous ``[R0, R1, N]``: a view of ``shape`` in the same memory order."""
    if order is None:
        return rows.reshape(shape)
    permuted = rows.reshape(*shape[:row_dims], *(shape[d] for d in order))
    inverse = [0] * len(order)
    for position, dim in enumerate(order):
        inverse[dim - row_dims] = row_dims + position
    return permuted.permute(*range(row_dims), *inverse)


def with_order(x: Tensor, row_dims: int, order: tuple[int, ...] | None) -> Tensor:
    """``x`` with its latents in memory order ``order``: a copy where that is not its order yet."""
    return x if order is None else from_rows(to_rows(x, row_dims, order), x.shape, row_dims, order)


def check_row_dims(row_dims: int) -> None:
    """Raises ValueError unless there are 1 or 2."""
    if row_dims not in (1, 2):
        raise ValueError(f"row_dims: got {row_dims!r}, expected 1 or 2 leading row dims")


def check_latents(named: Mapping[str, Tensor], first: str, rows: torch.Size | tuple[int, ...]) -> None:
    """Same shape, device and a supported dtype for all latents; leading dims equal to the rows.

    Raises:
        TypeError: no tensor, an unsupported dtype, or float64 mixed with others.
        ValueError: shapes or devices that differ, no latent dim, or leading dims that are not the rows.
    """
    lead = named[first]
    if not isinstance(lead, torch.Tensor):
        raise TypeError(f"{first}: got {type(lead).__name__}, expected a tensor")
    shape, device, dtype = lead.shape, lead.device, lead.dtype
    row_dims = len(rows)
    if row_dims == 0:
        raise ValueError("advantages: got a 0-d tensor, expected one advantage per row, shaped [B] or [B, S]")
    if len(shape) <= row_dims or shape[:row_dims] != torch.Size(rows):
        raise ValueError(
            f"{first}: got shape {list(shape)}, expected leading dims equal to advantages' shape {list(rows)} followed "
            "by at least one latent dim"
        )
    if 0 in shape[row_dims:]:
        raise ValueError(f"{first}: got shape {list(shape)}, expected latents with at least one element per row")
    for name, x in named.items():
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"{name}: got {type(x).__name__}, expected a tensor")
        if x.dtype not in LATENT_DTYPES:
            raise TypeError(f"{name}: got dtype {x.dtype}, expected float32, bfloat16, float16 or float64")
        if (x.dtype == torch.float64) != (dtype == torch.float64):
            raise TypeError(
                f"{name}: got {x.dtype} beside {first} in {dtype}; float64 is computed in float64 throughout, so "
                "convert all latents to float64 or none"
            )
        if x.shape != shape:
            raise ValueError(f"{name}: got shape {list(x.shape)}, expected {list(shape)} like {first}")
        if x.device != device:
            raise ValueError(f"{name}: got a tensor on {x.device}, expected {device} like {first}")


def check_no_grad(named: Mapping[str, Tensor], first: str) -> None:
    """Only ``first`` gets a gradient.

    Raises:
        ValueError: another tensor requires one.
    """
    for name, x in named.items():
        if name != first:
            _check_detached(x, name, f"gradients flow into {first} only")


def _check_detached(x: Tensor, name: str, why: str) -> None:
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name}: got a tensor that requires grad, expected a detached one; {why}, so pass {name}.detach()"
        )


def row_vector(
    value: Tensor,
    name: str,
    rows: torch.Size | tuple[int, ...],
    device: torch.device,
    dtype: torch.dtype,
    *,
    differentiable: bool = False,
) -> Tensor:
    """``value`` as a contiguous ``[R]`` vector in ``dtype``; trailing dims of size 1 allowed (``[B, 1, 1, 1]``).

    Raises:
        TypeError: no floating-point tensor. ValueError: wrong device, a shape that does not broadcast to the rows, or a
            tensor that requires grad and is not ``differentiable``.
    """
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a tensor with one number per row")
    if not value.dtype.is_floating_point:
        raise TypeError(f"{name}: got dtype {value.dtype}, expected a floating-point dtype")
    if value.device != device:
        raise ValueError(f"{name}: got a tensor on {value.device}, expected {device} like the latents")
    if not differentiable:
        _check_detached(value, name, "it gets no gradient")
    if len(rows) == 1 and value.dtype == dtype and value.shape == rows and value.is_contiguous():
        # what trainers hold: nothing to do on the hot path
        return value
    return expand_to_rows(value, name, rows).to(dtype).reshape(-1).contiguous()


def expand_to_rows(value: Tensor, name: str, rows: torch.Size | tuple[int, ...]) -> Tensor:
    """``value`` broadcast to ``rows``, trailing dims of size 1 beyond the rows' rank dropped."""
    shape = value.shape
    while len(shape) > len(rows) and shape[-1] == 1:
        shape = shape[:-1]
    # `in (1, row)` would compare symbolic sizes by identity under torch.compile
    mismatch = [size != 1 and size != row for size, row in zip(reversed(shape), reversed(rows))]
    if len(shape) > len(rows) or any(mismatch):
        raise ValueError(
            f"{name}: got shape {list(value.shape)}, expected something that broadcasts to the rows {list(rows)} "
            "(trailing dims of size 1 allowed)"
        )
    return value.reshape(shape).expand(rows)
