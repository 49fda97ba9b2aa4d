"""The CUDA kernels, run by the host layer, against the float64 reference."""

from __future__ import annotations

import math
import mmap

import pytest
import torch
from host_kernels import H100, LIBRARY, SMALL, Limits, Wish, kernels
from support.cases import FORM_OBJECTIVE_OPTIONS, FORM_OBJECTIVES, FORMS, OPTIONS, bounded_call
from support.compare import check_backend
from support.problems import make_problem
from support.tolerance import check_within, sum_bound

import flowdppo_fast as fast
from flowdppo_fast import reference
from flowdppo_fast.noise import philox_normal
from flowdppo_fast.objectives import DPPO, SUMMARY, EpilogueOptions, GRPOGuard, RatioClip, RowField
from flowdppo_fast.reference import Form

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
EPS = torch.finfo(F32).eps
STEP = [0.35, -1.75, 0.08]
SAMPLER_STEP = [0.93, -0.11, 0.27]
SEED, FIRST_STREAM = -0x123456789ABCDEF, 2**40 + 5
# 768 elements: every row starts at a multiple of 16 bytes and takes three splits, of 256 float32 elements each
ALIGNED = (4, 8, 24)
# bound on a float32 normal's distance from the definition: 4 ulp of the largest one
NORMAL_SLACK = 4 * EPS * 5.8
MIXES = [
    (F32, F32, F32, F32), (BF16, BF16, BF16, BF16), (F16, F16, F16, F16), (BF16, BF16, F32, BF16),
    (F16, F16, F32, F16), (F32, BF16, F16, F32), (F16, F32, BF16, BF16), (BF16, F16, F32, F32),
]  # fmt: skip


def name_of(value) -> str:
    if isinstance(value, tuple):
        return "-".join(map(name_of, value))
    return str(value).removeprefix("torch.")


# --- through the public API


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


# --- operators on canonical tensors


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
    u, e, w, _ = reference._differences(*in_double(arguments))
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
    u, e, w, k = reference._differences(*in_double(arguments))
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


@pytest.mark.parametrize("seeded", [False, True], ids=["stored", "seeded"])
@pytest.mark.parametrize("dtypes", [MIXES[0], MIXES[1], MIXES[3], MIXES[5]], ids=name_of)
@pytest.mark.parametrize("numel", [1, 2, 3, 4, 5, 7, 8, 9, 31, 33, 255, 256, 257, 511, 513, 1024, 1025, 3079])
def test_lengths_around_vectors_and_splits(host, numel, dtypes, seeded):
    # one row is aligned at any length, two are where their length is a multiple of the vector
    for shape in ((1, 1, numel), (1, 2, numel)):
        arguments = source(shape, dtypes, seeded=seeded)
        check_stats(host, arguments)
        check_grad(host, arguments)
        check_step(host, sampler_step(shape, dtypes[:3], noise="seeded" if seeded else "stored"))


@pytest.mark.parametrize(("form", "table"), [(Form.VELOCITY, 0), (Form.VELOCITY, 3), (Form.MEAN, 1), (Form.MEAN, 3)])
@pytest.mark.parametrize("with_reference", [False, True])
@pytest.mark.parametrize("second_moment", [False, True])
def test_forms_tables_and_only_what_is_asked_for(host, form, table, with_reference, second_moment):
    arguments = source((2, 3, 512), form=form, table=table, with_reference=with_reference)
    check_stats(host, arguments, second_moment)
    check_grad(host, arguments)


