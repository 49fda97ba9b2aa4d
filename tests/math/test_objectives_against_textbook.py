"""The reference backend against the textbook under autograd, both in float64."""

from __future__ import annotations

import pytest
import torch
from support.cases import FORM_OBJECTIVE_OPTIONS, FORM_OBJECTIVES, FORMS, NEVER_DROP, OPTIONS, bounded_call
from support.problems import STOCHASTIC, Outcome, library, make_problem, textbook
from support.tolerance import check_float64


def assert_same(actual: Outcome, expected: Outcome, scale: float) -> None:
    check_float64("loss", actual.loss, expected.loss, scale)
    for name in ("log_ratio", "ratio", "kl", "loss"):
        check_float64(f"rows.{name}", actual.rows[name], expected.rows[name], scale)
    assert torch.equal(actual.rows["kept"], expected.rows["kept"])
    assert actual.metrics.keys() <= expected.metrics.keys()
    for name, value in actual.metrics.items():
        check_float64(name, value, expected.metrics[name], scale)
    check_float64("gradient", actual.grad, expected.grad, scale)


@pytest.mark.parametrize(
    ("form", "objective", "option", "reduction"),
    [
        (*case, reduction)
        for case in FORM_OBJECTIVE_OPTIONS
        for reduction in ("mean", "kept", "sum", "none")
        # a batch-wide bias has no per-row gradient; the refusal is among the wrong calls
        if not (case[1] == "grpo_guard_batch" and reduction == "none")
    ],
)
def test_every_objective_with_every_option(form, objective, option, reduction):
    options = dict(OPTIONS[option])
    problem = make_problem(drift=options.pop("drift", 1.0))
    call = bounded_call(problem, form, objective, **options | {"reduction": reduction})
    expected = textbook(call)
    # log-probs of order 10 (times N when summed) are subtracted on the textbook's side
    assert_same(library(call, "reference"), expected, 105.0 if options.get("latent_reduction") == "sum" else 4.0)
    kept = expected.rows["kept"]
    assert kept.any()
    assert kept.all() == (objective in NEVER_DROP), "the case should drop some rows"


@pytest.mark.parametrize(("form", "objective"), FORM_OBJECTIVES)
@pytest.mark.parametrize(
    ("rows", "index"),
    [
        ((8,), [1, 2, 3, 4, 5, 6, 7, 8]),
        ((4, 2), [3, 5]),
        # as many samples as steps: one number per step, as in torch's broadcasting
        ((2, 2), [3, 5]),
        ((4, 2), [[1], [2], [4], [6]]),
        ((2, 4), [[2, 3, 4, 5]] * 2),
    ],
    ids=["step per row", "stacked steps", "square", "step per sample", "full table"],
)
def test_steps_that_differ_between_rows(form, objective, rows, index):
    call = bounded_call(make_problem(rows, (2, 3, 5), index=index), form, objective)
    assert_same(library(call, "reference"), textbook(call), 4.0)


@pytest.mark.parametrize("sampler", STOCHASTIC)
@pytest.mark.parametrize("index", [0, 4, 8])
@pytest.mark.parametrize("objective", ["dppo", "grpo_guard"])
def test_every_sampler(sampler, index, objective):
    """Index 0 is sigma == 1; the textbook takes the sampler's update in its own form."""
    problem = make_problem(sampler=sampler, index=index)
    for form in FORMS:
        call = bounded_call(problem, form, objective)
        assert_same(library(call, "reference"), textbook(call), 16.0)


@pytest.mark.parametrize("latent", [(7,), (4, 6), (3, 4, 5), (2, 3, 4, 5)], ids=["vector", "packed", "image", "video"])
@pytest.mark.parametrize("rows", [(8,), (1,), (4, 2), (1, 3)], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_every_latent_rank(form, rows, latent):
    problem = make_problem(rows, latent)
    call = bounded_call(problem, form, "dppo", with_reference=True, kl_weight=0.1)
    assert_same(library(call, "reference"), textbook(call), 4.0)


@pytest.mark.parametrize(
    ("form", "kind"), [("velocity", "velocity_mse"), ("velocity", "mean_mse"), ("means", "mean_mse")]
)
@pytest.mark.parametrize("index", [3, [1, 2, 3, 4, 5, 6, 7, 8]], ids=["one step", "step per row"])
@pytest.mark.parametrize("per_row", [False, True])
def test_a_reference_penalty_without_a_scale(form, kind, index, per_row):
    given = {"with_row_bounds": True} if per_row else {"kl_weight": 0.3}
    call = bounded_call(make_problem(index=index), form, "dppo", with_reference=True, reference_kl=kind, **given)
    assert_same(library(call, "reference"), textbook(call), 4.0)


@pytest.mark.parametrize("shape", ["float", "0-d", "rows", "singleton"])
@pytest.mark.parametrize("rows", [(8,), (4, 2)], ids=str)
def test_std_and_dt_as_trainers_hold_them(shape, rows):
    call = bounded_call(make_problem(rows), "means", "grpo_guard", std_shape=shape)
    assert_same(library(call, "reference"), textbook(call), 4.0)
