"""The C++ backend alone: instruction sets, threads, conversions, corners. Operators are called on canonical
tensors; the reference in float64 is the truth."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flowdppo_fast import backend, reference
from flowdppo_fast.objectives import DPPO, SUMMARY, EpilogueOptions, GRPOGuard, RatioClip, RowField
from flowdppo_fast.rows import RowSource

pytestmark = pytest.mark.skipif(
    backend.problem("cpu", "cpu") is not None, reason=f"no C++ backend: {backend.problem('cpu', 'cpu')}"
)
ops = torch.ops.flowdppo

ROOT = Path(__file__).parents[2]
ISA_VARIABLE = "FLOWDPPO_CPU_ISA"
UNIT = 2.0**-24  # rounding unit of float32
# float32 additions before a sum goes to double: 16 in a lane, 2 between accumulators; and products, k, result
DEPTH = 16 + 2 + 4
CHUNK = 16384
STEP = [0.37, -0.83, 0.05]
LENGTHS = [*range(1, 71), 127, 1000, 1023, 1024, 1025, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 1, 70_001]
HALF_UNIT = {torch.float32: UNIT, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float64: 2.0**-53}
SMALLEST = {torch.float32: 2.0**-149, torch.bfloat16: 2.0**-133, torch.float16: 2.0**-25, torch.float64: 0.0}
F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
# new, old, noise, reference: the direct paths first, then mixtures that are converted block by block
MIXTURES = [
    (F32, F32, F32, F32),
    (BF16, BF16, BF16, BF16),
    (F16, F16, F16, F16),
    (BF16, BF16, F32, BF16),
    (F16, F16, F32, F16),
    (F64, F64, F64, F64),
    (BF16, F32, BF16, F16),
    (F32, BF16, F16, BF16),
    (F16, BF16, F32, F32),
]


def child(command: list[str], isa: str, timeout: float = 240) -> subprocess.CompletedProcess:
    environment = {**os.environ, ISA_VARIABLE: isa}
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=timeout)


def source(mixture, numel, *, form=0, seeded=False, with_reference=True, shape=(3, 2), step=STEP):
    """Arguments of an operator up to ``form``; differences of a few percent, as between two policies."""
    new_dtype, old_dtype, noise_dtype, reference_dtype = mixture
    old = torch.randn(*shape, numel, dtype=F64)
    new = (old + 0.1 * torch.randn(*shape, numel, dtype=F64)).to(new_dtype)
    noise = None if seeded else torch.randn(*shape, numel, dtype=F64).to(noise_dtype)
    drifted = (old + 0.1 * torch.randn(*shape, numel, dtype=F64)).to(reference_dtype) if with_reference else None
    return (new, old.to(old_dtype), noise, drifted, None, None, list(step), -7, 5, form)


def in_double(arguments):
    return tuple(x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in arguments)


def magnitudes(arguments):
    """``[4, R]``: sums of the absolute terms of P, Q, E, R, what float32 rounding is relative to."""
    u, e, w, _ = reference._differences(RowSource(*in_double(arguments)))
    w = torch.zeros_like(u) if w is None else w
    return torch.stack([term.abs().mean(1) for term in (e * u, u * u, e * e, w * w)])


def epilogue_arguments(objective, rows, dtype, *, kl_weight=0.0):
    options = EpilogueOptions.make(objective, kl_weight=kl_weight)
    advantages, weights = torch.randn(rows, dtype=dtype), torch.rand(rows, dtype=dtype)
    return advantages, weights, None, options.ints, options.floats


def check_stats(arguments):
    unit = 2.0**-53 if arguments[0].dtype == F64 else UNIT
    got = ops.row_stats(*arguments, True)
    want = reference.row_stats(*in_double(arguments), True)
    # generated float32 noise is a few ulp from the reference's float64 draws
    depth = DEPTH + (4 if arguments[2] is None and unit == UNIT else 0)
    torch.testing.assert_close(got.double(), want, rtol=0, atol=math.inf)
    excess = (got.double() - want).abs() - depth * unit * magnitudes(arguments)
    assert excess.max() <= 0, f"error beyond rounding by {excess.max():.2e}"


def check_grad(arguments, coefficients, factor=0.7):
    new = arguments[0]
    ones = torch.ones(1, dtype=coefficients.dtype)
    got = ops.row_grad(*arguments, coefficients, ones, factor)
    want = reference.row_grad(*in_double(arguments), coefficients.double(), ones.double(), factor)
    assert got.dtype == new.dtype
    assert got.shape == new.shape
    assert got.is_contiguous()
    unit = 2.0**-53 if new.dtype == F64 else UNIT
    u, e, w, k = reference._differences(RowSource(*in_double(arguments)))
    terms = [coefficients[0].double()[:, None] * e, 2 * coefficients[1].double()[:, None] * u]
    if w is not None:
        terms.append(2 * coefficients[2].double()[:, None] * w)
    size = sum(term.abs() for term in terms) * k.abs() * factor / new.shape[2]
    allowed = HALF_UNIT[new.dtype] * want.abs() + SMALLEST[new.dtype] + 12 * unit * size.reshape(want.shape)
    excess = (got.double() - want).abs() - allowed
    assert excess.max() <= 0, f"error beyond rounding by {excess.max():.2e}"


@pytest.mark.parametrize("numel", LENGTHS)
def test_lengths(numel):
    for mixture in (MIXTURES[0], MIXTURES[3], MIXTURES[6]):
        arguments = source(mixture, numel)
        check_stats(arguments)
        check_grad(arguments, torch.randn(3, 6))


@pytest.mark.parametrize("seeded", [False, True])
@pytest.mark.parametrize("with_reference", [False, True])
@pytest.mark.parametrize("form", [reference.Form.VELOCITY, reference.Form.MEAN])
@pytest.mark.parametrize("mixture", MIXTURES, ids=lambda m: "-".join(str(d)[6:] for d in m))
def test_mixtures(mixture, form, with_reference, seeded):
    if seeded and form == reference.Form.MEAN:
        with pytest.raises(RuntimeError, match="drawn: got None"):
            ops.row_stats(*source(mixture, 9, form=form, seeded=True), True)
        return
    arguments = source(mixture, CHUNK + 100, form=form, seeded=seeded, with_reference=with_reference)
    check_stats(arguments)
    dtype = reference.stats_dtype(arguments[0])
    check_grad(arguments, torch.randn(3, 6, dtype=dtype))
    second_moment_off = ops.row_stats(*arguments, False)
    assert torch.equal(second_moment_off[2], torch.zeros(6, dtype=dtype))
    assert torch.equal(second_moment_off[[0, 1, 3]], ops.row_stats(*arguments, True)[[0, 1, 3]])


def test_sums_are_as_accurate_as_eager():
    ours, eager = [], []
    for _ in range(10):
        arguments = source(MIXTURES[1], 65_536, shape=(4, 1))
        want = reference.row_stats(*in_double(arguments), True)
        scale = magnitudes(arguments)
        ours.append(((ops.row_stats(*arguments, True) - want).abs() / scale).mean())
        eager.append(((reference.row_stats(*arguments, True) - want).abs() / scale).mean())
    assert sum(ours) <= sum(eager)


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set_passes_this_folder(isa):
    if isa == ops.cpu_isa():
        # this very run is the test
        return
    if ISA_VARIABLE in os.environ:
        pytest.skip(f"this run is forced to {os.environ[ISA_VARIABLE]}")
    ask = "import torch, flowdppo_fast; print(torch.ops.flowdppo.cpu_isa())"
    probe = child([sys.executable, "-c", ask], isa)
    if probe.returncode != 0:
        assert f"{ISA_VARIABLE}: got '{isa}'" in probe.stderr
        pytest.skip(f"this machine or build has no {isa}: {probe.stderr.strip().splitlines()[-1]}")
    assert probe.stdout.strip() == isa
    folder = Path(__file__).parent
    # what streams no latents is compiled once, for all instruction sets
    rest = f"--ignore={folder / 'test_log_prob_loss.py'}"
    result = child([sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(folder), rest], isa)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]


@pytest.mark.parametrize("isa", ["sse9", ""])
def test_unknown_instruction_set_is_an_error(isa):
    probe = child([sys.executable, "-c", "import torch, flowdppo_fast; torch.ops.flowdppo.cpu_isa()"], isa)
    assert probe.returncode != 0
    assert f"{ISA_VARIABLE}: got '{isa}'" in probe.stderr
    assert "baseline" in probe.stderr


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.bits(across="threads")
@pytest.mark.parametrize("seeded", [False, True])
@pytest.mark.parametrize(("rows", "numel"), [(5, 3 * CHUNK + 5), (8, CHUNK), (1, 20 * CHUNK + 1), (300, 700)])
@pytest.mark.parametrize("objective", [DPPO(threshold=1e-3), GRPOGuard(low=0.05, high=0.05, bias="batch")])
@pytest.mark.parametrize("mixture", [MIXTURES[3], MIXTURES[5]], ids=["bfloat16", "float64"])
def test_thread_count_changes_no_bit(threads, rows, numel, seeded, objective, mixture):
    # float64 shows every change in the order of sums, float32 only large ones
    arguments = source(mixture, numel, seeded=seeded, shape=(rows, 1))
    compute = reference.stats_dtype(arguments[0])
    epilogue = epilogue_arguments(objective, rows, compute, kl_weight=0.1)
    results = []
    for count in (1, 2, 4):
        threads(count)
        single = ops.policy_loss_and_grad(*arguments, *epilogue, 0.25)
        twice = ops.policy_loss(*arguments, *epilogue)
        grad = ops.row_grad(*arguments, twice[1][RowField.GRAD_P :], torch.ones(1, dtype=compute), 0.25)
        step = ops.sde_step(
            arguments[0], arguments[1], arguments[2], None, None, None, [0.9, -0.1, 0.3], 3, 4, BF16, True, True, False
        )
        results.append((*single, *twice, grad, ops.row_stats(*arguments, True), *step))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    loss, rows_out, summary, single_grad, *rest = results[0]
    assert torch.equal(loss, rest[0])
    assert torch.equal(rows_out, rest[1])
    assert torch.equal(summary, rest[2])
    # the single pass writes the very gradient of the two separate ones
    assert torch.equal(single_grad, rest[3])


@pytest.mark.parametrize("numel", [1, 63, 1025, 262_144])
@pytest.mark.parametrize("dtype", [F32, BF16, F16, F64])
def test_every_element_is_written(dtype, numel):
    """Fresh memory is NaN under the deterministic fill that conftest switches on, so a gap would show."""
    poisoned = torch.empty(1000, dtype=dtype)
    assert poisoned.isnan().all()
    compute = torch.float64 if dtype == F64 else torch.float32
    # 16 rows of 262,144 elements also take the stores that bypass the caches
    arguments = source((dtype,) * 4, numel, shape=(8, 2), with_reference=False)
    rows = 16
    results = ops.policy_loss_and_grad(*arguments, *epilogue_arguments(RatioClip(), rows, compute), 1.0)
    results += ops.policy_loss(*arguments, *epilogue_arguments(DPPO(), rows, compute))
    results += (ops.row_stats(*arguments, False),)
    results += (ops.row_grad(*arguments, torch.ones(3, rows, dtype=compute), torch.ones(rows, dtype=compute), 1.0),)
    for out in (F32, BF16, F16, F64):
        results += ops.sde_step(*arguments[:3], None, None, None, [0.9, -0.1, 0.3], 3, 4, out, True, True, False)
    assert not any(result.isnan().any() for result in results)


def converted(values, dtype):
    """``values`` through the sampler's loads and stores: a = 1, no noise; b*v is -0 so that even -0 survives."""
    rows = values.reshape(1, 1, -1)
    arguments = (rows, torch.full_like(rows, -0.0), None, None, None, None, [1.0, 0.0, 0.0], 0, 0)
    return ops.sde_step(*arguments, dtype, False, False, False)[0].reshape(-1)


