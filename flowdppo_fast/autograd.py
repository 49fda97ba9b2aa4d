"""Autograd around the operators: gradients flow into the new latents only, through one backward kernel, or into a
trainer's own log-probs and drifts."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .backend import operator
from .layout import from_rows, latent_order, to_rows, with_order
from .objectives import RowField
from .reference import Form


class RowSource(NamedTuple):
    """What describes the rows besides tensors: the step's numbers, the noise's seed, the form, and who computes."""

    backend: str
    form: int
    row_dims: int
    step_values: list[float]
    seed: int
    first_stream: int


class _Canonical(NamedTuple):
    """Latents as ``[R0, R1, N]``, the memory order they are in, and that of the original ``new``."""

    new: Tensor
    old: Tensor
    noise: Tensor | None
    reference: Tensor | None
    order: tuple[int, ...] | None
    layout: tuple[int, ...] | None


def gradient_like(
    rows: Tensor,
    shape: torch.Size,
    row_dims: int,
    order: tuple[int, ...] | None,
    layout: tuple[int, ...] | None,
) -> Tensor:
    """A ``[R0, R1, N]`` gradient in the shape and memory layout of the tensor it belongs to."""
    grad = from_rows(rows, shape, row_dims, order)
    return grad if order == layout else with_order(grad, row_dims, layout)


def canonical(
    new: Tensor, old: Tensor, noise: Tensor | None, reference: Tensor | None, source: RowSource
) -> _Canonical:
    """All latents in the memory order of ``new``; seeded noise is defined on logical order, so there it is kept."""
    dims = source.row_dims
    layout = latent_order(new, dims)
    order = None if noise is None else layout
    return _Canonical(
        to_rows(new, dims, order),
        to_rows(old, dims, order),
        None if noise is None else to_rows(noise, dims, order),
        None if reference is None else to_rows(reference, dims, order),
        order,
        layout,
    )


class PolicyLoss(torch.autograd.Function):
    """``(loss, rows, summary)`` of an objective; ``loss`` is differentiable in ``new``.

    ``loss`` is the mean (0-d), the sum (0-d) or the vector of row losses ``[R]``, by ``reduction``.
    """

    @staticmethod
    def forward(
        ctx, new, old, noise, reference, streams, step, advantages, row_weights, old_log_prob,
        source, ints, floats, reduction,
    ):  # fmt: skip
        c = canonical(new, old, noise, reference, source)
        loss, rows, summary = operator("policy_loss", source.backend, new.device.type)(
            c.new, c.old, c.noise, c.reference, streams, step,
            source.step_values, source.seed, source.first_stream, source.form,
            advantages, row_weights, old_log_prob, ints, floats,
        )  # fmt: skip
        if reduction == "none":
            loss = rows[RowField.LOSS].clone()
        elif reduction == "sum":
            loss = rows[RowField.LOSS].sum()
        ctx.save_for_backward(c.new, c.old, c.noise, c.reference, streams, step, rows)
        ctx.source, ctx.shape, ctx.orders = source, new.shape, (c.order, c.layout)
        ctx.averages = reduction == "mean" and rows.shape[1] > 0
        ctx.mark_non_differentiable(rows, summary)
        ctx.set_materialize_grads(False)
        return loss, rows, summary

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, grad_rows, grad_summary):
        nothing = (None,) * 12
        if grad_loss is None:
            return None, *nothing
        new, old, noise, reference, streams, step, rows = ctx.saved_tensors
        source, upstream, factor = ctx.source, grad_loss.reshape(-1), 1.0
        if ctx.averages and torch.compiler.is_compiling():
            # an operator's float argument would make the number of rows a constant of the graph
            upstream = upstream / rows.shape[1]
        elif ctx.averages:
            factor = 1.0 / rows.shape[1]
        grad = operator("row_grad", source.backend, new.device.type)(
            new, old, noise, reference, streams, step,
            source.step_values, source.seed, source.first_stream, source.form,
            rows[RowField.GRAD_P :], upstream, factor,
        )  # fmt: skip
        return gradient_like(grad, ctx.shape, source.row_dims, *ctx.orders), *nothing


class LogProbLoss(torch.autograd.Function):
    """``(loss, rows, summary)`` of an objective on rows that have log-probs and drifts in place of latents.

    All are ``[R]`` vectors; the mean loss (0-d) is differentiable in the first three.
    """

    @staticmethod
    def forward(
        ctx, log_prob, drift, reference_drift, old_log_prob, step, step_values, advantages, row_weights,
        backend, ints, floats,
    ):  # fmt: skip
        loss, rows, summary = operator("log_prob_loss", backend, log_prob.device.type)(
            log_prob, old_log_prob, drift, reference_drift, step, step_values, advantages, row_weights, ints, floats
        )
        ctx.save_for_backward(rows, step)
        ctx.step_values = step_values
        ctx.mark_non_differentiable(rows, summary)
        ctx.set_materialize_grads(False)
        return loss, rows, summary

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, grad_rows, grad_summary):
        if grad_loss is None:
            return (None,) * 11
        rows, step = ctx.saved_tensors
        std = ctx.step_values[0] if step is None else step[:, 0]
        upstream = grad_loss / rows.shape[1]
        grads = [
            rows[field] * upstream if wanted else None
            for field, wanted in zip((RowField.GRAD_P, RowField.GRAD_Q, RowField.GRAD_R), ctx.needs_input_grad)
        ]
        # the kernels' Q and R are drifts over S**2
        through_drifts = [None if grad is None else grad / std**2 for grad in grads[1:]]
        return grads[0], *through_drifts, *(None,) * 8


class RowStatistics(torch.autograd.Function):
    """``[4, R]`` of ``P, Q, E, R``, differentiable in ``new`` through ``P``, ``Q`` and ``R``."""

    @staticmethod
    def forward(ctx, new, old, noise, reference, streams, step, source, second_moment):
        c = canonical(new, old, noise, reference, source)
        stats = operator("row_stats", source.backend, new.device.type)(
            c.new, c.old, c.noise, c.reference, streams, step,
            source.step_values, source.seed, source.first_stream, source.form, second_moment,
        )  # fmt: skip
        ctx.save_for_backward(c.new, c.old, c.noise, c.reference, streams, step)
        ctx.source, ctx.shape, ctx.orders = source, new.shape, (c.order, c.layout)
        return stats

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_stats):
        new, old, noise, reference, streams, step = ctx.saved_tensors
        source = ctx.source
        # E does not depend on the new policy
        coefficients = torch.cat((grad_stats[:2], grad_stats[3:]))
        grad = operator("row_grad", source.backend, new.device.type)(
            new, old, noise, reference, streams, step,
            source.step_values, source.seed, source.first_stream, source.form,
            coefficients, grad_stats.new_ones(1), 1.0,
        )  # fmt: skip
        return gradient_like(grad, ctx.shape, source.row_dims, *ctx.orders), *(None,) * 7


class SamplerStep(torch.autograd.Function):
    """``(x', mu, log_prob)`` of a sampler step, ``mu`` and ``log_prob`` differentiable in ``velocity``.

    The next state is an action, a constant to the gradient whether it was given or just drawn: ``dmu/dv = b`` and
    ``dlog_prob/dmu = e/(N*S)``. That is the row gradient at ``new == old`` with ``gP = dlog_prob``: in the VELOCITY
    form where ``e`` was drawn, in the MEAN form where it follows from a given state.
    """

    @staticmethod
    def forward(ctx, velocity, sample, noise, prev_sample, streams, step, source, dtype, flags):
        with_mean, with_log_prob, unnormalized = flags
        dims = source.row_dims
        order = latent_order(sample, dims) if noise is not None or prev_sample is not None else None
        drift = to_rows(velocity, dims, order)
        drawn = None if noise is None else to_rows(noise, dims, order)
        given = None if prev_sample is None else to_rows(prev_sample, dims, order)
        scores_given = with_log_prob and given is not None and ctx.needs_input_grad[0]
        next_sample, mean, log_prob = operator("sde_step", source.backend, velocity.device.type)(
            to_rows(sample, dims, order), drift, drawn, given, streams, step,
            source.step_values, source.seed, source.first_stream,
            dtype, with_mean or scores_given, with_log_prob, unnormalized,
        )  # fmt: skip
        ctx.save_for_backward(drift if given is None else mean, drawn if given is None else given, streams, step)
        ctx.form = Form.VELOCITY if given is None else Form.MEAN
        ctx.source, ctx.order, ctx.shape, ctx.dtype = source, order, velocity.shape, velocity.dtype
        ctx.unnormalized = unnormalized
        ctx.set_materialize_grads(False)
        if given is None:
            next_sample = from_rows(next_sample, velocity.shape, dims, order)
        ctx.mark_non_differentiable(next_sample)
        if with_mean or scores_given:
            mean = from_rows(mean, velocity.shape, dims, order)
        return next_sample, mean, log_prob

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_next, grad_mean, grad_log_prob):
        centre, draw, streams, step = ctx.saved_tensors
        source = ctx.source
        like = grad_mean if grad_log_prob is None else grad_log_prob
        if like is None:
            return (None,) * 9
        rows = math.prod(ctx.shape[: source.row_dims])
        if step is None:
            _, b, std = (like.new_full((rows,), value) for value in source.step_values)
        else:
            _, b, std = step.unbind(1)
        grad: Tensor | None = None
        if grad_log_prob is not None:
            grad_p = grad_log_prob * (2.0 * std**2 if ctx.unnormalized else 1.0)
            if ctx.form == Form.MEAN:
                grad_p = grad_p * b
            zeros = torch.zeros_like(grad_p)
            grad = operator("row_grad", source.backend, like.device.type)(
                centre, centre, draw, None, streams, torch.stack((std, b / std, zeros), dim=1),
                [], source.seed, source.first_stream, ctx.form,
                torch.stack((grad_p, zeros, zeros)), grad_p.new_ones(1), 1.0,
            )  # fmt: skip
        if grad_mean is not None:
            latents = to_rows(grad_mean, source.row_dims, ctx.order)
            through_mean = b.reshape(*latents.shape[:2], 1) * latents
            grad = through_mean if grad is None else grad + through_mean
        assert grad is not None
        return from_rows(grad.to(ctx.dtype), ctx.shape, source.row_dims, ctx.order), *(None,) * 8
