"""What describes the rows of a call: the ten arguments that all training operators take, and how a caller's tensors
become them. A call's checks depend on what its tensors are, not on what they hold, so they are made once per kind."""

from __future__ import annotations

import enum
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import layout


class Form(enum.IntEnum):
    """What the first two tensors and ``drawn`` are.

    VELOCITY: ``new``/``old`` are velocities, ``drawn`` is the noise ``e`` (or None: regenerated from seed and streams),
        ``k = b/S``.
    MATCHING: ``new``/``old`` are velocities at a noised sample, ``drawn`` is the noise and ``reference`` the sample
        itself, ``e = (drawn - reference) - old`` and ``k`` is the step's.
    MEAN: ``new``/``old`` are step means, ``drawn`` is the next state ``x'``, ``k = 1/S`` and ``e = k*(x'-old)``.
    """

    VELOCITY = 0
    MEAN = 1
    MATCHING = 2


def stats_dtype(latents: Tensor) -> torch.dtype:
    """Accumulation and result dtype: float64 for float64 latents, else float32."""
    return torch.float64 if latents.dtype == torch.float64 else torch.float32


class RowSource(NamedTuple):
    """The rows of a training operator, in the order of the schemas (``ops.py``); ``csrc/arguments.h`` has its twin.

    Attributes:
        new, old, drawn, reference: latents; what the last two are says :class:`Form`.
        streams: ``[R]`` Philox streams of seeded noise, or None for consecutive ones from ``first_stream``.
        step: ``[R, 3]`` table of ``S, k, -dt``, or None where ``step_values`` has three numbers that serve all rows.
        seed: of seeded noise.
        form: of :class:`Form`.
    """

    new: Tensor
    old: Tensor
    drawn: Tensor | None
    reference: Tensor | None
    streams: Tensor | None
    step: Tensor | None
    step_values: list[float]
    seed: int
    first_stream: int
    form: int


def takes_rows(function: Callable) -> Callable:
    """An operator as the schemas have it, of a function whose first argument is a :class:`RowSource`."""
    fields = len(RowSource._fields)

    @functools.wraps(function)
    def operator(*arguments: Any) -> Any:
        return function(RowSource(*arguments[:fields]), *arguments[fields:])

    return operator


class RowPlan(NamedTuple):
    """What checking a call has found, and how its latents become rows ``[R0, R1, N]``.

    Attributes:
        shape: of all latents; the first ``row_dims`` dims are rows, ``rows`` is their shape.
        numel: latent elements per row.
        dtype: accumulation dtype.
        whole: the shape as which all latents can be viewed; None where one of them has to be permuted or copied.
        memory_order: of the latent dims of the tensor that gets the gradient, None where it is the logical one.
        order: the one in which the operators see all latents: seeded noise is defined on the logical one.
        kept: what a backend has worked out for latents like these; empty until then.
    """

    shape: torch.Size
    row_dims: int
    rows: tuple[int, ...]
    numel: int
    dtype: torch.dtype
    device: torch.device
    whole: tuple[int, int, int] | None
    memory_order: tuple[int, ...] | None
    order: tuple[int, ...] | None
    kept: list[Any]

    def to_rows(self, x: Tensor) -> Tensor:
        """``x`` as ``[R0, R1, N]``."""
        return layout.to_rows(x, self.row_dims, self.order) if self.whole is None else x.view(self.whole)

    def in_rows(self, source: RowSource) -> RowSource:
        """A source of latents in the caller's shape as the operators take it."""
        drawn, reference = source.drawn, source.reference
        return RowSource(
            self.to_rows(source.new),
            self.to_rows(source.old),
            None if drawn is None else self.to_rows(drawn),
            None if reference is None else self.to_rows(reference),
            *source[4:],
        )

    def from_rows(self, rows: Tensor) -> Tensor:
        """The inverse for a contiguous ``[R0, R1, N]``, in the memory order that the operators see."""
        return layout.from_rows(rows, self.shape, self.row_dims, self.order)

    def gradient(self, rows: Tensor) -> Tensor:
        """A ``[R0, R1, N]`` gradient in the shape and memory layout of the tensor it belongs to."""
        if self.memory_order is None:
            return rows.view(self.shape)
        grad = self.from_rows(rows)
        return grad if self.order == self.memory_order else layout.with_order(grad, self.row_dims, self.memory_order)


_PLANS: dict[tuple, RowPlan] = {}
_MOST_PLANS = 1024


def plan_of(named: Mapping[str, Tensor], rows: torch.Size | tuple[int, ...], differentiable: str) -> RowPlan:
    """Checks the latents of a call; what has been found right once is looked up.

    Args:
        named: latents by the names that messages call them; memory order is that of the first.
        rows: shape of the leading dims.
        differentiable: the only one that may require a gradient.

    Raises:
        TypeError, ValueError: as :func:`~flowdppo_fast.layout.check_latents` and ``check_no_grad``.
    """
    if torch.compiler.is_compiling():
        # shapes may be symbolic
        return _plan(named, rows, differentiable)
    parts: list[Any] = [rows, differentiable, torch.is_grad_enabled(), *named]
    try:
        for x in named.values():
            parts += (x.shape, x.stride(), x.dtype, x.device, x.requires_grad)
        key = tuple(parts)
        plan = _PLANS.get(key)
    except (AttributeError, TypeError):
        # no tensors, or symbolic sizes, which have no hash
        return _plan(named, rows, differentiable)
    if plan is None:
        plan = _plan(named, rows, differentiable)
        if len(_PLANS) >= _MOST_PLANS:
            _PLANS.clear()
        _PLANS[key] = plan
    return plan


def _plan(named: Mapping[str, Tensor], rows: torch.Size | tuple[int, ...], differentiable: str) -> RowPlan:
    first = next(iter(named))
    layout.check_latents(named, first, rows)
    layout.check_no_grad(named, differentiable)
    lead, dims = named[first], len(rows)
    memory_order = layout.latent_order(lead, dims)
    order = memory_order if "noise" in named or "prev_sample" in named else None
    whole = (math.prod(rows[:-1]), rows[-1]) if dims > 1 else (rows[0], 1)
    shape = (*whole, math.prod(lead.shape[dims:]))
    seen = not torch.compiler.is_compiling() and memory_order is None
    return RowPlan(
        lead.shape,
        dims,
        tuple(rows),
        shape[2],
        stats_dtype(lead),
        lead.device,
        shape if seen and all(_is_viewed(x, shape, dims) for x in named.values()) else None,
        memory_order,
        order,
        [],
    )


def _is_viewed(x: Tensor, shape: tuple[int, int, int], dims: int) -> bool:
    """Whether ``x.view(shape)`` is what :func:`~flowdppo_fast.layout.to_rows` makes of it."""
    try:
        rows = x.view(shape)
    except RuntimeError:
        return False
    return shape[2] == 1 or rows.stride(2) == 1
