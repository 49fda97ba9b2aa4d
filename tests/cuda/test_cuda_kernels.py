"""The operators by the CUDA kernels, run by the host layer: numbers, layouts, what is read, repeatability."""

from __future__ import annotations

import math
import mmap

import pytest
import torch
from host_kernels import Wish, kernels
from kernel_checks import (
    BF16,
    F16,
    F32,
    MIXES,
    SAMPLER_STEP,
    SEED,
    check_grad,
    check_stats,
    check_step,
    coefficients_of,
    epilogue,
    name_of,
    sampler_step,
    source,
)  # fmt: skip

from flowdppo_fast import reference
from flowdppo_fast.noise import philox_normal
from flowdppo_fast.objectives import DPPO, SUMMARY, GRPOGuard, RatioClip, RowField
from flowdppo_fast.rows import Form


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
