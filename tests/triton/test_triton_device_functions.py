"""Philox, the elementary functions and row offsets, one device function at a time."""

from __future__ import annotations

import math

import pytest
import torch
from kernels_of_device_functions import (
    box_muller_kernel,
    elementary_kernel,
    normals_kernel,
    offset_kernel,
    words_kernel,
)
from problems_for_kernels import DEVICE, MARKS

from flowdppo_fast.kernels.philox import _HARDWARE
from flowdppo_fast.noise import philox_words as reference_words

pytestmark = MARKS
HARDWARE = bool(_HARDWARE)
SEEDS = [0, 1, -1, 2**63 - 1, -(2**63), 0x1234567890ABCDEF]


def scalar(value: int) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.int64, device=DEVICE)


def error_in_eps(actual: torch.Tensor, exact: torch.Tensor, smallest: float = 0.0) -> float:
    """Largest error relative to the exact value (or ``smallest``, where that is larger) in units of the dtype's eps."""
    size = exact.abs().clamp_min(max(smallest, torch.finfo(actual.dtype).tiny))
    return float(((actual.double() - exact).abs() / size).max()) / torch.finfo(actual.dtype).eps


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("stream", [0, -1, 2**40 + 3, -(2**62)])
def test_philox_words(seed, stream):
    out = torch.empty(4, 64, dtype=torch.int64, device=DEVICE)
    low = torch.cat((torch.arange(32), 2**32 - 1 - torch.arange(32)))
    for high in (0, 5):
        words_kernel[(1,)](out, low.to(DEVICE), scalar(seed), scalar(stream), scalar(high), BLOCK=64)
        expected = reference_words(seed, torch.tensor(stream), low + (high << 32))
        assert torch.equal(out.cpu(), torch.stack(expected))


def exact_pair(radius_words: torch.Tensor, angle_words: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Radius, cosine and sine by the definition in float64."""
    uniform = (radius_words.float() * 2.0**-32 + 2.0**-33).double()
    angle = angle_words.double() * 2.0**-32 * 2.0 * math.pi
    return torch.sqrt(-2.0 * torch.log(uniform)), torch.cos(angle), torch.sin(angle)


def exact_normals(seed: int, stream: int, start: int, count: int) -> torch.Tensor:
    """The definition in float64, from any element on."""
    w = reference_words(seed, torch.tensor(stream), start // 4 + torch.arange(count // 4))
    result = []
    for pair in (w[:2], w[2:]):
        r, cosine, sine = exact_pair(*pair)
        result += [r * cosine, r * sine]
    return torch.stack(result, 1).reshape(-1)


@pytest.mark.parametrize("seed", SEEDS[:3])
@pytest.mark.parametrize("start", [0, 2048 * 5, 2**31, 2**36], ids=lambda start: f"from{start}")
def test_normals_are_close_to_the_definition(seed, start):
    out = torch.empty(2048, device=DEVICE)
    normals_kernel[(1,)](out, scalar(seed), scalar(11), scalar(start), BLOCK=2048)
    exact = exact_normals(seed, 11, start, 2048)
    if HARDWARE:
        assert float((out.cpu().double() - exact).abs().max()) <= 1e-5
    else:
        # near its zeros a cosine is only as good as its angle
        assert error_in_eps(out.cpu(), exact, smallest=1.0 / 16.0) <= 4.0


def test_radius_and_angle_over_their_range():
    edges = [0, 1, 0xFF, 0x100, 0x1FF, 0xFFFFFFFF, 0xFFFFFF80, 0xFFFFFF7F, 0xFFFFFEFF, 0x20000000, 0x1FFFFFFF]
    edges += [0x60000000, 0x80000000, 0x7FFFFFFF, 0xE0000000, 0xDFFFFFFF]
    near_one = 0xFFFFFFFF - 256 * torch.arange(8192)
    # where 1 - u is around 2**-11
    middle = 0xFFE00000 + 64 * torch.arange(-4096, 4096)
    words = torch.cat((torch.tensor(edges), near_one, middle, torch.randint(0, 2**32, (16384 - len(edges),))))
    radius, cosine, sine = (torch.empty(words.numel(), device=DEVICE) for _ in range(3))
    box_muller_kernel[(4,)](words.to(DEVICE), radius, cosine, sine, BLOCK=words.numel() // 4)
    exact, *angle = exact_pair(words, words)
    radius = radius.cpu()
    if HARDWARE:
        # 2**-22 of lg2 near u = 1, and relative from u = 1/2 down
        assert float((radius.double() - exact).abs().max()) <= 6e-6
    else:
        # relative accuracy holds all the way to u = 1, where the radius is 0
        assert error_in_eps(radius[exact > 0], exact[exact > 0]) <= 2.5
    assert radius[exact == 0].tolist() == [0.0] * int((exact == 0).sum())
    for actual, expected in zip((cosine, sine), angle):
        assert float((actual.cpu().double() - expected).abs().max()) <= (1.1e-6 if HARDWARE else 2.0 * 2.0**-24)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_exp_expm1_and_log(dtype):
    tiny = torch.finfo(dtype).tiny
    small = 10.0 ** torch.linspace(-12, 0, 4096, dtype=torch.float64)
    special = torch.tensor([0.0, float("nan"), float("inf"), float("-inf"), 1.0, tiny, tiny / 8, 1e30])
    limit = 88.0 if dtype == torch.float32 else 709.0
    wide = torch.linspace(-limit, limit, 8192 - special.numel(), dtype=torch.float64)
    x = torch.cat((special.double(), wide, small, -small)).to(dtype)
    exp, expm1, logarithm = (torch.empty(x.shape, dtype=dtype, device=DEVICE) for _ in range(3))
    elementary_kernel[(8,)](x.to(DEVICE), exp, expm1, logarithm, BLOCK=x.numel() // 8)
    exact = x.double()
    functions = {"exp": (torch.exp, exp), "expm1": (torch.expm1, expm1), "log": (torch.log, logarithm)}
    for name, (function, actual) in functions.items():
        expected = function(exact)
        rounded = expected.to(dtype).double()
        finite = torch.isfinite(rounded) & (rounded.abs() >= tiny)
        assert error_in_eps(actual.cpu()[finite], expected[finite]) <= 4.0, name
        kinds = ~torch.isfinite(rounded)
        assert torch.equal(torch.nan_to_num(actual.cpu()[kinds].double()), torch.nan_to_num(rounded[kinds])), name
        assert torch.equal(torch.isnan(actual.cpu()), torch.isnan(rounded)), name


@pytest.mark.parametrize("rows1", [None, 3])
def test_row_offsets_beyond_32_bits(rows1):
    outer, inner = 2**30 + 16, 2**31 - 16
    out = torch.empty(16, dtype=torch.int64, device=DEVICE)
    offset_kernel[(1,)](out, rows1, None if rows1 is None else outer, inner, BLOCK=16)
    row = torch.arange(16)
    expected = row * inner if rows1 is None else (row // rows1) * outer + (row % rows1) * inner
    assert torch.equal(out.cpu(), expected)
