"""The public API on the CUDA kernels, run by the emulator, against the float64 reference."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import ALIGNED, BF16, COMPILED, F32, LONG, MIXTURES, SEED, name_of, some
from support.cases import FORM_OBJECTIVE_OPTIONS, FORMS, OPTIONS, bounded_call
from support.compare import check_backend
from support.problems import make_problem

import flowdppo_fast as fast

# every objective and every option in one form or the other
FEW = [case for case in FORM_OBJECTIVE_OPTIONS if case[2] in ("plain", "everything")]


@pytest.mark.parametrize(
    ("form", "objective", "option"), some(FEW, [case for case in FORM_OBJECTIVE_OPTIONS if case not in FEW])
)
def test_every_objective_with_every_option(api, form, objective, option):
    options = dict(OPTIONS[option])
    # the square of a ratio leaves float32 where the ratio does not
    near = 0.3 if objective == "drpo_ratio" and options.get("latent_reduction") == "sum" else 1.0
    problem = make_problem((6,), ALIGNED, drift=near * options.pop("drift", 1.0))
    check_backend(bounded_call(problem, form, objective, dtypes=F32, **options), "cuda")
    # one forward, one backward
    assert api.launches == 2


@pytest.mark.parametrize("latent", [LONG, (3, 103, 7)], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("dtypes", [COMPILED[1], *some([], [(x,) for x in (*COMPILED[2:], *MIXTURES)])], ids=name_of)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("objective", some(["dppo"], ["grpo_guard_batch"]))
def test_dtypes_and_their_mixes(api, form, objective, dtypes, latent):
    problem = make_problem((8,), latent)
    check_backend(bounded_call(problem, form, objective, dtypes=dtypes, with_reference=True, kl_weight=0.3), "cuda")


@pytest.mark.parametrize("single_pass", some([True], [False]))
@pytest.mark.parametrize("latent", [LONG, (3, 103, 7)], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=name_of)
def test_seeded_noise(api, dtype, latent, single_pass):
    problem = make_problem((6,), latent)
    for stream in (3, torch.tensor([5, -2, 2**40, 5, 0, 9])):
        noise = fast.PhiloxNoise(SEED, stream)
        call = bounded_call(
            problem, "velocity", "dppo", dtypes=dtype, noise=noise, with_reference=True, kl_weight=0.3,
            single_pass=single_pass,
        )  # fmt: skip
        check_backend(call, "cuda")
    # loss and gradient in one operator are two launches as well
    assert api.launches == 4


@pytest.mark.parametrize("objective", some(["grpo_guard_batch"], ["ratio_clip"]))
def test_more_rows_than_are_summarised_side_by_side(api, objective):
    check_backend(bounded_call(make_problem((130,), (12,)), "velocity", objective, dtypes=F32), "cuda")
