"""The operators by the CUDA kernels, run by the emulator: numbers, layouts, what is read, repeatability."""

from __future__ import annotations

import math
import mmap

import pytest
import torch
from kernel_checks import (
    BF16,
    COMPILED,
    F16,
    F32,
    MIXTURES,
    SAMPLER_STEP,
    SEED,
    check_grad,
    check_stats,
    check_step,
    coefficients_of,
    epilogue,
    name_of,
    sampler_step,
    some,
    source,
)  # fmt: skip

from flowdppo_fast import reference
from flowdppo_fast.noise import philox_normal
from flowdppo_fast.objectives import DPPO, SUMMARY, GRPOGuard, RatioClip
from flowdppo_fast.rows import Form


@pytest.mark.parametrize("seeded", [False, True], ids=["stored", "seeded"])
@pytest.mark.parametrize("dtypes", [COMPILED[0], COMPILED[1], *some([], [(COMPILED[3],), (MIXTURES[0],)])], ids=name_of)
@pytest.mark.parametrize(
    "numel", some([1, 7, 1031], [2, 3, 4, 5, 8, 9, 31, 33, 255, 256, 257, 1023, 1024, 1025, 2047, 2049, 4095, 4103])
)
def test_lengths_around_vectors_and_splits(cuda, numel, dtypes, seeded):
    # one row is aligned at any length, two are where their length is a multiple of the vector
    for shape in ((1, 1, numel), (1, 2, numel)):
        arguments = source(shape, dtypes, seeded=seeded)
        check_stats(cuda, arguments)
        check_grad(cuda, arguments)
        check_step(cuda, sampler_step(shape, dtypes[:3], noise="seeded" if seeded else "stored"))


@pytest.mark.parametrize(("form", "table"), [(Form.VELOCITY, 0), (Form.VELOCITY, 3), (Form.MEAN, 1), (Form.MEAN, 3)])
@pytest.mark.parametrize("with_reference", [False, True])
@pytest.mark.parametrize("second_moment", some([False], [True]))
def test_forms_tables_and_only_what_is_asked_for(cuda, form, table, with_reference, second_moment):
    arguments = source((2, 3, 1032), form=form, table=table, with_reference=with_reference)
    check_stats(cuda, arguments, second_moment)
    check_grad(cuda, arguments)


@pytest.mark.parametrize("gap", [0, 8, 3])
@pytest.mark.parametrize("seeded", [False, True], ids=["stored", "seeded"])
def test_strided_rows(cuda, gap, seeded):
    """Rows of a step-major store, expanded rows, and rows that no vector load fits."""
    n = 2056
    dense = source((3, 4, n), (BF16,) * 4, seeded=seeded)
    store = torch.full((6, 5, n + gap), torch.nan, dtype=BF16)
    new = store[1:5, 2:, :n].transpose(0, 1).copy_(dense[0])
    old = dense[1][:, :1].expand(3, 4, n)
    drifted = dense[3][0, 0].expand(3, 4, n)
    strided = (new, old, dense[2], drifted, *dense[4:])
    same = tuple(x.contiguous() if isinstance(x, torch.Tensor) else x for x in strided)
    check_stats(cuda, strided)
    coefficients = torch.randn(3, 12)
    grad = check_grad(cuda, strided, coefficients)
    assert torch.equal(grad, cuda.row_grad(*same, coefficients, torch.ones(1), 0.25))
    if gap != 3:
        assert torch.equal(cuda.row_stats(*strided, True), cuda.row_stats(*same, True))


