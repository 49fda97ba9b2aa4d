"""The registered operators under ``torch.library.opcheck``, on what the autograd functions pass them."""

from __future__ import annotations

import pytest
import torch
from support import given_rows
from support.backends import CPU, require
from support.layouts import trajectory_slice

from flowdppo_fast import ops
from flowdppo_fast.backend import operator
from flowdppo_fast.objectives import DPPO, EpilogueOptions, GRPOGuard

VELOCITY, MEAN = 0, 1
R0, R1, N = 3, 2, 37


def latents(dtype, layout, count=4):
    """Canonical ``[R0, R1, N]`` tensors: contiguous, or rows apart in memory as a sliced trajectory has them."""
    made = [torch.randn(R0, R1, N).to(dtype) for _ in range(count)]
    return made if layout == "contiguous" else [trajectory_slice(x, 2) for x in made]


def source(dtype, layout, form, variant):
    """The arguments that all row operators begin with."""
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    new, old, noise, reference = latents(dtype, layout)
    if variant == "stored":
        table = torch.rand(R0 * R1, 3, dtype=compute) + 0.5
        return (new, old, noise, reference, None, table, [], 0, 0, form)
    if variant == "seeded":
        streams = torch.arange(R0 * R1)
        return (new, old, None, None, streams, None, [0.5, -2.0, 0.1], 7, 0, VELOCITY)
    return (new, old, noise, None, None, None, [0.5, -2.0, 0.1], 7, 5, form)


def epilogue(dtype, objective):
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    options = EpilogueOptions.make(objective, kl_weight=0.1)
    rows = R0 * R1
    return (torch.randn(rows, dtype=compute), torch.rand(rows, dtype=compute), None, options.ints, options.floats)


def arguments(op, dtype, layout, form, variant):
    if op == "sde_step":
        sample, velocity, noise, prev_sample = latents(dtype, layout)
        table = torch.rand(R0 * R1, 3, dtype=torch.float64 if dtype == torch.float64 else torch.float32) + 0.5
        if variant == "stored":
            return (sample, velocity, None, prev_sample, None, table, [], 0, 0, dtype, True, True, False)
        if variant == "seeded":
            values = [0.9, -0.1, 0.2]
            return (sample, velocity, None, None, torch.arange(6), None, values, 7, 0, dtype, False, True, True)
        return (sample, velocity, noise, None, None, None, [0.9, -0.1, 0.2], 0, 0, dtype, True, False, False)
    if op == "log_prob_loss":
        columns = {"stored": 3, "seeded": 1, "plain": 0}[variant]
        compute = torch.float64 if dtype == torch.float64 else torch.float32
        objective = "grpo_guard_batch" if variant == "stored" else "dppo"
        given = {"with_reference": variant == "stored", "with_weights": variant == "seeded"}
        return tuple(given_rows.draw(objective, 6, dtype=compute, columns=columns, **given).args())
    first = source(dtype, layout, form, variant)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    if op == "row_stats":
        return (*first, True)
    if op == "row_grad":
        return (*first, torch.randn(3, R0 * R1, dtype=compute), torch.randn(R0 * R1, dtype=compute), 0.5)
    objective = GRPOGuard(0.01, 0.01) if variant == "stored" else DPPO(0.01)
    if op == "policy_loss":
        return (*first, *epilogue(dtype, objective))
    return (*first, *epilogue(dtype, objective), 0.5)


@pytest.mark.parametrize("op", ops.SCHEMAS)
@pytest.mark.parametrize("layout", ["contiguous", "row_strided"])
@pytest.mark.parametrize(
    ("dtype", "form", "variant"),
    [
        (torch.float32, VELOCITY, "stored"),
        (torch.bfloat16, MEAN, "stored"),
        (torch.bfloat16, VELOCITY, "seeded"),
        (torch.float64, VELOCITY, "plain"),
    ],
    ids=["float32", "means", "seeded", "float64"],
)
def test_opcheck(op, layout, dtype, form, variant):
    torch.library.opcheck(getattr(torch.ops.flowdppo, op).default, arguments(op, dtype, layout, form, variant))


@pytest.mark.parametrize("op", ops.SCHEMAS)
@pytest.mark.parametrize("layout", ["contiguous", "row_strided"])
@pytest.mark.parametrize("variant", ["stored", "seeded"])
def test_opcheck_on_the_device(gpu_backend, op, layout, variant):
    values = arguments(op, torch.bfloat16, layout, VELOCITY, variant)
    on_device = [x.cuda() if isinstance(x, torch.Tensor) else x for x in values]
    torch.library.opcheck(operator(op, gpu_backend.name, "cuda"), tuple(on_device))


@pytest.mark.parametrize("op", ops.SCHEMAS)
@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_outputs_match_the_fake_ones(op, name):
    """Shapes, dtypes and strides that a backend returns are those the compiler was promised."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from flowdppo_fast.backend import operator

    if name == "cpu":
        require(CPU)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for variant in ("stored", "seeded", "plain"):
            values = arguments(op, dtype, "row_strided", VELOCITY, variant)
            real = operator(op, name, "cpu")(*values)
            with FakeTensorMode() as mode:
                fakes = [mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in values]
                fake = getattr(torch.ops.flowdppo, op).default(*fakes)
            pairs = [(real, fake)] if isinstance(real, torch.Tensor) else list(zip(real, fake))
            for got, promised in pairs:
                assert got.shape == promised.shape
                assert got.dtype == promised.dtype
                assert got.stride() == promised.stride()
