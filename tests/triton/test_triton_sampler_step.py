"""``sde_step`` against the float64 reference."""

from __future__ import annotations

import itertools

import pytest
import torch
from problems_for_kernels import DEVICE, FIRST_STREAM, MARKS, NORMAL_SLACK, SEED
from support.tolerance import check_within

from flowdppo_fast import reference
from flowdppo_fast.kernels import launch, sde_step
from flowdppo_fast.noise import philox_normal

pytestmark = MARKS
F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
STEP = [0.93, -0.11, 0.27]


class Step:
    """Arguments of one sampler step; ``noise`` is "stored", "seeded" or "given" (a next state)."""

    def __init__(self, shape=(2, 3, 300), dtypes=F32, *, noise="stored", table=False, streams=None, out=None):
        rows = shape[0] * shape[1]
        dtypes = dtypes if isinstance(dtypes, tuple) else (dtypes,) * 3
        sample, velocity, third = (torch.randn(shape, dtype=F64).to(DEVICE, dtype) for dtype in dtypes)
        self.compute = reference.stats_dtype(sample)
        self.step = None
        if table:
            scale = torch.linspace(0.5, 1.5, rows, dtype=F64)[:, None]
            self.step = (torch.tensor([STEP], dtype=F64) * scale).to(DEVICE, self.compute)
        self.tensors = [
            sample,
            velocity,
            third if noise == "stored" else None,
            third if noise == "given" else None,
            None if streams is None else streams.to(DEVICE),
            self.step,
        ]
        self.numbers = [[] if table else STEP, SEED, FIRST_STREAM]
        self.out = out or sample.dtype

    def run(self, with_mean=True, with_log_prob=True, unnormalized=False):
        return sde_step(*self.tensors, *self.numbers, self.out, with_mean, with_log_prob, unnormalized)

    def exact(self, with_mean=True, with_log_prob=True, unnormalized=False):
        wide = [x if x is None else x.cpu() if x.dtype == torch.int64 else x.cpu().double() for x in self.tensors]
        return reference.sde_step(*wide, *self.numbers, F64, with_mean, with_log_prob, unnormalized)

    def check(self, **flags):
        actual, exact = self.run(**flags), self.exact(**flags)
        eps = torch.finfo(self.compute).eps
        seeded = NORMAL_SLACK if self.tensors[2] is None and self.tensors[3] is None else 0.0
        # products and sums of numbers up to about 5
        slack = (8 * eps + seeded) * 5.0
        check_within("next", actual[0].cpu(), exact[0], slack, self.compute)
        check_within("mean", actual[1].cpu(), exact[1], slack, self.compute)
        # a mean of squares of about 1, or with a given state of ((x'-mu)/S)**2, divided by S twice
        size = 1.0 + (0.0 if exact[2].numel() == 0 else float(exact[2].abs().max()))
        check_within("log-prob", actual[2].cpu(), exact[2], (64 * eps + 4 * seeded) * size, self.compute)
        assert actual[0].dtype == self.out
        assert actual[1].dtype == actual[2].dtype == self.compute
        assert all(x.is_contiguous() for x in actual)
        return actual


@pytest.mark.parametrize("table", [False, True])
@pytest.mark.parametrize("noise", ["stored", "seeded", "given"])
@pytest.mark.parametrize("dtype", [F32, BF16, F16, F64], ids=str)
def test_noises_and_dtypes(dtype, noise, table):
    Step(dtypes=dtype, noise=noise, table=table).check()


@pytest.mark.parametrize(
    ("dtypes", "out"),
    [((BF16, F32, F16), F32), ((F32, BF16, BF16), BF16), ((F16, F16, F32), BF16), ((F64, F64, F64), F32)],
    ids=str,
)
def test_mixed_dtypes(dtypes, out):
    Step(dtypes=dtypes, out=out).check()


@pytest.mark.parametrize("flags", list(itertools.product([False, True], repeat=3)), ids=str)
@pytest.mark.parametrize("noise", ["stored", "given"])
def test_only_what_is_asked_for(noise, flags):
    names = ("with_mean", "with_log_prob", "unnormalized")
    next_sample, mean, log_prob = Step(noise=noise).check(**dict(zip(names, flags)))
    assert next_sample.numel() == (0 if noise == "given" else 1800)
    assert mean.numel() == (1800 if flags[0] else 0)
    assert log_prob.numel() == (6 if flags[1] else 0)


