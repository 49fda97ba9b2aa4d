"""Reference backend: every operator in plain torch, on any device, exact in float64. The oracle of all tests.

All operators see canonical tensors: latents ``[R0, R1, N]`` (rows in two dims so that slices of a trajectory need no
copy; ``R = R0*R1``), last stride 1. A row's four numbers come from a table ``step`` or, when one step serves all rows,
from ``step_values``. The schemas are in ``ops.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .epilogue import LOG_SQRT_2PI, epilogue
from .noise import philox_normal
from .objectives import EpilogueOptions, RowField
from .rows import Form, RowSource, stats_dtype, takes_rows


def row_numbers(
    step: Tensor | None, step_values: list[float], form: int, rows: int, like: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """``S, k, -dt`` as ``[R]`` tensors from the table (columns in that order; a MEAN table may hold ``S`` alone)."""
    if step is None:
        std, scale, neg_dt = (like.new_full((rows,), value) for value in step_values)
    elif step.shape[1] == 1:
        std = step[:, 0]
        scale, neg_dt = 1.0 / std, torch.full_like(std, torch.nan)
    else:
        std, scale, neg_dt = step.unbind(1)
    if form == Form.MEAN:
        scale = 1.0 / std
    return std, scale, neg_dt


def row_streams(streams: Tensor | None, first_stream: int, rows: int, like: Tensor) -> Tensor:
    """``[R]`` Philox streams: the given ones, or consecutive from ``first_stream``."""
    if streams is not None:
        return streams
    return torch.arange(first_stream, first_stream + rows, dtype=torch.int64, device=like.device)


def _differences(source: RowSource) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """``u, e, w, k`` of all rows, latents flattened to ``[R, N]`` in the accumulation dtype."""
    new, old, drawn, reference, streams, step, step_values, seed, first_stream, form = source
    dtype = stats_dtype(new)
    rows, numel = new.shape[0] * new.shape[1], new.shape[2]

    def flat(x: Tensor) -> Tensor:
        return x.to(dtype).reshape(rows, numel)

    like = new.new_empty(0, dtype=dtype)
    _, scale, _ = row_numbers(step, step_values, form, rows, like)
    k = scale[:, None]
    u = k * (flat(new) - flat(old))
    if drawn is None:
        e = philox_normal(seed, row_streams(streams, first_stream, rows, new), numel).to(dtype)
    else:
        e = k * (flat(drawn) - flat(old)) if form == Form.MEAN else flat(drawn)
    if form == Form.MATCHING:
        assert reference is not None
        return u, (e - flat(reference)) - flat(old), None, k
    w = None if reference is None else k * (flat(new) - flat(reference))
    return u, e, w, k


@takes_rows
def row_stats(
    source: RowSource,
    second_moment: bool,
) -> Tensor:
    """``[4, R]``: ``P = mean(e*u)``, ``Q = mean(u*u)``, where asked ``E = mean(e*e)``, ``R = mean(w*w)`` (else 0)."""
    u, e, w, _ = _differences(source)
    p, q = (e * u).mean(1), u.square().mean(1)
    moment = e.square().mean(1) if second_moment else torch.zeros_like(p)
    apart = torch.zeros_like(p) if w is None else w.square().mean(1)
    return torch.stack((p, q, moment, apart))


@takes_rows
def row_grad(
    source: RowSource,
    coefficients: Tensor,
    upstream: Tensor,
    factor: float,
) -> Tensor:
    """``factor * upstream * (k/N) * (gP*e + 2*gQ*u + 2*gR*w)``, contiguous, in ``new``'s dtype.

    ``coefficients`` is ``[3, R]``; ``upstream`` holds one number or one per row. A row whose three coefficients are 0
    is written as zeros whatever its inputs hold.
    """
    u, e, w, k = _differences(source)
    new = source.new
    active = (coefficients != 0).any(0)
    outer = (factor / new.shape[2]) * upstream.to(u.dtype).expand(active.shape)
    grad_p, grad_q, grad_r = (outer * coefficients.to(u.dtype))[:, :, None]
    grad = grad_p * e + 2.0 * grad_q * u
    if w is not None:
        grad = grad + 2.0 * grad_r * w
    grad = torch.where(active[:, None], k * grad, torch.zeros_like(grad))
    return grad.to(new.dtype).reshape(new.shape)


@takes_rows
def policy_loss(
    source: RowSource,
    advantages: Tensor,
    row_weights: Tensor | None,
    old_log_prob: Tensor | None,
    ints: list[int],
    floats: list[float],
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean loss (0-d), row results ``[8, R]`` and summary vector of one objective (:mod:`flowdppo_fast.objectives`)."""
    second_moment = old_log_prob is not None
    stats = row_stats(*source, second_moment)
    std, scale, neg_dt = row_numbers(source.step, source.step_values, source.form, stats.shape[1], stats)
    options = EpilogueOptions.unpack(ints, floats)
    rows, summary = epilogue(
        stats, std, scale, neg_dt, advantages, row_weights, old_log_prob, source.new.shape[2], options
    )
    # a tensor of its own, so that it can be scaled in place by whoever gets it
    return summary[0].clone(), rows, summary


