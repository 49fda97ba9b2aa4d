"""What users say of a training row's step, as the operators take it: a table ``[R, 3]`` of ``S, k, -dt`` and no values,
or no table and three values that serve all rows."""

from __future__ import annotations

import math
from numbers import Real

import torch
from torch import Tensor

from . import layout
from .objectives import check_positive, is_number
from .samplers import SDEStep


def mean_step(
    std: float | Tensor, dt: float | Tensor | None, rows: tuple[int, ...], device: torch.device, dtype: torch.dtype
) -> tuple[Tensor | None, list[float]]:
    """``(table, values)`` of the means form; ``S`` alone is enough where ``dt`` is not needed.

    Raises:
        TypeError, ValueError: ``std`` or ``dt`` is no number or tensor, of wrong shape, device or sign.
    """
    if not isinstance(std, (torch.Tensor, int, float, Real)):
        raise TypeError(
            f"std: got {type(std).__name__} {std!r}, expected a number > 0 or a tensor that broadcasts to the rows"
        )
    if not isinstance(std, torch.Tensor):
        check_positive("std", std, " (a step without noise has no density)")
    if dt is not None and not isinstance(dt, torch.Tensor) and not (is_number(dt) and -math.inf < dt < 0.0):
        raise ValueError(f"dt: got {dt!r}, expected sigma_next - sigma < 0")
    if not isinstance(std, torch.Tensor) and not isinstance(dt, torch.Tensor):
        return None, [float(std), 1.0 / float(std), float("nan") if dt is None else -float(dt)]
    if not isinstance(std, torch.Tensor):
        std = torch.full((), std, device=device, dtype=dtype)
    column = layout.row_vector(std, "std", rows, device, dtype)
    if dt is None:
        return column[:, None], []
    if not isinstance(dt, torch.Tensor):
        dt = torch.full((), dt, device=device, dtype=dtype)
    return torch.stack((column, 1.0 / column, -layout.row_vector(dt, "dt", rows, device, dtype)), dim=1), []


def matching_step(
    weight: float | Tensor, rows: tuple[int, ...], device: torch.device, dtype: torch.dtype
) -> tuple[Tensor | None, list[float]]:
    """``(table, values)`` of the forward process: ``k = 1``, and ``S**2`` is the weight of the log-ratio.

    Raises:
        TypeError, ValueError: a weight that is no number > 0 or tensor, or of wrong shape or device.
    """
    if isinstance(weight, torch.Tensor):
        root = layout.row_vector(weight, "weight", rows, device, dtype).sqrt()
        one = torch.ones_like(root)
        return torch.stack((root, one, torch.full_like(root, math.nan)), dim=1), []
    check_positive("weight", weight)
    return None, [math.sqrt(weight), 1.0, math.nan]


def velocity_step(
    step: SDEStep, rows: tuple[int, ...], device: torch.device, dtype: torch.dtype
) -> tuple[Tensor | None, list[float]]:
    """``(table, values)`` of the velocity form.

    Raises:
        TypeError: no :class:`SDEStep`. ValueError: a step without density, or one that does not broadcast to the rows.
    """
    if isinstance(step, SDEStep) and step.checked_values is not None:
        return None, step.checked_values
    if not isinstance(step, SDEStep):
        raise TypeError(
            f"step: got {type(step).__name__}, expected an SDEStep (SDEStep.from_sigmas(sampler, sigma, sigma_next))"
        )
    if step.is_scalar:
        return None, step.row_values()
    return step.row_table(rows, device, dtype), []