@pytest.mark.parametrize("gap", [0, 8, 3])
@pytest.mark.parametrize("seeded", [False, True], ids=["stored", "seeded"])
def test_strided_rows(host, gap, seeded):
    """Rows of a step-major store, expanded rows, and rows that no vector load fits."""
    dense = source((3, 4, 520), (BF16,) * 4, seeded=seeded)
    store = torch.full((6, 5, 520 + gap), torch.nan, dtype=BF16)
    new = store[1:5, 2:, :520].transpose(0, 1).copy_(dense[0])
    old = dense[1][:, :1].expand(3, 4, 520)
    drifted = dense[3][0, 0].expand(3, 4, 520)
    strided = (new, old, dense[2], drifted, *dense[4:])
    same = tuple(x.contiguous() if isinstance(x, torch.Tensor) else x for x in strided)
    check_stats(host, strided)
    coefficients = torch.randn(3, 12)
    grad = check_grad(host, strided, coefficients)
    assert torch.equal(grad, host.row_grad(*same, coefficients, torch.ones(1), 0.25))
    if gap != 3:
        assert torch.equal(host.row_stats(*strided, True), host.row_stats(*same, True))


def test_rows_beyond_2_to_the_31_elements(host):
    """In memory that is reserved but, apart from these rows, never touched."""
    far = 2**31 + 8
    memory = mmap.mmap(-1, 2 * (far + 4096))
    store = torch.frombuffer(memory, dtype=torch.uint8).view(BF16)
    dense = source((2, 1, 1024), (BF16,) * 4)
    latents = []
    for number, x in enumerate(dense[:4]):
        latents.append(store[number * 1024 :].as_strided((2, 1, 1024), (far, 1, 1)))
        latents[-1].copy_(x)
    # copying them between margins would touch everything
    host.guards = False
    coefficients = torch.randn(3, 2)
    row = epilogue(DPPO(), 2)
    for op, rest in (
        (host.row_stats, (True,)),
        (host.row_grad, (coefficients, torch.ones(1), 1.0)),
        (host.policy_loss_and_grad, (*row, 1.0)),
    ):
        got, want = op(*latents, *dense[4:], *rest), op(*dense, *rest)
        got, want = ([x] if isinstance(x, torch.Tensor) else x for x in (got, want))
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_upstream_gradients(host):
    arguments = source((2, 3, 300))
    per_row = torch.randn(6)
    check_grad(host, arguments, upstream=per_row)
    check_grad(host, arguments, upstream=per_row[:1])
    # the gradient of a sum arrives expanded, with stride 0
    check_grad(host, arguments, upstream=per_row[2].expand(6))


@pytest.mark.parametrize("noise", ["stored", "seeded", "given"])
@pytest.mark.parametrize("dtypes", [(F32,) * 3, (BF16,) * 3, (F16, BF16, F32), (BF16, F32, F16)], ids=name_of)
@pytest.mark.parametrize("out", [F32, BF16, F16], ids=name_of)
def test_sampler_step(host, noise, dtypes, out):
    table = (torch.tensor([SAMPLER_STEP]) * torch.linspace(0.5, 1.5, 6)[:, None]).contiguous()
    check_step(host, sampler_step((2, 3, 768), dtypes, noise=noise, out=out))
    check_step(host, sampler_step((2, 3, 301), dtypes, noise=noise, out=out, step=table, unnormalized=True))
    assert host.launches == 2


@pytest.mark.parametrize("with_mean", [False, True])
@pytest.mark.parametrize("with_log_prob", [False, True])
@pytest.mark.parametrize("noise", ["stored", "given"])
def test_a_sampler_step_writes_only_what_is_asked_for(host, noise, with_mean, with_log_prob):
    arguments = sampler_step((1, 3, 520), noise=noise, with_mean=with_mean, with_log_prob=with_log_prob)
    got = check_step(host, arguments)
    assert [x.numel() for x in got] == [1560 * (noise == "stored"), 1560 * with_mean, 3 * with_log_prob]


@pytest.mark.parametrize("numel", [512, 301])
def test_a_step_without_noise_keeps_its_mean(host, numel):
    step = torch.tensor([[0.9, -0.1, 0.3], [0.9, -0.1, 0.0], [0.8, -0.2, 0.0]])
    for with_log_prob in (False, True):
        arguments = sampler_step((1, 3, numel), step=step, with_log_prob=with_log_prob)
        arguments[2][0, 1] = math.nan
        got = check_step(host, arguments)
        assert torch.equal(got[0][0, 1:], got[1][0, 1:])
        # nobody needs the noise of such a row
        if not with_log_prob and numel == 512:
            assert host.loaded[2] == numel * 4


