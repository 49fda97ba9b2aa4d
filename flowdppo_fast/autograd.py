"""Autograd around the operators: gradients flow into the new latents only, through one backward kernel, or into a
trainer's own log-probs and drifts."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .backend import is_traced, launches_itself, operator, triton_kernels
from .layout import to_rows
from .objectives import RowField
from .rows import Form, RowPlan, RowSource


def _first_order(backward: Callable) -> Callable:
    """A backward that cannot be differentiated again, like ``once_differentiable``, and costs nothing where nobody
    asks for that (``create_graph``)."""
    refuses = once_differentiable(backward)

    @functools.wraps(backward)
    def either(ctx, *grads):
        return (refuses if torch.is_grad_enabled() else backward)(ctx, *grads)

    return either


def _save(ctx: Any, *tensors: Tensor | None) -> None:
    """``ctx.save_for_backward``, which refuses tensors of inference mode: these take no part in autograd, and are kept
    beside."""
    aside: dict[int, Tensor] = {}
    if not is_traced():
        # a loop: on a GPU's host every call of Python counts
        for place, x in enumerate(tensors):
            if x is not None and x.is_inference():
                aside[place] = x
    ctx.aside = aside
    if aside:
        tensors = tuple(None if place in aside else x for place, x in enumerate(tensors))
    ctx.save_for_backward(*tensors)


def _saved(ctx: Any) -> tuple:
    """What :func:`_save` was given."""
    saved = ctx.saved_tensors
    return tuple(ctx.aside.get(place, x) for place, x in enumerate(saved)) if ctx.aside else saved


class RowCall(NamedTuple):
    """Rows on their way through autograd; what it is to see of ``rows.new`` goes beside them.

    Attributes:
        rows: as the operators take them, detached.
        plan: what is known of the latents.
        backend: who computes.
    """

    rows: RowSource
    plan: RowPlan
    backend: str


class LossCall(NamedTuple):
    """A :class:`RowCall` and what an objective takes besides, in the schemas' order; C++'s ``ObjectiveArguments``.

    Attributes:
        geometry: of Triton's kernels, which then take the rows as the caller has them; else None.
        advantages, row_weights, old_log_prob: ``[R]``.
        ints, floats: of :class:`~flowdppo_fast.objectives.EpilogueOptions`.
        reduction: over rows.
        in_forward: whether the gradient is made with the loss, from the same reading of the latents.
        wanted: whether it is also a result.
    """

    rows: RowSource
    plan: RowPlan
    backend: str
    geometry: Any
    advantages: Tensor
    row_weights: Tensor | None
    old_log_prob: Tensor | None
    ints: list[int]
    floats: list[float]
    reduction: str
    in_forward: bool
    wanted: bool


def _row_grad(call: RowCall | LossCall, rows: RowSource, lines: Tensor, upstream: Tensor, factor: float) -> Tensor:
    """The gradient in the shape of the tensor it belongs to; the last three of ``lines`` are the coefficients."""
    row_grad = operator("row_grad", call.backend, call.plan.device.type)
    return call.plan.gradient(row_grad(*rows, lines[-3:], upstream, factor))


def policy_loss(new: Tensor, call: LossCall) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """``(loss, rows, summary, grad)`` of an objective; ``loss`` is differentiable in ``new``.

    ``loss`` is the mean (0-d), the sum (0-d) or the vector of row losses ``[R]``; ``grad`` is None unless it is wanted.
    """
    inputs: list[Any]
    rows, plan, backend, geometry, *inputs, reduction, in_forward, wanted = call
    # by how many are kept is known when the loss is
    at_once = in_forward and reduction != "kept"
    # autograd sees the loss alone, which is what a call costs it
    grad = None
    if at_once:
        count = call.advantages.shape[0]
        inputs.append(1.0 / count if reduction == "mean" and count > 0 else 1.0)
    if geometry is not None:
        kernels = triton_kernels()
        if at_once:
            loss, results, summary, grad = kernels.launch_policy_loss_and_grad(rows, geometry, plan.shape, *inputs)
        else:
            loss, results, summary = kernels.launch_policy_loss(rows, geometry, *inputs)
    elif at_once:
        one_pass = operator("policy_loss_and_grad", backend, plan.device.type)
        loss, results, summary, grad = one_pass(*rows, *inputs)
        grad = plan.gradient(grad)
    else:
        loss, results, summary = operator("policy_loss", backend, plan.device.type)(*rows, *inputs)
    if reduction == "none":
        loss = results[RowField.LOSS].clone()
    elif reduction == "sum":
        loss = results[RowField.LOSS].sum()
    elif reduction == "kept":
        share = _share_of_kept(results)
        loss = results[RowField.LOSS].sum() * share
        if in_forward and geometry is not None:
            grad = kernels.launch_gradient(rows, geometry, results, share, 1.0, plan.shape)
        elif in_forward:
            grad = _row_grad(call, rows, results, share, 1.0)
    if new.requires_grad and torch.is_grad_enabled():
        loss = PolicyLoss.apply(new, call, _Made(loss, results, grad))
    return loss, results, summary, grad if wanted else None


class _Made(NamedTuple):
    """What of a loss is known before autograd sees it."""

    loss: Tensor
    results: Tensor
    grad: Tensor | None


class PolicyLoss(torch.autograd.Function):
    """The loss that is there already, differentiable in ``new``."""

    @staticmethod
    def forward(ctx, new, call: LossCall, made: _Made):
        loss, results, grad = made
        if grad is not None:
            ctx.save_for_backward(grad)
        else:
            _save(ctx, new, *call.rows[1:6], results)
        ctx.call = call
        return loss

    @staticmethod
    @_first_order
    def backward(ctx, grad_loss):
        call = ctx.call
        if call.in_forward:
            # torch may take what it is handed for the .grad of a leaf, and add to it later
            kept = call.wanted or torch._C._autograd._get_current_graph_task_keep_graph()
            return _scaled(ctx.saved_tensors[0], grad_loss, kept), None, None
        saved = _saved(ctx)
        results, factor = saved[-1], 1.0
        count = results.shape[1]
        if call.reduction == "kept":
            grad_loss = grad_loss * _share_of_kept(results)
        elif call.reduction == "mean" and count > 0:
            if torch.compiler.is_compiling():
                # an operator's float argument would make the number of rows a constant of the graph
                grad_loss = grad_loss / count
            else:
                factor = 1.0 / count
        rows, plan = RowSource(*saved[:6], *call.rows[6:]), call.plan
        if call.geometry is not None:
            if launches_itself(call.backend, plan.device.type):
                launch = triton_kernels().launch_gradient
                return launch(rows, call.geometry, results, grad_loss, factor, plan.shape), None, None
            rows = plan.in_rows(rows)
        else:
            # not kept as rows: that may be a copy
            rows = rows._replace(new=plan.to_rows(rows.new))
        return _row_grad(call, rows, results, grad_loss, factor), None, None


def _share_of_kept(results: Tensor) -> Tensor:
    """One over the number of kept rows, or 1 if there are none."""
    return 1.0 / results[RowField.KEPT].sum().clamp_min(1.0)


def _scaled(grad: Tensor, upstream: Tensor, kept: bool) -> Tensor:
    """``grad * upstream``, a new tensor if ``kept``; zero where ``grad`` is: dropped rows have no gradient, whatever
    comes from above."""
    if upstream.device.type != "cpu" or is_traced():
        # reading it would wait for the device
        return torch.where(grad == 0, grad, grad * upstream)
    # no operator that anybody could take for a synchronisation
    scale = float(cast(Any, upstream.tolist()))
    if scale == 1.0:
        return grad.clone() if kept else grad
    scaled = grad * scale
    return scaled if math.isfinite(scale) else torch.where(grad == 0, grad, scaled)


class LogProbCall(NamedTuple):
    """What goes beside a trainer's own log-probs and drifts.

    Attributes:
        old_log_prob, advantages, row_weights: ``[R]``.
        step, step_values: as of :class:`~flowdppo_fast.rows.RowSource`.
        ints, floats: of :class:`~flowdppo_fast.objectives.EpilogueOptions`.
        backend: who computes.
    """

    old_log_prob: Tensor
    step: Tensor | None
    step_values: list[float]
    advantages: Tensor
    row_weights: Tensor | None
    ints: list[int]
    floats: list[float]
    backend: str


class LogProbLoss(torch.autograd.Function):
    """``(loss, rows, summary)`` of an objective on rows that have log-probs and drifts in place of latents.

    All are ``[R]`` vectors; the mean loss (0-d) is differentiable in the first three.
    """

    @staticmethod
    def forward(ctx, log_prob, drift, reference_drift, call: LogProbCall):
        old_log_prob, *rest, backend = call
        loss, rows, summary = operator("log_prob_loss", backend, log_prob.device.type)(
            log_prob, old_log_prob, drift, reference_drift, *rest
        )
        _save(ctx, rows, call.step)
        ctx.step_values = call.step_values
        ctx.mark_non_differentiable(rows, summary)
        ctx.set_materialize_grads(False)
        return loss, rows, summary

    @staticmethod
    @_first_order
    def backward(ctx, grad_loss, grad_rows, grad_summary):
        if grad_loss is None:
            return (None,) * 4
        rows, step = _saved(ctx)
        std = ctx.step_values[0] if step is None else step[:, 0]
        upstream = grad_loss / rows.shape[1]
        grads = [
            rows[field] * upstream if wanted else None
            for field, wanted in zip((RowField.GRAD_P, RowField.GRAD_Q, RowField.GRAD_R), ctx.needs_input_grad)
        ]
        # the kernels' Q and R are drifts over S**2
        through_drifts = [None if grad is None else grad / std**2 for grad in grads[1:]]
        return grads[0], *through_drifts, None


class RowStatistics(torch.autograd.Function):
    """``[4, R]`` of ``P, Q, E, R``, differentiable in ``new`` through ``P``, ``Q`` and ``R``."""

    @staticmethod
    def forward(ctx, new, call: RowCall, second_moment: bool):
        rows, plan, backend = call
        stats = operator("row_stats", backend, plan.device.type)(*rows, second_moment)
        _save(ctx, *rows[:6])
        ctx.call = call
        return stats

    @staticmethod
    @_first_order
    def backward(ctx, grad_stats):
        # E does not depend on the new policy
        coefficients = torch.cat((grad_stats[:2], grad_stats[3:]))
        rows = RowSource(*_saved(ctx), *ctx.call.rows[6:])
        return _row_grad(ctx.call, rows, coefficients, grad_stats.new_ones(1), 1.0), None, None


class SamplerStep(torch.autograd.Function):
    """``(x', mu, log_prob)`` of a sampler step, ``mu`` and ``log_prob`` differentiable in ``velocity``.

    The next state is an action, a constant to the gradient whether it was given or just drawn: ``dmu/dv = b`` and
    ``dlog_prob/dmu = e/(N*S)``. That is the row gradient at ``new == old`` with ``gP = dlog_prob``: in the VELOCITY
    form where ``e`` was drawn, in the MEAN form where it follows from a given state.
    """

    @staticmethod
    def forward(
        ctx, velocity, sample, noise, prev_sample, streams, step, step_values, seed, first_stream,
        plan: RowPlan, backend: str, dtype, flags,
    ):  # fmt: skip
        with_mean, with_log_prob, unnormalized = flags
        centre = plan.to_rows(velocity)
        drawn = None if noise is None else plan.to_rows(noise)
        given = None if prev_sample is None else plan.to_rows(prev_sample)
        scores_given = with_log_prob and given is not None and ctx.needs_input_grad[0]
        next_sample, mean, log_prob = operator("sde_step", backend, velocity.device.type)(
            plan.to_rows(sample), centre, drawn, given, streams, step, step_values, seed, first_stream,
            dtype, with_mean or scores_given, with_log_prob, unnormalized,
        )  # fmt: skip
        form = Form.VELOCITY
        if given is not None:
            form, centre, drawn = Form.MEAN, mean, given
        _save(ctx, centre, drawn, streams, step)
        ctx.numbers = (step_values, seed, first_stream, int(form))
        ctx.plan, ctx.backend, ctx.dtype, ctx.unnormalized = plan, backend, velocity.dtype, unnormalized
        ctx.set_materialize_grads(False)
        if given is None:
            next_sample = plan.from_rows(next_sample)
        ctx.mark_non_differentiable(next_sample)
        if with_mean or scores_given:
            mean = plan.from_rows(mean)
        return next_sample, mean, log_prob

    @staticmethod
    @_first_order
    def backward(ctx, grad_next, grad_mean, grad_log_prob):
        nothing = (None,) * 12
        like = grad_mean if grad_log_prob is None else grad_log_prob
        if like is None:
            return None, *nothing
        centre, draw, streams, step = _saved(ctx)
        step_values, seed, first_stream, form = ctx.numbers
        rows = math.prod(ctx.plan.rows)
        if step is None:
            _, b, std = (like.new_full((rows,), value) for value in step_values)
        else:
            _, b, std = step.unbind(1)
        grad: Tensor | None = None
        if grad_log_prob is not None:
            grad_p = grad_log_prob * (2.0 * std**2 if ctx.unnormalized else 1.0)
            if form == Form.MEAN:
                grad_p = grad_p * b
            zeros = torch.zeros_like(grad_p)
            grad = operator("row_grad", ctx.backend, like.device.type)(
                centre, centre, draw, None, streams, torch.stack((std, b / std, zeros), dim=1),
                [], seed, first_stream, form, torch.stack((grad_p, zeros, zeros)), grad_p.new_ones(1), 1.0,
            )  # fmt: skip
        if grad_mean is not None:
            latents = to_rows(grad_mean, ctx.plan.row_dims, ctx.plan.order)
            through_mean = b.reshape(*latents.shape[:2], 1) * latents
            grad = through_mean if grad is None else grad + through_mean
        assert grad is not None
        return ctx.plan.from_rows(grad.to(ctx.dtype)), *nothing
