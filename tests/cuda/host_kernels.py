"""The operators of ``ops.py`` computed by the CUDA kernels on the host layer, as the library or a test plans them."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from host_build import HOST, compiled, kernel_sources, linked, objects_of
from host_layer import Layer
from torch import Tensor

from flowdppo_fast.objectives import SUMMARY, RowField

KINDS = ("statistics", "objective", "gradient", "step", "single_pass", "log_prob")
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
I64, U64, F32, POINTER = ctypes.c_int64, ctypes.c_uint64, ctypes.c_float, ctypes.c_void_p


class Latents(ctypes.Structure):
    _fields_ = (("data", POINTER), ("dtype", I64), ("stride0", I64), ("stride1", I64))


class Source(ctypes.Structure):
    _fields_ = (
        ("outer", I64), ("inner", I64), ("numel", I64), ("form", I64), ("latents", Latents * 4),
        ("streams", POINTER), ("seed", U64), ("first_stream", I64),
        ("table", POINTER), ("columns", I64), ("values", F32 * 4),
    )  # fmt: skip


class Objective(ctypes.Structure):
    _fields_ = (
        ("advantages", POINTER), ("row_weights", POINTER), ("old_log_prob", POINTER),
        ("log_prob", POINTER), ("drift", POINTER), ("reference_drift", POINTER),
        ("ints", I64 * 6), ("floats", ctypes.c_double * 5),
        ("loss", POINTER), ("rows", POINTER), ("summary", POINTER),
    )  # fmt: skip


class Step(ctypes.Structure):
    _fields_ = (("unnormalized", I64), ("next_dtype", I64), ("next", POINTER), ("mean", POINTER), ("log_prob", POINTER))


class Work(ctypes.Structure):
    _fields_ = (
        ("rows", I64), ("numel", I64), ("dtypes", I64 * 4), ("has_noise", I64), ("has_reference", I64),
        ("aligned", I64), ("couples_rows", I64),
    )  # fmt: skip


class Limits(ctypes.Structure):
    _fields_ = (("processors", I64), ("shared_per_block", I64), ("max_cluster", I64))


class _Plan(ctypes.Structure):
    _fields_ = tuple(
        (name, I64)
        for name in (
            "possible", "blocks", "threads", "cluster", "shared_bytes", "splits", "elements", "slots", "groups",
            "per_thread", "holds_noise", "scratch_bytes",
        )
    )  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """How a launch is cut; see ``plan.h``."""

    possible: bool
    blocks: int
    threads: int
    cluster: int
    shared_bytes: int
    splits: int
    elements: int
    slots: int
    groups: int
    per_thread: int
    holds_noise: bool
    scratch_bytes: int

    def raw(self) -> _Plan:
        return _Plan(*(int(getattr(self, name)) for name, _ in _Plan._fields_))


class Constants(ctypes.Structure):
    _fields_ = (("stream_threads", I64), ("holding_threads", I64), ("reduce_bytes", I64), ("slot_bytes", I64))


class Wish(ctypes.Structure):
    _fields_ = (("threads", I64), ("groups", I64), ("cluster", I64))


# what the kernels are planned for where a test does not care: a GPU with clusters
H100 = Limits(132, 232448, 8)
# the library's plan, or blocks so small that latents of a test's size have several splits or blocks of a cluster
LIBRARY, SMALL = Wish(0, 0, 0), Wish(64, 1, 2)


class Kernels(Layer):
    """The kernels, their plans, and the workspace that calls share."""

    def __init__(self, path) -> None:
        super().__init__(path)
        self.library.api_plan.restype = _Plan
        for name in ("api_describe", "api_describe_step"):
            getattr(self.library, name).restype = Work
        for name in ("api_group", "api_pieces", "api_couples_rows", "api_ticket_count"):
            getattr(self.library, name).restype = I64
        self.library.api_constants.restype = Constants
        self._tickets = torch.zeros(0, dtype=torch.int32)
        self._scratch = torch.zeros(0, dtype=torch.float64)

    def plan(self, work: Work, kind: str, limits: Limits = H100, wish: Wish = LIBRARY) -> Plan:
        raw = self.library.api_plan(
            ctypes.byref(work), I64(KINDS.index(kind)), ctypes.byref(limits), ctypes.byref(wish)
        )
        values = {name: getattr(raw, name) for name, _ in _Plan._fields_}
        flags = {name: bool(values[name]) for name in ("possible", "holds_noise")}
        return Plan(**{**values, **flags})

    def group(self, work: Work) -> int:
        """Elements that a thread takes at once."""
        return self.library.api_group(ctypes.byref(work))

    def workspace(self, rows: int, scratch_bytes: int) -> tuple[Tensor, Tensor]:
        """Zeroed tickets, kept from call to call, and scratch memory full of what the last call left."""
        tickets, doubles = self.library.api_ticket_count(I64(rows)), (scratch_bytes + 7) // 8
        if self._tickets.numel() < tickets:
            self._tickets = torch.zeros(tickets, dtype=torch.int32)
        if self._scratch.numel() < doubles:
            self._scratch = torch.full((doubles,), torch.nan, dtype=torch.float64)
        for x in (self._tickets, self._scratch):
            self.library.host_buffer(x.data_ptr(), x.numel() * x.element_size(), b"w")
        return self._tickets, self._scratch


@functools.cache
def kernels() -> Kernels:
    """The kernels on fibers, as compiled for these tests."""
    objects = [*objects_of(kernel_sources()), compiled(HOST / "kernels_api.cpp")]
    return Kernels(linked(objects, "so"))


def latents_of(tensor: Tensor | None) -> Latents:
    if tensor is None:
        return Latents()
    return Latents(tensor.data_ptr(), DTYPES[tensor.dtype], tensor.stride(0), tensor.stride(1))


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


class HostBackend:
    """``reference.py``'s functions, by the kernels.

    ``wish`` says how launches are cut; ``used`` are the plans of the last call, ``loaded`` the bytes that its last
    launch took of each of the four latents in pieces of 16.
    """

    def __init__(self, wish: Wish = SMALL, limits: Limits = H100) -> None:
        self.kernels = kernels()
        self.wish, self.limits = wish, limits
        # latents are copied between margins of poison
        self.guards = True
        self.used: list[Plan] = []
        self.loaded: list[int] = []
        self.launches = 0

    def _source(self, latents, streams, step, step_values, seed, first_stream, form) -> Source:
        self.kernels.reset()
        self.used = []
        take = self.kernels.buffer if self.guards else self.kernels.as_it_is
        guarded = [x if x is None else take(x) for x in latents]
        streams, step = (None if x is None else self.kernels.buffer(x) for x in (streams, step))
        outer, inner, numel = latents[0].shape
        source = Source(outer, inner, numel, form, (Latents * 4)(*map(latents_of, guarded)))
        source.streams, source.seed, source.first_stream = _pointer(streams), seed & (2**64 - 1), first_stream
        source.table, source.columns = _pointer(step), 0 if step is None else step.shape[1]
        source.values[:3] = [0.0] * 3 if step is not None else step_values
        self._latents = guarded
        # what is only pointed to has to live as long as the source
        source.kept = [guarded, streams, step]
        return source

    def _plan(self, work: Work, kind: str) -> Plan:
        plan = self.kernels.plan(work, kind, self.limits, self.wish)
        self.used.append(plan)
        return plan

    def _out(self, shape, dtype, name: str) -> Tensor:
        empty = torch.empty(shape, dtype=dtype)
        return self.kernels.buffer(empty, "w", name)

    def _finish(self, code: int) -> None:
        self.kernels.check(code)
        self.loaded = [0 if x is None else self.kernels.loaded(x) for x in self._latents]
        self.launches += self.kernels.launches

    def _call(self, function: str, *arguments: Any) -> int:
        return getattr(self.kernels.library, function)(*arguments)

    def _workspace(self, rows: int, plan: Plan) -> tuple[POINTER, POINTER]:
        tickets, scratch = self.kernels.workspace(rows, plan.scratch_bytes)
        return POINTER(tickets.data_ptr()), POINTER(scratch.data_ptr())

    def row_stats(self, new, old, noise, reference, streams, step, step_values, seed, first_stream, form, second):
        source = self._source((new, old, noise, reference), streams, step, step_values, seed, first_stream, form)
        work = self._call("api_describe", ctypes.byref(source), None)
        plan = self._plan(work, "statistics")
        stats = self._out((4, work.rows), torch.float32, "stats")
        code = self._call(
            "api_row_stats", ctypes.byref(source), I64(second), POINTER(stats.data_ptr()), ctypes.byref(plan.raw()),
            *self._workspace(work.rows, plan),
        )  # fmt: skip
        self._finish(code)
        return stats

    def row_grad(
        self, new, old, noise, reference, streams, step, step_values, seed, first_stream, form,
        coefficients, upstream, factor,
    ):  # fmt: skip
        source = self._source((new, old, noise, reference), streams, step, step_values, seed, first_stream, form)
        grad = self._out(new.shape, new.dtype, "the gradient")
        work = self._call("api_describe", ctypes.byref(source), POINTER(grad.data_ptr()))
        coefficients = self.kernels.buffer(coefficients.contiguous())
        upstream = self.kernels.buffer(upstream.reshape(-1))
        stride = 0 if upstream.numel() == 1 else upstream.stride(0)
        code = self._call(
            "api_row_grad", ctypes.byref(source), POINTER(coefficients.data_ptr()), POINTER(upstream.data_ptr()),
            I64(stride), ctypes.c_double(factor), POINTER(grad.data_ptr()),
            ctypes.byref(self._plan(work, "gradient").raw()),
        )  # fmt: skip
        self._finish(code)
        return grad

    def _objective(self, rows, advantages, row_weights, old_log_prob, ints, floats, given=(None, None, None)):
        vectors = (advantages, row_weights, old_log_prob, *given)
        inputs = [None if x is None else self.kernels.buffer(x) for x in vectors]
        results = [
            self._out((), torch.float32, "the loss"),
            self._out((len(RowField), rows), torch.float32, "row results"),
            self._out((len(SUMMARY),), torch.float32, "the summary"),
        ]
        objective = Objective(*map(_pointer, inputs), (I64 * 6)(*ints), (ctypes.c_double * 5)(*floats))
        objective.loss, objective.rows, objective.summary = map(_pointer, results)
        objective.kept = inputs
        return objective, results

    def policy_loss(
        self, new, old, noise, reference, streams, step, step_values, seed, first_stream, form,
        advantages, row_weights, old_log_prob, ints, floats,
    ):  # fmt: skip
        source = self._source((new, old, noise, reference), streams, step, step_values, seed, first_stream, form)
        work = self._call("api_describe", ctypes.byref(source), None)
        objective, results = self._objective(work.rows, advantages, row_weights, old_log_prob, ints, floats)
        plan = self._plan(work, "objective")
        code = self._call(
            "api_policy_loss", ctypes.byref(source), ctypes.byref(objective), ctypes.byref(plan.raw()),
            *self._workspace(work.rows, plan),
        )  # fmt: skip
        self._finish(code)
        return tuple(results)

    def policy_loss_and_grad(
        self, new, old, noise, reference, streams, step, step_values, seed, first_stream, form,
        advantages, row_weights, old_log_prob, ints, floats, factor,
    ):  # fmt: skip
        arguments = (new, old, noise, reference, streams, step, step_values, seed, first_stream, form)
        epilogue = (advantages, row_weights, old_log_prob, ints, floats)
        source = self._source(arguments[:4], *arguments[4:])
        grad = self._out(new.shape, new.dtype, "the gradient")
        work = self._call("api_describe", ctypes.byref(source), POINTER(grad.data_ptr()))
        objective, results = self._objective(work.rows, *epilogue)
        work.couples_rows = self._call("api_couples_rows", ctypes.byref(objective))
        plan = self._plan(work, "single_pass")
        if not plan.possible:
            loss, rows, summary = self.policy_loss(*arguments, *epilogue)
            plans = self.used
            grad = self.row_grad(*arguments, rows[RowField.GRAD_P :], rows.new_ones(1), factor)
            self.used = [*plans, *self.used]
            return loss, rows, summary, grad
        code = self._call(
            "api_policy_loss_and_grad", ctypes.byref(source), ctypes.byref(objective), ctypes.c_double(factor),
            POINTER(grad.data_ptr()), ctypes.byref(plan.raw()), *self._workspace(work.rows, plan),
        )  # fmt: skip
        self._finish(code)
        return (*results, grad)

    def log_prob_loss(
        self, log_prob, old_log_prob, drift, reference_drift, step, step_values, advantages, row_weights, ints, floats
    ):
        rows = log_prob.shape[0]
        source = self._source((log_prob[:, None, None],), None, step, step_values, 0, 0, 1)
        given = (log_prob, drift, reference_drift)
        objective, results = self._objective(rows, advantages, row_weights, old_log_prob, ints, floats, given)
        plan = self._plan(Work(rows=rows, numel=1), "log_prob")
        code = self._call("api_log_prob_loss", ctypes.byref(source), ctypes.byref(objective), ctypes.byref(plan.raw()))
        self._finish(code)
        return tuple(results)

    def sde_step(
        self, sample, velocity, noise, prev_sample, streams, step, step_values, seed, first_stream,
        dtype, with_mean, with_log_prob, unnormalized,
    ):  # fmt: skip
        latents = (sample, velocity, noise, prev_sample)
        source = self._source(latents, streams, step, step_values, seed, first_stream, 0)
        next_sample = self._out(sample.shape if prev_sample is None else (0,), dtype, "the next state")
        mean = self._out(sample.shape if with_mean else (0,), torch.float32, "the mean")
        rows = sample.shape[0] * sample.shape[1]
        log_prob = self._out((rows if with_log_prob else 0,), torch.float32, "the log-prob")
        pointers = [x.data_ptr() if x.numel() else None for x in (next_sample, mean, log_prob)]
        request = Step(unnormalized, DTYPES[dtype], *pointers)
        work = self._call("api_describe_step", ctypes.byref(source), ctypes.byref(request))
        plan = self._plan(work, "step")
        code = self._call(
            "api_sde_step", ctypes.byref(source), ctypes.byref(request), ctypes.byref(plan.raw()),
            *self._workspace(rows, plan),
        )  # fmt: skip
        self._finish(code)
        return next_sample, mean, log_prob

    def operator(self, fallback: Callable) -> Callable:
        """``autograd.operator`` with this backend in the reference's place for everything but float64."""

        def choose(op: str, backend: str, device_type: str) -> Callable:
            def run(first: Tensor, *rest: Any) -> Any:
                if backend != "reference" or first.dtype == torch.float64:
                    return fallback(op, backend, device_type)(first, *rest)
                return getattr(self, op)(first, *rest)

            return run

        return choose