# --- what is read, written and left


@pytest.mark.parametrize("dtype", [F32, BF16], ids=name_of)
def test_every_input_is_read_once(host, dtype):
    arguments = source((2, 3, 1536), (dtype,) * 4)
    size = arguments[0].numel() * arguments[0].element_size()
    host.row_stats(*arguments, True)
    assert host.loaded == [size] * 4
    host.policy_loss_and_grad(*arguments, *epilogue(DPPO(), 6), 1.0)
    assert len(host.used) == 1
    assert host.loaded == [size] * 4
    seeded = source((2, 3, 1536), (dtype,) * 4, seeded=True, with_reference=False)
    host.row_grad(*seeded, coefficients_of(seeded), torch.ones(1), 1.0)
    assert host.loaded == [size, size, 0, 0]


@pytest.mark.parametrize("numel", [1536, 301])
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=name_of)
def test_dropped_rows_are_zeros_and_their_inputs_are_not_read(host, dtype, numel):
    arguments = source((1, 4, numel), (dtype,) * 4, table=3)
    coefficients = torch.randn(3, 4)
    coefficients[:, 1] = 0.0
    coefficients[:, 3] = torch.tensor([0.0, math.nan, 0.0])
    clean = host.row_grad(*arguments, coefficients, torch.ones(1), 1.0)
    for x in (*arguments[:4], arguments[5][None]):
        x[0, 1] = math.nan
    grad = host.row_grad(*arguments, coefficients, torch.ones(1), 1.0)[0]
    assert torch.equal(grad[1], torch.zeros_like(grad[1]))
    assert torch.equal(grad[[0, 2]], clean[0, [0, 2]])
    # a NaN coefficient is not zero
    assert grad[3].isnan().all()
    if numel == 1536:
        assert host.loaded == [3 * numel * grad.element_size()] * 4


def test_the_single_pass_drops_rows_too(host):
    arguments = source((1, 6, 768))
    row = epilogue(DPPO(1e-9, symmetric=True), 6, kl_weight=0.0)
    _, rows, summary, grad = host.policy_loss_and_grad(*arguments, *row, 1.0)
    assert host.used[0].cluster == 2
    assert not rows[RowField.KEPT].any()
    assert summary[SUMMARY.index("masked_fraction")] == 1.0
    assert torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("which", range(4))
def test_non_finite_inputs_reach_their_row_alone(host, value, which):
    arguments = source((1, 3, 1030), (BF16,) * 4)
    row = epilogue(DPPO(), 3)
    clean = host.row_stats(*arguments, True)
    arguments[which][0, 1, 700] = value
    got, want = host.row_stats(*arguments, True), reference.row_stats(*arguments, True)
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got.isinf(), want.isinf())
    assert torch.equal(got[:, [0, 2]], clean[:, [0, 2]])
    got = host.policy_loss_and_grad(*arguments, *row, 1.0)
    want = reference.policy_loss_and_grad(*arguments, *row, 1.0)
    for ours, theirs in zip(got, want, strict=True):
        assert torch.equal(ours.isnan(), theirs.isnan())
    assert got[2][SUMMARY.index("nonfinite_rows")] == 1


@pytest.mark.parametrize(
    ("seed", "first_stream"), [(0, 0), (-1, (1 << 40) - 2), ((1 << 63) - 1, -3), (-(1 << 63), 1 << 62)]
)
def test_draws_are_those_of_the_definition(host, seed, first_stream):
    """The noise itself, a step with a = b = 0 and S = 1: within 4 ulp, in every kernel version and at any length."""
    want = philox_normal(seed, torch.arange(3) + first_stream, 2051)
    # at a quarter turn the reference's own cosine is off by 2^-53 of the radius
    ulp = torch.exp2(torch.floor(torch.log2(want.abs().clamp_min(1e-9)))) * 2**-23
    for numel, dtype in ((2051, F32), (2048, F32), (2048, BF16), (301, F16)):
        nothing = torch.zeros(1, 3, numel, dtype=dtype)
        step = (None, None, [0.0, 0.0, 1.0], seed, first_stream, F32, False, False, False)
        got = host.sde_step(nothing, nothing, None, None, *step)[0][0]
        assert ((got.double() - want[:, :numel]).abs() / ulp[:, :numel]).max() <= 4


