"""How far a result may be from the exact one. One derivation, used by every numeric test.

The yardstick is what trainers compute today: the textbook formula, eager, in float32 (float64 for float64 inputs), on
the same inputs. Its error against the float64 answer is measured in the same test, not assumed. A fused backend sums
the same N numbers in another order and skips the cancellation of two log-probs, so it has no excuse to be worse than
that; twice the eager error allows for errors of opposite sign. Eager can also be exact by luck, hence a few ulp of the
accumulation dtype. Ulp of what: of the largest entry, times the condition of the ratio. An error of the log-ratio is a
relative error of the ratio, of the loss and of the gradient, and the log-ratio is a sum of terms of size C (with
``old_log_prob`` C is a whole log-prob, which is what that option costs), so the condition is max(1, C). A result stored
in a narrower dtype is rounded once more: half an ulp, at most ``eps * |exact|`` per element, or half the smallest
subnormal where that is larger.

    |actual - exact| <= 2*max|eager - exact| + ULPS*eps(accumulation)*max(1, C)*max|exact| + rounding(output)

A scalar that summarises rows is held to the errors and sizes of its rows, which do not cancel by luck.

Sums of N products have the direct bound of blocked summation, used where no eager counterpart is wanted: blocks of at
least 8 lanes leave error growth of a random walk, below ``(8 + 2*log2(N)) * eps * mean|terms|``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

ULPS = 8


def smallest_subnormal(dtype: torch.dtype) -> float:
    """The spacing of numbers near zero."""
    info = torch.finfo(dtype)
    return info.tiny * info.eps


def eager_bound(exact: Tensor, eager: Tensor, compute: torch.dtype, condition: float = 1.0) -> float:
    """The part of the bound that is the same for all elements: eager's worst error, and ulps of the largest element."""
    finite = torch.isfinite(exact)
    if not finite.any():
        return 0.0
    exact, eager = exact[finite].double(), eager[finite].double()
    worst = (eager - exact).abs().max() + 0.5 * ULPS * torch.finfo(compute).eps * condition * exact.abs().max()
    return 2.0 * float(worst)


def check_within(name: str, actual: Tensor, exact: Tensor, slack: float, compute: torch.dtype) -> None:
    """Asserts ``|actual - exact| <= slack + rounding(output)``; non-finite numbers have to agree in kind and place."""
    assert actual.shape == exact.shape, f"{name}: shape {tuple(actual.shape)} for {tuple(exact.shape)}"
    result, exact = actual.detach().double(), exact.double()
    finite = torch.isfinite(exact)
    assert torch.equal(torch.isnan(result), torch.isnan(exact)), name
    assert torch.equal(torch.nan_to_num(result[~finite]), torch.nan_to_num(exact[~finite])), name
    result, exact = result[finite], exact[finite]
    if exact.numel() == 0:
        return
    bound = torch.full_like(exact, slack)
    if actual.dtype != compute:
        bound += torch.finfo(actual.dtype).eps * exact.abs() + smallest_subnormal(actual.dtype)
    error = (result - exact).abs()
    # a NaN compares false and is off
    off = ~(error <= bound)
    assert not off.any(), (
        f"{name}: {int(off.sum())} of {error.numel()} off, worst by {float(error[off].max()):.3e} "
        f"where {float(bound[off].min()):.3e} is allowed"
    )


def largest_finite(x: Tensor) -> float:
    """The largest absolute value that is finite; 0 if there is none."""
    return float(x[torch.isfinite(x)].abs().max()) if torch.isfinite(x).any() else 0.0


def check_float64(name: str, actual: Tensor, expected: Tensor, scale: float = 1.0) -> None:
    """Two float64 computations of one formula: a few hundred roundings at the size of what was summed on the way."""
    assert actual.dtype == torch.float64, f"{name}: got {actual.dtype}"
    assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)} for {tuple(expected.shape)}"
    if expected.numel() == 0:
        return
    size = max(float(expected.abs().max()), 1e-3)
    bound = 512 * torch.finfo(torch.float64).eps * size * scale
    error = (actual.detach() - expected).abs()
    assert bool((error <= bound).all()), f"{name}: off by {float(error.max()):.3e}, allowed {bound:.1e}"


def sum_bound(terms: Tensor, dtype: torch.dtype) -> Tensor:
    """Bound on the error of a mean over the last dim computed in ``dtype`` (float64 ``terms``)."""
    length = terms.shape[-1]
    return (8 + 2 * math.log2(length)) * torch.finfo(dtype).eps * terms.abs().mean(-1)
