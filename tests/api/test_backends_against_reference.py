"""Every backend against the float64 reference: objectives, options, dtypes, lengths, steps and noise."""

from __future__ import annotations

import pytest
import torch
from support.cases import FORM_OBJECTIVE_OPTIONS, FORM_OBJECTIVES, FORMS, OPTIONS, bounded_call
from support.compare import check_backend
from support.problems import STOCHASTIC, make_problem

import flowdppo_fast as fast

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@pytest.mark.parametrize(("form", "objective", "option"), FORM_OBJECTIVE_OPTIONS)
def test_every_objective_with_every_option(backend, form, objective, option):
    options = dict(OPTIONS[option])
    problem = make_problem(drift=options.pop("drift", 1.0))
    check_backend(bounded_call(problem, form, objective, dtypes=F32, device=backend.device, **options), backend.name)


@pytest.mark.parametrize(("form", "objective"), FORM_OBJECTIVES)
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_reductions(backend, form, objective, reduction):
    if objective == "grpo_guard_batch" and reduction == "none":
        reduction = "mean"
    call = bounded_call(
        make_problem((4, 2)), form, objective, dtypes=F32, device=backend.device, reduction=reduction,
        with_reference=True, kl_weight=0.3, with_weights=True,
    )  # fmt: skip
    check_backend(call, backend.name)


@pytest.mark.parametrize(("form", "objective"), FORM_OBJECTIVES)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_single_pass(backend, form, objective, reduction):
    call = bounded_call(
        make_problem(), form, objective, dtypes=(BF16, BF16, F32, BF16), device=backend.device, reduction=reduction,
        with_reference=True, kl_weight=0.3, with_weights=True, single_pass=True,
    )  # fmt: skip
    check_backend(call, backend.name)


@pytest.mark.parametrize(
    "dtypes",
    [
        (F32, F32, F32, F32),
        (BF16, BF16, BF16, BF16),
        (F16, F16, F16, F16),
        (BF16, BF16, F32, BF16),
        (F32, BF16, F32, BF16),
        (BF16, F32, F16, F32),
        (F16, F32, BF16, F16),
        (F32, F16, BF16, F32),
    ],
    ids=lambda dtypes: "-".join(str(d).removeprefix("torch.") for d in dtypes),
)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("objective", ["dppo", "grpo_guard_batch"])
def test_dtypes_and_their_mixes(backend, form, objective, dtypes):
    call = bounded_call(
        make_problem(), form, objective, dtypes=dtypes, device=backend.device, with_reference=True, kl_weight=0.3
    )
    check_backend(call, backend.name)


@pytest.mark.parametrize(("form", "objective"), FORM_OBJECTIVES)
@pytest.mark.parametrize("option", ["plain", "everything"])
def test_float64_stays_float64(backend, form, objective, option):
    if not backend.float64:
        pytest.skip(f"{backend.name} makes no promise for float64")
    options = dict(OPTIONS[option])
    problem = make_problem(drift=options.pop("drift", 1.0))
    check_backend(bounded_call(problem, form, objective, device=backend.device, **options), backend.name)


@pytest.mark.parametrize("numel", [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 63, 65, 127, 257, 1023, 4097, 20001])
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("form", FORMS)
def test_any_length(backend, form, dtype, numel):
    call = bounded_call(make_problem((4,), (numel,)), form, "dppo", dtypes=dtype, device=backend.device)
    check_backend(call, backend.name)


@pytest.mark.parametrize("count", [1, 2, 3, 7, 33, 129])
@pytest.mark.parametrize("objective", ["dppo", "ratio_clip", "grpo_guard_batch"])
def test_any_number_of_rows(backend, count, objective):
    call = bounded_call(make_problem((count,), (37,)), "velocity", objective, dtypes=F32, device=backend.device)
    check_backend(call, backend.name)


@pytest.mark.parametrize("latent", [(35,), (5, 7), (3, 5, 7), (2, 3, 5, 7)], ids=["vector", "packed", "image", "video"])
@pytest.mark.parametrize("rows", [(8,), (1,), (4, 2), (1, 3), (3, 1), (2, 2, 2)], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_ranks(backend, form, rows, latent):
    call = bounded_call(
        make_problem(rows, latent), form, "dppo", dtypes=F32, device=backend.device, with_reference=True, kl_weight=0.1
    )
    outcome = check_backend(call, backend.name)
    assert outcome.rows["kl"].shape == rows


@pytest.mark.parametrize("shape", ["float", "0-d", "rows", "singleton"])
@pytest.mark.parametrize("rows", [(8,), (4, 2)], ids=str)
@pytest.mark.parametrize("objective", ["dppo", "grpo_guard"])
def test_std_and_dt_as_trainers_hold_them(backend, objective, rows, shape):
    call = bounded_call(make_problem(rows), "means", objective, dtypes=F32, device=backend.device, std_shape=shape)
    check_backend(call, backend.name)


@pytest.mark.parametrize(
    ("rows", "index"),
    [((8,), [1, 2, 3, 4, 5, 6, 7, 8]), ((4, 2), [3, 5]), ((4, 2), [[1], [2], [4], [6]])],
    ids=["step per row", "stacked steps", "step per sample"],
)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("objective", ["dppo_mean_drift", "grpo_guard"])
def test_steps_that_differ_between_rows(backend, form, objective, rows, index):
    call = bounded_call(
        make_problem(rows, index=index), form, objective, dtypes=F32, device=backend.device,
        with_reference=True, kl_weight=0.1, reference_kl="without_dt",
    )  # fmt: skip
    check_backend(call, backend.name)


@pytest.mark.parametrize("sampler", STOCHASTIC)
@pytest.mark.parametrize("index", [0, 8])
def test_every_sampler(backend, sampler, index):
    call = bounded_call(
        make_problem(sampler=sampler, index=index), "velocity", "dppo", dtypes=F32, device=backend.device
    )
    check_backend(call, backend.name)


@pytest.mark.parametrize("rows", [(8,), (4, 2)], ids=str)
@pytest.mark.parametrize("stream", ["int", "far int", "per row", "per sample"])
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("numel", [1, 6, 105, 1026])
def test_seeded_noise(backend, rows, stream, dtype, numel):
    """The backend regenerates what the definition in plain torch draws."""
    streams = {
        "int": 5,
        "far int": 2**40 + 3,
        "per row": torch.randperm(8).reshape(rows).to(backend.device) * 2**33,
        "per sample": torch.arange(rows[0]).reshape(rows[:1] + (1,) * (len(rows) - 1)).to(backend.device),
    }[stream]
    seed = -1 if stream == "int" else 0x9E3779B97F4A7C15
    problem = make_problem(rows, (numel,))
    call = bounded_call(
        problem, "velocity", "dppo", dtypes=dtype, device=backend.device, noise=fast.PhiloxNoise(seed, streams)
    )
    check_backend(call, backend.name)


def test_accumulation_is_not_in_the_input_dtype(backend):
    """20k bf16 products of one size: a bf16 accumulator would stop growing after 256 of them."""
    velocity = torch.full((1, 20_000), 1.5, dtype=BF16, device=backend.device)
    old = torch.full_like(velocity, 1.0)
    step = fast.SDEStep(1.0, -1.0, 1.0, -0.1)
    p, q = fast.row_statistics(velocity, old, torch.full_like(velocity, -1.0), step, backend=backend.name)
    assert p.tolist() == [0.5]
    assert q.tolist() == [0.25]