def converted(host, values, dtype):
    """``values`` as the kernels read them and write ``dtype``: a step with a = 1 and b = S = 0."""
    padded = torch.zeros(-(-values.numel() // 8) * 8, dtype=values.dtype)
    padded[: values.numel()] = values
    step = (None, None, [1.0, 0.0, 0.0], 0, 0, dtype, False, False, False)
    out = host.sde_step(padded[None, None], torch.zeros_like(padded)[None, None], None, None, *step)[0]
    return out.reshape(-1)[: values.numel()]


def assert_same_numbers(actual, expected):
    assert actual.dtype == expected.dtype
    assert torch.equal(actual.isnan(), expected.isnan())
    finite = ~expected.isnan()
    assert torch.equal(actual[finite].float(), expected[finite].float())


@pytest.mark.parametrize("dtype", [BF16, F16], ids=name_of)
def test_every_16_bit_pattern_is_read_and_written(host, dtype):
    """The host twins of the conversion instructions; torch knows the answers."""
    patterns = torch.arange(65_536, dtype=torch.int32).to(torch.int16).view(dtype)
    host.wish = Wish(64, 64, 2)
    assert_same_numbers(converted(host, patterns, F32), patterns.float())
    assert_same_numbers(converted(host, patterns, dtype), patterns)
    # around every number, midpoint and exponent
    offsets = torch.tensor([-0x8000, -0x1001, -0x1000, -1, 0, 1, 0xFFF, 0x1000, 0x1001, 0x7FFF, 0x8000, 0x8001])
    bits = patterns.float().view(torch.int32)[::7, None] + offsets.to(torch.int32)
    values = bits.reshape(-1).view(F32)
    assert_same_numbers(converted(host, values, dtype), values.to(dtype))


# --- the same from run to run


def everything(host, arguments, objective):
    rows = arguments[0].shape[0] * arguments[0].shape[1]
    torch.manual_seed(5)
    row = epilogue(objective, rows)
    out = [*host.policy_loss(*arguments, *row), *host.policy_loss_and_grad(*arguments, *row, 0.25)]
    out += [host.row_stats(*arguments, True), host.row_grad(*arguments, torch.randn(3, rows), torch.ones(1), 1.0)]
    step = (None, None, None, SAMPLER_STEP, SEED, 1, BF16, True, True, False)
    return [*out, *host.sde_step(arguments[0], arguments[1], arguments[2], *step)]


@pytest.mark.parametrize("seeded", [False, True], ids=["stored", "seeded"])
@pytest.mark.parametrize("objective", [DPPO(1e-3), GRPOGuard(0.05, 0.05, "batch")], ids=["dppo", "coupled"])
@pytest.mark.parametrize("dtypes", [MIXES[1], MIXES[5]], ids=name_of)
def test_the_order_of_threads_and_blocks_changes_no_bit(host, dtypes, objective, seeded):
    arguments = source((1, 5, 1544), dtypes, seeded=seeded)
    results = []
    for seed in range(9):
        kernels().seed(seed)
        results.append(everything(host, arguments, objective))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_workspace_is_shared_by_calls_of_any_shape(host):
    """Tickets are back at zero and scratch memory is not read before it is written, whatever ran before."""
    shapes = [(1, 7, 1544), (3, 1, 40), (1, 1, 9000), (5, 9, 260), (2, 2, 1)]
    cases = [source(shape) for shape in shapes]
    first = [everything(host, arguments, RatioClip()) for arguments in cases]
    for arguments, expected in reversed(list(zip(cases, first))):
        again = everything(host, arguments, RatioClip())
        assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))


def test_more_splits_than_threads(host):
    arguments = source((1, 2, 64 * 4 * 70 + 12), with_reference=False)
    check_stats(host, arguments)
    assert host.used[0].splits == 71
