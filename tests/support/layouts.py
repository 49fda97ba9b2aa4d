"""Ways in which users hold a tensor: same values, other memory. What lies between is NaN, so a misread shows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Layout = Callable[[Tensor, int], Tensor]


def _filled(view: Tensor, values: Tensor) -> Tensor:
    assert view.shape == values.shape
    view.copy_(values)
    return view


def _nan(values: Tensor, shape: tuple[int, ...]) -> Tensor:
    return values.new_full(shape, torch.nan)


def contiguous(x: Tensor, row_dims: int) -> Tensor:
    return x.contiguous()


def unaligned(x: Tensor, row_dims: int) -> Tensor:
    """A view three elements into a storage: no vector load is aligned."""
    return _filled(_nan(x, (x.numel() + 3,))[3:].view(x.shape), x)


def trajectory_slice(x: Tensor, row_dims: int) -> Tensor:
    """``trajectory[:, 1]`` for rows ``[B]``, ``trajectory[:, 1:-1]`` for rows ``[B, S]``."""
    if row_dims == 1:
        return _filled(_nan(x, (x.shape[0], 3, *x.shape[1:]))[:, 1], x)
    return _filled(_nan(x, (x.shape[0], x.shape[1] + 2, *x.shape[2:]))[:, 1:-1], x)


def channels_last(x: Tensor, row_dims: int) -> Tensor:
    """The first latent dim innermost in memory."""
    return x.movedim(row_dims, -1).contiguous().movedim(-1, row_dims)


def reversed_latents(x: Tensor, row_dims: int) -> Tensor:
    """All latent dims in opposite memory order."""
    order = (*range(row_dims), *reversed(range(row_dims, x.ndim)))
    return x.permute(order).contiguous().permute(order)


def steps_first(x: Tensor, row_dims: int) -> Tensor:
    """Rows ``[B, S]`` stored as ``[S, B]``, as a list of steps stacked and transposed is."""
    return x.transpose(0, row_dims - 1).contiguous().transpose(0, row_dims - 1)


def channel_half(x: Tensor, row_dims: int) -> Tensor:
    """The second half of doubled channels (learned variance, image conditioning)."""
    channels = x.shape[row_dims]
    shape = (*x.shape[:row_dims], 2 * channels, *x.shape[row_dims + 1 :])
    return _filled(_nan(x, shape).narrow(row_dims, channels, channels), x)


def batch_half(x: Tensor, row_dims: int) -> Tensor:
    """The second half of a doubled batch (classifier-free guidance)."""
    return _filled(_nan(x, (2 * x.shape[0], *x.shape[1:]))[x.shape[0] :], x)


def channels_last_slice(x: Tensor, row_dims: int) -> Tensor:
    """A channels-last trajectory, sliced."""
    return trajectory_slice(x.movedim(row_dims, -1).contiguous(), row_dims).movedim(-1, row_dims)


def cropped(x: Tensor, row_dims: int) -> Tensor:
    """A window of a wider latent: no run of memory holds a row."""
    return _filled(_nan(x, (*x.shape[:-1], x.shape[-1] + 2))[..., 1:-1], x)


def interleaved(x: Tensor, row_dims: int) -> Tensor:
    """Every other number of memory: uniform strides, but not 1."""
    return _filled(_nan(x, (*x.shape, 2))[..., 0], x)


def expanded_rows(x: Tensor, row_dims: int) -> Tensor:
    """One row for all: stride 0 over rows (the values of row 0)."""
    return x[(slice(0, 1),) * row_dims].contiguous().expand(x.shape)


def expanded_latents(x: Tensor, row_dims: int) -> Tensor:
    """One number per row: stride 0 over latents (the first value of each row)."""
    return x[(slice(None),) * row_dims + (slice(0, 1),) * (x.ndim - row_dims)].contiguous().expand(x.shape)


# a row's latents lie in one run of memory here, so nothing may be copied
DENSE: dict[str, Layout] = {
    "contiguous": contiguous,
    "unaligned": unaligned,
    "trajectory_slice": trajectory_slice,
    "channels_last": channels_last,
    "reversed_latents": reversed_latents,
    "steps_first": steps_first,
    "channel_half": channel_half,
    "batch_half": batch_half,
    "channels_last_slice": channels_last_slice,
}
SCATTERED: dict[str, Layout] = {"cropped": cropped, "interleaved": interleaved}
EXPANDED: dict[str, Layout] = {"expanded_rows": expanded_rows, "expanded_latents": expanded_latents}
LAYOUTS = DENSE | SCATTERED
