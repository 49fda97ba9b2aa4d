"""The public API on the CUDA kernels, run by the host layer, against the float64 reference."""

from __future__ import annotations

import pytest
import torch
from host_kernels import H100, LIBRARY, SMALL, Limits, Wish
from kernel_checks import ALIGNED, BF16, F16, F32, MIXES, SEED, name_of
from support.cases import FORM_OBJECTIVE_OPTIONS, FORM_OBJECTIVES, FORMS, OPTIONS, bounded_call
from support.compare import check_backend
from support.problems import make_problem

import flowdppo_fast as fast


@pytest.mark.parametrize(("form", "objective", "option"), FORM_OBJECTIVE_OPTIONS)
def test_every_objective_with_every_option(api, form, objective, option):
    options = dict(OPTIONS[option])
    problem = make_problem((6,), ALIGNED, drift=options.pop("drift", 1.0))
    check_backend(bounded_call(problem, form, objective, dtypes=F32, **options), "reference")
    # one forward, one backward
    assert api.launches == 2


@pytest.mark.parametrize("latent", [ALIGNED, (3, 5, 7)], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("dtypes", MIXES, ids=name_of)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("objective", ["dppo", "grpo_guard_batch"])
def test_dtypes_and_their_mixes(api, form, objective, dtypes, latent):
    problem = make_problem((8,), latent)
    check_backend(
        bounded_call(problem, form, objective, dtypes=dtypes, with_reference=True, kl_weight=0.3), "reference"
    )


@pytest.mark.parametrize("wish", [SMALL, Wish(32, 1, 3), Wish(64, 1, 8), LIBRARY], ids=["2", "3", "8", "library"])
@pytest.mark.parametrize(("form", "objective"), FORM_OBJECTIVES)
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=name_of)
def test_single_pass(api, form, objective, dtype, wish):
    # the library's own blocks are slow to run here: one objective shows them
    if wish is LIBRARY and objective != "dppo":
        wish = SMALL
    api.wish = wish
    call = bounded_call(
        make_problem((6,), ALIGNED), form, objective, dtypes=dtype, with_reference=True, kl_weight=0.3,
        with_weights=True, single_pass=True,
    )  # fmt: skip
    check_backend(call, "reference")
    couples = objective == "grpo_guard_batch"
    assert api.launches == (2 if couples else 1)
    assert [plan.cluster for plan in api.used] == ([1, 1] if couples else [api.used[0].cluster])
    assert couples or api.used[0].cluster == (wish.cluster or api.used[0].cluster)


@pytest.mark.parametrize(
    ("dtypes", "latent", "limits"),
    [
        ((BF16, BF16, F32, BF16), ALIGNED, H100),
        ((F32,) * 4, (3, 5, 7), H100),
        ((F32,) * 4, ALIGNED, Limits(108, 166912, 1)),
        ((F32,) * 4, ALIGNED, Limits(132, 2048, 8)),
    ],
    ids=["mixed", "unaligned", "no clusters", "little shared memory"],
)
def test_single_pass_in_two_launches(api, dtypes, latent, limits):
    api.limits = limits
    call = bounded_call(
        make_problem((6,), latent), "velocity", "dppo", dtypes=dtypes, with_reference=True, kl_weight=0.3,
        single_pass=True,
    )  # fmt: skip
    check_backend(call, "reference")
    assert api.launches == 2


@pytest.mark.parametrize("single_pass", [False, True])
@pytest.mark.parametrize("latent", [ALIGNED, (3, 5, 7)], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=name_of)
def test_seeded_noise(api, dtype, latent, single_pass):
    problem = make_problem((6,), latent)
    for stream in (3, torch.tensor([5, -2, 2**40, 5, 0, 9])):
        noise = fast.PhiloxNoise(SEED, stream)
        call = bounded_call(
            problem, "velocity", "dppo", dtypes=dtype, noise=noise, with_reference=True, kl_weight=0.3,
            single_pass=single_pass,
        )  # fmt: skip
        check_backend(call, "reference")


@pytest.mark.parametrize("seeded", [False, True], ids=["stored", "seeded"])
@pytest.mark.parametrize("numel", [1, 7, 8, 9, 15, 127, 1024, 1031, 3079])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=name_of)
def test_single_pass_of_any_length(api, numel, dtype, seeded):
    # one row is aligned at any length: what fills no vector is read in place
    noise = {"noise": fast.PhiloxNoise(SEED, 3)} if seeded else {}
    call = bounded_call(
        make_problem((1,), (numel,)), "velocity", "dppo", dtypes=dtype, with_reference=True, kl_weight=0.3,
        single_pass=True, **noise,
    )  # fmt: skip
    check_backend(call, "reference")
    assert [plan.cluster for plan in api.used] == [2]


@pytest.mark.parametrize("wish", [Wish(32, 1, 2), SMALL, LIBRARY], ids=["32", "64", "library"])
@pytest.mark.parametrize("objective", ["ratio_clip", "grpo_guard_batch"])
def test_more_rows_than_are_summarised_side_by_side(api, objective, wish):
    api.wish = wish
    check_backend(bounded_call(make_problem((130,), (12,)), "velocity", objective, dtypes=F32), "reference")


@pytest.mark.parametrize("dtype", [F32, BF16], ids=name_of)
@pytest.mark.parametrize("seeded", [False, True], ids=["stored", "seeded"])
@pytest.mark.parametrize("numel", [20_004, 32_768])
def test_as_the_library_plans_it(api, numel, dtype, seeded):
    """Blocks of 256 threads (128 where a block holds little), clusters as large as an H100's."""
    api.wish = LIBRARY
    noise = {"noise": fast.PhiloxNoise(SEED, 3)} if seeded else {}
    problem = make_problem((2,), (numel,))
    for single_pass in (False, True):
        call = bounded_call(problem, "velocity", "dppo", dtypes=dtype, single_pass=single_pass, **noise)
        check_backend(call, "reference")
        aligned = numel % 8 == 0 or dtype == F32
        assert (api.used[-1].cluster > 1) == (single_pass and aligned)
        assert all(plan.threads == 256 or (single_pass and plan.threads == 128) for plan in api.used)