def assert_same_bits(got, want):
    assert torch.equal(got.isnan(), want.isnan())
    integer = torch.int16 if want.element_size() == 2 else torch.int32
    finite = ~want.isnan()
    assert torch.equal(got.view(integer)[finite], want.view(integer)[finite])


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_every_16_bit_pattern_is_read_and_written(dtype):
    patterns = torch.arange(65_536, dtype=torch.int32).to(torch.int16).view(dtype)
    assert_same_bits(converted(patterns, F32), patterns.float())
    assert_same_bits(converted(patterns, dtype), patterns)


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_rounding_to_16_bits(dtype):
    """To nearest, ties to even: around every representable number, its midpoints, and every exponent of float32."""
    patterns = torch.arange(65_536, dtype=torch.int32).to(torch.int16).view(dtype).float().view(torch.int32)
    upper = torch.arange(65_536, dtype=torch.int64).mul(65_536).to(torch.int32)
    offsets = torch.tensor([-0x8000, -0x1001, -0x1000, -1, 0, 1, 0xFFF, 0x1000, 0x1001, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    bits = torch.cat([patterns, upper])[:, None] + offsets.to(torch.int32)
    values = bits.reshape(-1).view(F32)
    assert_same_bits(converted(values, dtype), values.to(dtype))


@pytest.mark.parametrize("dtype", [F32, BF16, F16, F64])
def test_dropped_rows_are_zeros_whatever_they_hold(dtype):
    compute = torch.float64 if dtype == F64 else torch.float32
    arguments = source((dtype,) * 4, 3000, shape=(2, 2))
    for latents in arguments[:4]:
        latents[0, 1] = math.nan
    coefficients = torch.randn(3, 4, dtype=compute)
    coefficients[:, 1] = 0.0
    coefficients[:, 2] = torch.tensor([0.0, math.nan, 0.0])
    grad = ops.row_grad(*arguments, coefficients, torch.ones(1, dtype=compute), 1.0).reshape(4, -1)
    assert torch.equal(grad[1], torch.zeros_like(grad[1]))
    # a NaN coefficient is not zero
    assert grad[2].isnan().all()
    assert not grad[[0, 3]].isnan().any()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [F32, BF16, F16, F64])
def test_non_finite_inputs_reach_their_row(dtype, value):
    compute = torch.float64 if dtype == F64 else torch.float32
    for which in range(4):
        arguments = source((dtype,) * 4, 1500, shape=(3, 1))
        arguments[which][1, 0, 1234] = value
        epilogue = epilogue_arguments(DPPO(), 3, compute, kl_weight=0.1)
        got, want = (op(*arguments, True) for op in (ops.row_stats, reference.row_stats))
        assert torch.equal(got.isnan(), want.isnan())
        assert torch.equal(got.isinf(), want.isinf())
        got, want = (f(*arguments, *epilogue, 1.0) for f in (ops.policy_loss_and_grad, reference.policy_loss_and_grad))
        for ours, theirs in zip(got, want, strict=True):
            assert torch.equal(ours.isnan(), theirs.isnan())
        assert got[0].isnan() or not math.isnan(value)
        assert got[2][SUMMARY.index("nonfinite_rows")] == 1


def test_large_and_tiny_values():
    for scale in (1e-18, 1e15):
        arguments = source(MIXTURES[0], 5000)
        arguments = (*(latents * scale for latents in arguments[:4]), *arguments[4:])
        check_stats(arguments)
        check_grad(arguments, torch.randn(3, 6))


@pytest.mark.parametrize("objective", [DPPO(threshold=0.125), DPPO(threshold=0.125, symmetric=True)])
def test_threshold_tie_counts_as_far(objective):
    # u = 1/2 everywhere: Q = 1/4 and D = 1/8 exactly, moving away with A > 0
    new, old, noise = torch.full((2, 1, 64), 0.5), torch.zeros(2, 1, 64), torch.ones(2, 1, 64)
    new[1] *= 1 - 2**-20
    arguments = (new, old, noise, None, None, None, [1.0, 1.0, 0.1], 0, 0, 0)
    options = EpilogueOptions.make(objective)
    _, rows, summary = ops.policy_loss(*arguments, torch.ones(2), None, None, options.ints, options.floats)
    assert rows[RowField.KL, 0] == 0.125
    assert rows[RowField.KEPT].tolist() == [0.0, 1.0]
    assert rows[RowField.LOSS, 0] == 0.0
    assert not rows[RowField.GRAD_P :, 0].any()
    assert summary[SUMMARY.index("masked_fraction")] == 0.5


def test_step_without_noise_keeps_its_mean():
    sample, velocity = torch.randn(2, 2, 2000), torch.randn(2, 2, 2000)
    noise = torch.randn(2, 2, 2000)
    noise[0, 1] = math.nan
    step = torch.tensor([[0.9, -0.1, 0.3], [0.9, -0.1, 0.0], [0.8, -0.2, 0.0], [0.8, -0.2, 0.4]])
    for with_log_prob in (False, True):
        arguments = (sample, velocity, noise, None, None, step, [], 0, 0, F32, True, with_log_prob, False)
        got, want = ops.sde_step(*arguments), reference.sde_step(*arguments)
        for ours, theirs in zip(got, want, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6, equal_nan=True)
        next_sample, mean = (x.reshape(4, -1) for x in got[:2])
        assert torch.equal(next_sample[1:3], mean[1:3])
        assert not next_sample.isnan().any()


@pytest.mark.parametrize("unnormalized", [False, True])
@pytest.mark.parametrize("out", [F32, BF16, F16, F64])
@pytest.mark.parametrize("dtypes", [(F32, F32, F32), (BF16, BF16, BF16), (F16, BF16, F32), (F64, F64, F64)])
def test_sampler_step(dtypes, out, unnormalized):
    numel = CHUNK + 77
    sample, velocity, noise = (torch.randn(2, 3, numel).to(dtype) for dtype in dtypes)
    step = [0.93, -0.21, 0.4]
    for drawn, given in ((noise, None), (None, None), (None, noise)):
        arguments = (sample, velocity, drawn, given, None, None, step, 5, 6, out, True, True, unnormalized)
        got, want = ops.sde_step(*arguments), reference.sde_step(*in_double(arguments))
        assert got[0].dtype == out
        unit = 2.0**-53 if sample.dtype == F64 else UNIT
        size = 4 * (sample.double().abs() + velocity.double().abs() + 6)
        if given is None:
            rounding = HALF_UNIT[out] if out != F64 else unit
            allowed = 1.001 * rounding * want[0].double().abs() + SMALLEST[out] + 4 * unit * size
            # the reference rounds to `out` as well
            assert ((got[0].double() - want[0].double()).abs() <= allowed + rounding * size).all()
        else:
            assert got[0].numel() == 0
        assert ((got[1].double() - want[1]).abs() <= 4 * unit * size).all()
        torch.testing.assert_close(got[2].double(), want[2], rtol=2 * DEPTH * unit, atol=2 * DEPTH * unit)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0)])