@pytest.mark.parametrize("numel", [1, 3, 5, 1000, launch.BLOCK - 1, launch.BLOCK, launch.BLOCK + 1, 4099])
@pytest.mark.parametrize("noise", ["stored", "seeded", "given"])
def test_lengths_around_block_edges(numel, noise):
    Step((2, 1, numel), BF16, noise=noise).check()


def test_draws_are_those_of_the_definition():
    streams = torch.tensor([3, -4, 2**40, 3])
    for table, numbers in ((streams, streams), (None, FIRST_STREAM + torch.arange(4))):
        step = Step((4, 1, 1003), noise="seeded", streams=table)
        expected = philox_normal(SEED, numbers, 1003)
        next_sample, mean, _ = (x.cpu().double() for x in step.run())
        # undoing x' = mu + S*e brings their roundings along
        drawn = (next_sample - mean)[:, 0] / STEP[2]
        assert float((drawn - expected).abs().max()) <= NORMAL_SLACK + 8 * 2.0**-24 * 5.0 / STEP[2]


def test_a_replay_finds_the_noise_again():
    step = Step(noise="seeded")
    next_sample, _, log_prob = step.run()
    step.tensors[3] = next_sample
    again = step.run()[2]
    # e is recovered from x' - mu, whose rounding 1/S enlarges
    assert float((again - log_prob).abs().max()) <= 64 * 2.0**-24 / STEP[2]


@pytest.mark.parametrize("table", [False, True])
@pytest.mark.parametrize("with_log_prob", [False, True])
def test_rows_without_noise_keep_their_mean(table, with_log_prob):
    step = Step(table=table)
    if table:
        step.step[:, 2] = 0.0
    else:
        step.numbers[0] = [*STEP[:2], 0.0]
    step.tensors[2].fill_(float("nan"))
    next_sample, mean, _ = step.run(with_log_prob=with_log_prob)
    assert torch.isfinite(next_sample).all()
    assert torch.equal(next_sample, mean)
    step.tensors[2] = None
    assert torch.equal(step.run(with_log_prob=with_log_prob)[0], mean)


def test_some_rows_without_noise():
    step = Step((1, 4, 50), table=True)
    step.step[1, 2] = 0.0
    step.tensors[2][0, 1] = float("inf")
    actual, exact = step.run(), step.exact()
    check_within("next", actual[0].cpu(), exact[0], 8 * 2.0**-23 * 5.0, F32)
    assert torch.equal(torch.isfinite(actual[2].cpu()), torch.isfinite(exact[2]))


def test_several_blocks_per_program(monkeypatch):
    monkeypatch.setattr(launch, "_PROGRAMS", 4)
    launch.cut.cache_clear()
    try:
        assert launch.cut(2, launch.BLOCK * 11 - 3).blocks == 4
        for noise in ("seeded", "given"):
            Step((2, 1, launch.BLOCK * 11 - 3), BF16, noise=noise).check()
    finally:
        launch.cut.cache_clear()


def test_no_rows():
    for shape in ((0, 3, 10), (4, 0, 10)):
        next_sample, mean, log_prob = Step(shape, BF16).run()
        assert next_sample.shape == mean.shape == shape
        assert log_prob.shape == (0,)


def test_strided_rows():
    """Judged as all others: bits depend on how rows are aligned."""
    step = Step((3, 4, 96), BF16, noise="given")
    for index in (0, 1, 3):
        # step-major with a gap, as a trajectory is stored
        store = torch.full((5, 3, 104), float("nan"), dtype=BF16, device=DEVICE)
        step.tensors[index] = store[:4, :, :96].transpose(0, 1).copy_(step.tensors[index])
    step.check()


def test_repeats_bit_by_bit():
    step = Step((2, 2, 5000), BF16, noise="seeded")
    assert all(torch.equal(left, right) for left, right in zip(step.run(), step.run()))