def test_rows_beyond_2_to_the_31_elements(cuda):
    """In memory that is reserved but, apart from these rows, never touched."""
    far = 2**31 + 8
    memory = mmap.mmap(-1, 2 * (far + 4096))
    store = torch.frombuffer(memory, dtype=torch.uint8).view(BF16)
    dense = source((2, 1, 1024), (BF16,) * 4)
    latents = []
    for number, x in enumerate(dense[:4]):
        latents.append(store[number * 1024 :].as_strided((2, 1, 1024), (far, 1, 1)))
        latents[-1].copy_(x)
    # what is remembered of every byte would be more than there is memory
    cuda.races = False
    coefficients = torch.randn(3, 2)
    row = epilogue(DPPO(), 2)
    for op, rest in (
        (cuda.row_stats, (True,)),
        (cuda.row_grad, (coefficients, torch.ones(1), 1.0)),
        (cuda.policy_loss_and_grad, (*row, 1.0)),
    ):
        got, want = op(*latents, *dense[4:], *rest), op(*dense, *rest)
        got, want = ([x] if isinstance(x, torch.Tensor) else x for x in (got, want))
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_upstream_gradients(cuda):
    arguments = source((2, 3, 300))
    per_row = torch.randn(6)
    check_grad(cuda, arguments, upstream=per_row)
    check_grad(cuda, arguments, upstream=per_row[:1])
    # the gradient of a sum arrives expanded, with stride 0
    check_grad(cuda, arguments, upstream=per_row[2].expand(6))


@pytest.mark.parametrize("noise", ["stored", "seeded", "given"])
@pytest.mark.parametrize(
    "dtypes", some([(F32,) * 3], [((BF16,) * 3,), ((F16, BF16, F32),), ((BF16, F32, F16),)]), ids=name_of
)
@pytest.mark.parametrize("out", some([F32, BF16], [F16]), ids=name_of)
def test_sampler_step(cuda, noise, dtypes, out):
    table = (torch.tensor([SAMPLER_STEP]) * torch.linspace(0.5, 1.5, 6)[:, None]).contiguous()
    check_step(cuda, sampler_step((2, 3, 768), dtypes, noise=noise, out=out))
    check_step(cuda, sampler_step((2, 3, 301), dtypes, noise=noise, out=out, step=table, unnormalized=True))
    assert cuda.launches == 2


@pytest.mark.parametrize("with_mean", [False, True])
@pytest.mark.parametrize("with_log_prob", [False, True])
@pytest.mark.parametrize("noise", ["stored", "given"])
def test_a_sampler_step_writes_only_what_is_asked_for(cuda, noise, with_mean, with_log_prob):
    arguments = sampler_step((1, 3, 2056), noise=noise, with_mean=with_mean, with_log_prob=with_log_prob)
    got = check_step(cuda, arguments)
    assert [x.numel() for x in got] == [6168 * (noise == "stored"), 6168 * with_mean, 3 * with_log_prob]


@pytest.mark.parametrize("numel", [512, 301])
def test_a_step_without_noise_keeps_its_mean(cuda, numel):
    step = torch.tensor([[0.9, -0.1, 0.3], [0.9, -0.1, 0.0], [0.8, -0.2, 0.0]])
    for with_log_prob in (False, True):
        arguments = sampler_step((1, 3, numel), step=step, with_log_prob=with_log_prob)
        arguments[2][0, 1] = math.nan
        got = check_step(cuda, arguments)
        assert torch.equal(got[0][0, 1:], got[1][0, 1:])
        # nobody needs the noise of such a row
        if not with_log_prob and numel == 512:
            assert cuda.read(arguments[2]) == numel * 4


@pytest.mark.parametrize("dtype", [F32, BF16], ids=name_of)
@pytest.mark.parametrize("numel", [3072, 1031])
def test_every_input_is_read_once(cuda, dtype, numel):
    arguments = source((2, 3, numel), (dtype,) * 4)
    size = arguments[0].numel() * arguments[0].element_size()
    cuda.row_stats(*arguments, True)
    assert [cuda.read(x) for x in arguments[:4]] == [size] * 4
    cuda.policy_loss_and_grad(*arguments, *epilogue(DPPO(), 6), 1.0)
    assert [[cuda.read(x, launch) for x in arguments[:4]] for launch in (0, 1)] == [[size] * 4] * 2
    seeded = source((2, 3, numel), (dtype,) * 4, seeded=True, with_reference=False)
    cuda.row_grad(*seeded, coefficients_of(seeded), torch.ones(1), 1.0)
    assert [cuda.read(x) for x in seeded[:2]] == [size, size]