@pytest.mark.parametrize("dtype", [F32, BF16, F64])
def test_no_rows(shape, dtype):
    compute = torch.float64 if dtype == F64 else torch.float32
    for seeded in (False, True):
        arguments = source((dtype,) * 4, 33, shape=shape, seeded=seeded)
        stored = source((dtype,) * 4, 33, shape=shape)
        want = reference.policy_loss_and_grad(*stored, *epilogue_arguments(DPPO(), 0, compute), 1.0)
        for objective in (DPPO(), GRPOGuard(bias="batch")):
            got = ops.policy_loss_and_grad(*arguments, *epilogue_arguments(objective, 0, compute), 1.0)
            for ours, theirs in zip(got, want, strict=True):
                assert ours.dtype == theirs.dtype
                torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
        assert ops.row_stats(*arguments, True).shape == (4, 0)
        grad = ops.row_grad(*arguments, torch.ones(3, 0, dtype=compute), torch.ones(1, dtype=compute), 1.0)
        assert grad.shape == (*shape, 33)
        step = ops.sde_step(*arguments[:3], None, None, None, STEP, 0, 0, BF16, True, True, False)
        assert [tuple(x.shape) for x in step] == [(*shape, 33), (*shape, 33), (0,)]


@pytest.mark.bits(across="layout")
def test_row_strides_and_alignment():
    numel = 1500
    trajectory = torch.randn(3, 9, numel + 1).to(BF16)
    arguments = source(MIXTURES[3], numel, shape=(3, 4))
    new = trajectory[:, 1:8:2, 1:]
    old = torch.randn(1, 4, numel).to(BF16).expand(3, 4, numel)
    noise = torch.randn(3, 1, numel + 1)[:, :, 1:].expand(3, 4, numel)
    drifted = torch.randn(numel).to(BF16).expand(3, 4, numel)
    strided = (new, old, noise, drifted, *arguments[4:])
    dense = tuple(x.contiguous() if isinstance(x, torch.Tensor) else x for x in strided)
    assert torch.equal(ops.row_stats(*strided, True), ops.row_stats(*dense, True))
    coefficients = torch.randn(3, 12)
    upstream = torch.randn(1).expand(12)
    got = ops.row_grad(*strided, coefficients, upstream, 1.0)
    assert torch.equal(got, ops.row_grad(*dense, coefficients, upstream.contiguous(), 1.0))
    check_stats(strided)
    check_grad(strided, coefficients)
    single = torch.randn(2, 4, 1).transpose(0, 1)
    check_stats((single, single + 1, single * 2, None, *arguments[4:]))