@takes_rows
def policy_loss_and_grad(
    source: RowSource,
    advantages: Tensor,
    row_weights: Tensor | None,
    old_log_prob: Tensor | None,
    ints: list[int],
    floats: list[float],
    factor: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`policy_loss` and the gradient of ``factor * sum(row losses)`` in one call."""
    loss, rows, summary = policy_loss(*source, advantages, row_weights, old_log_prob, ints, floats)
    grad = row_grad(*source, rows[RowField.GRAD_P :], rows.new_ones(1), factor)
    return loss, rows, summary, grad


def log_prob_loss(
    log_prob: Tensor,
    old_log_prob: Tensor,
    drift: Tensor | None,
    reference_drift: Tensor | None,
    step: Tensor | None,
    step_values: list[float],
    advantages: Tensor,
    row_weights: Tensor | None,
    ints: list[int],
    floats: list[float],
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`policy_loss` of rows whose log-probs the trainer has: the epilogue alone, on ``[R]`` vectors.

    ``drift`` and ``reference_drift`` are ``mean((mu-mu_old)**2)`` and ``mean((mu-mu_ref)**2)``, None where there are
    none (they count as 0). The gradient lines of the row results are ``dl/dlog_prob``, ``dl/dQ`` and ``dl/dR`` with
    ``Q = drift/S**2`` and ``R = reference_drift/S**2``.
    """
    std, scale, neg_dt = row_numbers(step, step_values, Form.MEAN, log_prob.shape[0], log_prob)
    zero = torch.zeros_like(log_prob)
    q = zero if drift is None else drift * scale * scale
    r = zero if reference_drift is None else reference_drift * scale * scale
    rows, summary = epilogue(
        torch.stack((zero, q, zero, r)), std, scale, neg_dt, advantages, row_weights, None, 1,
        EpilogueOptions.unpack(ints, floats), log_prob - old_log_prob,
    )  # fmt: skip
    return summary[0].clone(), rows, summary


def sde_step(
    sample: Tensor,
    velocity: Tensor,
    noise: Tensor | None,
    prev_sample: Tensor | None,
    streams: Tensor | None,
    step: Tensor | None,
    step_values: list[float],
    seed: int,
    first_stream: int,
    dtype: torch.dtype,
    with_mean: bool,
    with_log_prob: bool,
    unnormalized: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """One sampler step ``mu = a*x + b*v``, ``x' = mu + S*e``.

    ``step`` is a ``[R, 3]`` table of ``a, b, S``. Noise comes from ``noise``, from ``seed`` and ``streams``, or, when
    ``prev_sample`` is given, is what was drawn then: ``e = (x'-mu)/S``. Returns ``(x', mu, log_prob)``: ``x'`` in
    ``dtype`` (empty when it was given), ``mu`` in the accumulation dtype (empty unless asked for) and the mean-reduced
    log-prob ``[R]`` (empty unless asked for): ``-mean(e*e)/2 - log S - log(2*pi)/2``, or ``-S**2 * mean(e*e)``
    unnormalized.
    """
    compute = stats_dtype(sample)
    rows, numel = sample.shape[0] * sample.shape[1], sample.shape[2]
    like = sample.new_empty(0, dtype=compute)

    def flat(x: Tensor) -> Tensor:
        return x.to(compute).reshape(rows, numel)

    if step is None:
        a, b, std = (like.new_full((rows,), value) for value in step_values)
    else:
        a, b, std = step.unbind(1)
    mean = a[:, None] * flat(sample) + b[:, None] * flat(velocity)
    next_sample = sample.new_empty(0, dtype=dtype)
    if prev_sample is not None:
        e = (flat(prev_sample) - mean) / std[:, None]
    else:
        e = (
            flat(noise)
            if noise is not None
            else philox_normal(seed, row_streams(streams, first_stream, rows, sample), numel).to(compute)
        )
        # where(): a step without noise keeps its mean even if the noise tensor holds nothing usable
        next_sample = torch.where(std[:, None] == 0, mean, mean + std[:, None] * e).to(dtype).reshape(sample.shape)
    log_prob = like
    if with_log_prob:
        moment = e.square().mean(1)
        log_prob = -(std**2) * moment if unnormalized else -0.5 * moment - torch.log(std) - LOG_SQRT_2PI
    return next_sample, mean.reshape(sample.shape) if with_mean else like, log_prob