@pytest.mark.parametrize("numel", [1536, 301])
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=name_of)
def test_dropped_rows_are_zeros_and_their_inputs_are_not_read(cuda, dtype, numel):
    arguments = source((1, 4, numel), (dtype,) * 4, table=3)
    coefficients = torch.randn(3, 4)
    coefficients[:, 1] = 0.0
    coefficients[:, 3] = torch.tensor([0.0, math.nan, 0.0])
    clean = cuda.row_grad(*arguments, coefficients, torch.ones(1), 1.0)
    for x in (*arguments[:4], arguments[5][None]):
        x[0, 1] = math.nan
    grad = cuda.row_grad(*arguments, coefficients, torch.ones(1), 1.0)[0]
    assert torch.equal(grad[1], torch.zeros_like(grad[1]))
    assert torch.equal(grad[[0, 2]], clean[0, [0, 2]])
    # a NaN coefficient is not zero
    assert grad[3].isnan().all()
    assert [cuda.read(x) for x in arguments[:4]] == [3 * numel * grad.element_size()] * 4


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("which", some([0, 2], [1, 3]))
def test_non_finite_inputs_reach_their_row_alone(cuda, value, which):
    arguments = source((1, 3, 2062), (BF16,) * 4)
    row = epilogue(DPPO(), 3)
    clean = cuda.row_stats(*arguments, True)
    arguments[which][0, 1, 700] = value
    got, want = cuda.row_stats(*arguments, True), reference.row_stats(*arguments, True)
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got.isinf(), want.isinf())
    assert torch.equal(got[:, [0, 2]], clean[:, [0, 2]])
    got = cuda.policy_loss_and_grad(*arguments, *row, 1.0)
    want = reference.policy_loss_and_grad(*arguments, *row, 1.0)
    for ours, theirs in zip(got, want, strict=True):
        assert torch.equal(ours.isnan(), theirs.isnan())
    assert got[2][SUMMARY.index("nonfinite_rows")] == 1


@pytest.mark.parametrize(
    ("seed", "first_stream"), [(0, 0), (-1, (1 << 40) - 2), ((1 << 63) - 1, -3), (-(1 << 63), 1 << 62)]
)
def test_draws_are_those_of_the_definition(cuda, seed, first_stream):
    """The noise itself, a step with a = b = 0 and S = 1: within 1e-5, in every kernel version and at any length."""
    want = philox_normal(seed, torch.arange(3) + first_stream, 2051)
    for numel, dtype in ((2051, F32), (2048, F32), (2048, BF16), (301, F16)):
        nothing = torch.zeros(1, 3, numel, dtype=dtype)
        step = (None, None, [0.0, 0.0, 1.0], seed, first_stream, F32, False, False, False)
        got = cuda.sde_step(nothing, nothing, None, None, *step)[0][0]
        assert (got.double() - want[:, :numel]).abs().max() <= 1e-5