def test_step_tables_and_streams():
    rows = 6
    streams = torch.randint(-(1 << 40), 1 << 40, (rows,))
    table = torch.rand(rows, 3) + 0.2
    velocity = source(MIXTURES[0], 500, seeded=True)
    check_stats((*velocity[:4], streams, table, [], *velocity[7:]))
    check_grad((*velocity[:4], streams, table, [], *velocity[7:]), torch.randn(3, rows))
    mean = source(MIXTURES[0], 500, form=reference.Form.MEAN)
    for step in (table, table[:, :1].contiguous()):
        check_stats((*mean[:5], step, [], *mean[7:]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({1: torch.zeros(3, 2, 65)}, r"old: got shape \[3, 2, 65\], expected"),
        ({1: torch.zeros(3, 2, 64, dtype=F64)}, "old: got dtype Double, but either all latents"),
        ({2: torch.zeros(3, 2, 64, dtype=torch.int32)}, "drawn: got dtype Int, expected Float, BFloat16"),
        ({0: torch.zeros(3, 64)}, r"new: got shape \[3, 64\], expected \[R0, R1, N\]"),
        ({0: torch.zeros(3, 2, 0)}, "new: got shape"),
        ({0: torch.zeros(3, 64, 2).transpose(1, 2)}, "new: got stride 2 in the last dim"),
        ({4: torch.zeros(6)}, "streams: got Float"),
        ({5: torch.zeros(6, 2)}, "step: got shape"),
        ({5: torch.zeros(6, 1)}, "step: got shape"),
        ({5: torch.zeros(6, 3, dtype=F64)}, "step: got dtype Double, expected Float"),
        ({6: [1.0]}, "step_values: got 1 numbers"),
        ({9: 3}, "form: got 3"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    arguments = list(source(MIXTURES[0], 64))
    for index, value in change.items():
        arguments[index] = value
    with pytest.raises(RuntimeError, match=message):
        ops.row_stats(*arguments, True)
