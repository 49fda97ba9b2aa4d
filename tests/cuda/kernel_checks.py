"""Canonical operator arguments, and how far the kernels' answers to them may be from the float64 reference."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from ptx import cuda_runtime
from ptx.cuda_runtime import Cuda
from support.tolerance import check_within, sum_bound

from flowdppo_fast import reference
from flowdppo_fast.objectives import EpilogueOptions
from flowdppo_fast.rows import Form, RowSource

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
EPS = torch.finfo(F32).eps
STEP = [0.35, -1.75, 0.08]
SAMPLER_STEP = [0.93, -0.11, 0.27]
SEED, FIRST_STREAM = -0x123456789ABCDEF, 2**40 + 5
# every row starts at a multiple of 16 bytes, and takes two splits of float32, or also of 16-bit dtypes
ALIGNED, LONG = (4, 12, 24), (4, 32, 24)
# bound on a float32 normal's distance from the definition
NORMAL_SLACK = 1e-5
# latents of one dtype with noise of that or float32, which kernels are compiled for, and mixtures, which are cast
COMPILED = [
    (F32, F32, F32, F32), (BF16, BF16, BF16, BF16), (F16, F16, F16, F16), (BF16, BF16, F32, BF16), (F16, F16, F32, F16),
]  # fmt: skip
MIXTURES = [(F32, BF16, F16, F32), (F16, F32, BF16, BF16), (BF16, F16, F32, F32), (F32, F32, BF16, F32)]


def loaded() -> Cuda:
    """The operators; skips where there is no nvcc, or fails where CUDA is meant to be there."""
    try:
        return cuda_runtime.load()
    except FileNotFoundError as error:
        if os.environ.get("FLOWDPPO_REQUIRE_CUDA") == "1":
            pytest.fail(f"FLOWDPPO_REQUIRE_CUDA=1, but {error}")
        pytest.skip(f"kernels cannot be compiled: {error}")


def some(short: Iterable[Any], rest: Iterable[Any]) -> list[Any]:
    """Parameters for every run, and those that only ``make ptx`` takes."""
    marked = [pytest.param(*(x if isinstance(x, tuple) else (x,)), marks=pytest.mark.full) for x in rest]
    return [*short, *marked]


def name_of(value) -> str:
    if isinstance(value, tuple):
        return "-".join(map(name_of, value))
    return str(value).removeprefix("torch.")


def source(shape, dtypes=(F32,) * 4, *, form=Form.VELOCITY, seeded=False, with_reference=True, table=0, streams=None):
    """Arguments of an operator up to ``form``; differences of a few percent, as between two policies."""
    rows = shape[0] * shape[1]
    old = torch.randn(shape, dtype=F64)
    noise = torch.randn(shape, dtype=F64)
    new, drifted = (old + 0.1 * torch.randn(shape, dtype=F64) for _ in range(2))
    third = old + STEP[0] * noise if form == Form.MEAN else noise
    latents = [new, old, None if seeded else third, drifted if with_reference else None]
    latents = [x if x is None else x.to(dtype) for x, dtype in zip(latents, dtypes)]
    step = None
    if table:
        scale = torch.linspace(0.6, 1.4, rows, dtype=F64)[:, None]
        step = (torch.tensor([STEP], dtype=F64) * scale)[:, :table].float().contiguous()
    first = 0 if streams is not None else FIRST_STREAM
    return (*latents, streams, step, [] if table else STEP, SEED, first, int(form))


def in_double(arguments):
    return tuple(x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in arguments)


def check_stats(host, arguments, second_moment=True):
    """Each statistic within the bound of a float sum of its terms."""
    got = host.row_stats(*arguments, second_moment)
    want = reference.row_stats(*in_double(arguments), second_moment)
    u, e, w, _ = reference._differences(RowSource(*in_double(arguments)))
    terms = [e * u, u * u, e * e if second_moment else None, None if w is None else w * w]
    for name, term, actual, expected in zip("PQER", terms, got.double(), want):
        if term is None:
            assert torch.equal(actual, torch.zeros_like(actual)), name
            continue
        # the row's factors k cost a rounding each, the means' division another
        bound = sum_bound(term, F32) + 8 * EPS * expected.abs()
        if arguments[2] is None:
            bound += NORMAL_SLACK * (u.abs() if name == "P" else 2 * e.abs()).mean(1)
        error = (actual - expected).abs()
        assert bool((error <= bound).all()), f"{name}: {error.max():.3e} > {bound.min():.3e}"
    return got


def coefficients_of(arguments):
    return torch.randn(3, arguments[0].shape[0] * arguments[0].shape[1])


def check_grad(host, arguments, coefficients=None, upstream=None, factor=0.25):
    """Each element within roundings of the terms that it is the sum of."""
    coefficients = coefficients_of(arguments) if coefficients is None else coefficients
    upstream = torch.ones(1) if upstream is None else upstream
    grad = host.row_grad(*arguments, coefficients, upstream, factor)
    wide = coefficients.double(), upstream.double()
    exact = reference.row_grad(*in_double(arguments), *wide, factor)
    u, e, w, k = reference._differences(RowSource(*in_double(arguments)))
    active = (coefficients != 0).any(0)[:, None]
    size = (wide[0][0].abs()[:, None] * e.abs() + 2 * wide[0][1].abs()[:, None] * u.abs())[active.expand_as(u)].max()
    if w is not None:
        size += 2 * (wide[0][2].abs()[:, None] * w.abs())[active.expand_as(u)].max()
    size *= factor * wide[1].abs().max() * k.abs().max() / arguments[0].shape[2]
    relative = 16 * EPS + (NORMAL_SLACK if arguments[2] is None else 0.0)
    check_within("gradient", grad, exact, float(relative * size), F32)
    return grad


def epilogue(objective, rows, *, kl_weight=0.1):
    options = EpilogueOptions.make(objective, kl_weight=kl_weight)
    return torch.randn(rows), torch.rand(rows), None, options.ints, options.floats


def sampler_step(shape, dtypes=(F32,) * 3, *, noise="stored", out=None, step=None, streams=None, **flags):
    """Arguments of a sampler step; ``noise`` is "stored", "seeded" or "given" (a next state)."""
    sample, velocity, third = (torch.randn(shape, dtype=F64).to(dtype) for dtype in dtypes)
    wanted = {"with_mean": True, "with_log_prob": True, "unnormalized": False, **flags}
    return (
        sample, velocity, third if noise == "stored" else None, third if noise == "given" else None, streams, step,
        [] if step is not None else SAMPLER_STEP, SEED, FIRST_STREAM, out or dtypes[0], *wanted.values(),
    )  # fmt: skip


def check_step(host, arguments):
    got = host.sde_step(*arguments)
    wide = list(in_double(arguments))
    wide[9] = F64
    exact = reference.sde_step(*wide)
    seeded = NORMAL_SLACK if arguments[2] is None and arguments[3] is None else 0.0
    # products and sums of numbers up to about 5
    slack = (8 * EPS + seeded) * 5.0
    check_within("next", got[0], exact[0], slack, F32)
    check_within("mean", got[1], exact[1], slack, F32)
    # a mean of squares of about 1, or with a given state of ((x'-mu)/S)**2, divided by S twice
    size = 1.0 + (0.0 if exact[2].numel() == 0 else float(exact[2][exact[2].isfinite()].abs().max()))
    check_within("log-prob", got[2], exact[2], (64 * EPS + 4 * seeded) * size, F32)
    return got