def converted(cuda, values, dtype):
    """``values`` as the kernels read them and write ``dtype``: a step with a = 1 and b = S = 0."""
    padded = torch.zeros(-(-values.numel() // 8) * 8, dtype=values.dtype)
    padded[: values.numel()] = values
    step = (None, None, [1.0, 0.0, 0.0], 0, 0, dtype, False, False, False)
    out = cuda.sde_step(padded[None, None], torch.zeros_like(padded)[None, None], None, None, *step)[0]
    return out.reshape(-1)[: values.numel()]


def assert_same_numbers(actual, expected):
    assert actual.dtype == expected.dtype
    assert torch.equal(actual.isnan(), expected.isnan())
    finite = ~expected.isnan()
    assert torch.equal(actual[finite].float(), expected[finite].float())


@pytest.mark.parametrize("dtype", [BF16, F16], ids=name_of)
def test_every_16_bit_pattern_is_read_and_written(cuda, dtype):
    """torch knows the answers."""
    patterns = torch.arange(65_536, dtype=torch.int32).to(torch.int16).view(dtype)
    assert_same_numbers(converted(cuda, patterns, F32), patterns.float())
    assert_same_numbers(converted(cuda, patterns, dtype), patterns)
    # around every number, midpoint and exponent
    offsets = torch.tensor([-0x8000, -0x1001, -0x1000, -1, 0, 1, 0xFFF, 0x1000, 0x1001, 0x7FFF, 0x8000, 0x8001])
    bits = patterns.float().view(torch.int32)[::7, None] + offsets.to(torch.int32)
    values = bits.reshape(-1).view(F32)
    assert_same_numbers(converted(cuda, values, dtype), values.to(dtype))


def everything(cuda, arguments, objective):
    rows = arguments[0].shape[0] * arguments[0].shape[1]
    torch.manual_seed(5)
    row = epilogue(objective, rows)
    out = [*cuda.policy_loss(*arguments, *row), *cuda.policy_loss_and_grad(*arguments, *row, 0.25)]
    out += [cuda.row_stats(*arguments, True), cuda.row_grad(*arguments, torch.randn(3, rows), torch.ones(1), 1.0)]
    step = (None, None, None, SAMPLER_STEP, SEED, 1, BF16, True, True, False)
    return [*out, *cuda.sde_step(arguments[0], arguments[1], arguments[2], *step)]


@pytest.mark.parametrize("seeded", some([False], [True]), ids=["stored", "seeded"])
@pytest.mark.parametrize(
    "objective",
    [pytest.param(DPPO(1e-3), marks=pytest.mark.full), GRPOGuard(0.05, 0.05, "batch")],
    ids=["dppo", "coupled"],
)
@pytest.mark.parametrize("dtypes", [COMPILED[1], *some([], [(MIXTURES[0],)])], ids=name_of)
def test_the_order_of_blocks_changes_no_bit(cuda, dtypes, objective, seeded):
    arguments = source((1, 3, 4104), dtypes, seeded=seeded)
    results = []
    for cuda.seed, cuda.resident in ((None, None), (1, 4), (2, 1)):
        results.append(everything(cuda, arguments, objective))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_calls_of_any_shape_follow_each_other(cuda):
    """Tickets are back at zero and scratch memory is not read before it is written, whatever ran before."""
    shapes = [(1, 3, 2056), (3, 1, 40), (2, 2, 1)]
    cases = [source(shape) for shape in shapes]
    first = [everything(cuda, arguments, RatioClip()) for arguments in cases]
    for arguments, expected in reversed(list(zip(cases, first))):
        again = everything(cuda, arguments, RatioClip())
        assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))


@pytest.mark.full
def test_more_splits_than_threads(cuda):
    arguments = source((1, 1, 1024 * 300 + 12), with_reference=False)
    check_stats(cuda, arguments)
    assert cuda.launched[-1].blocks == 301


@pytest.mark.parametrize("dtypes", [MIXTURES[0], *some([], [(x,) for x in MIXTURES[1:]])], ids=name_of)
def test_mixtures_are_those_of_their_casts(cuda, dtypes):
    """Bit for bit: the kernels get what float32 holds exactly, and the gradient is rounded once."""
    arguments = source((2, 3, 1032), dtypes)
    wide = tuple(x.float() if isinstance(x, torch.Tensor) else x for x in arguments)
    row = epilogue(DPPO(), 6)
    got, want = (cuda.policy_loss_and_grad(*x, *row, 0.25) for x in (arguments, wide))
    assert all(torch.equal(a, b) for a, b in zip(got[:3], want[:3], strict=True))
    assert torch.equal(got[3], want[3].to(dtypes[0]))
    assert torch.equal(cuda.row_stats(*arguments, True), cuda.row_stats(*wide, True))
    coefficients = coefficients_of(arguments)
    grads = [cuda.row_grad(*x, coefficients, torch.ones(1), 1.0) for x in (arguments, wide)]
    assert grads[0].dtype == dtypes[0]
    assert torch.equal(grads[0], grads[1].to(dtypes[0]))
    check_step(cuda, sampler_step((2, 3, 1032), dtypes[:3]))
