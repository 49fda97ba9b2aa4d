"""Seeded noise: the generator's published vectors, the distribution, and who reads which stream."""

from __future__ import annotations

import math
import struct

import pytest
import torch

from flowdppo_fast import PhiloxNoise, SDEStep, row_statistics
from flowdppo_fast.noise import philox_normal, philox_words

# Random123's known-answer vectors for philox4x32 with 7 rounds: counter, key, words
KNOWN = [
    (
        (0x00000000, 0x00000000, 0x00000000, 0x00000000),
        (0x00000000, 0x00000000),
        (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48),
    ),
    (
        (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF),
        (0xFFFFFFFF, 0xFFFFFFFF),
        (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A),
    ),
]


def signed(low: int, high: int) -> torch.Tensor:
    value = low | high << 32
    return torch.tensor([value - (1 << 64) if value >> 63 else value])


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_published_words(counter, key, words):
    got = philox_words(key[0] | key[1] << 32, signed(*counter[2:]), signed(*counter[:2]))
    assert tuple(int(word) for word in got) == words


def rounded(value: float) -> float:
    """To float32."""
    return struct.unpack("f", struct.pack("f", value))[0]


def box_muller(seed: int, stream: int, element: int) -> float:
    """One draw by the definition in ``noise.py``, in python numbers."""
    words = philox_words(seed, torch.tensor([stream]), torch.tensor([element // 4]))
    first, second = words[element % 4 // 2 * 2 : element % 4 // 2 * 2 + 2]
    radius = math.sqrt(-2.0 * math.log(rounded(rounded(int(first)) * 2.0**-32 + 2.0**-33)))
    angle = 2.0 * math.pi * int(second) * 2.0**-32
    return radius * (math.cos(angle) if element % 2 == 0 else math.sin(angle))


def test_definition_of_a_draw():
    noise = philox_normal(123456789, torch.tensor([7, 2**40]), 11)
    for row, stream in enumerate((7, 2**40)):
        expected = [box_muller(123456789, stream, i) for i in range(11)]
        assert noise[row].tolist() == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_distribution():
    """Moments, tail and neighbour correlation of 2**20 draws, each within five standard errors."""
    count = 1 << 20
    z = philox_normal(2024, torch.arange(16), count // 16).flatten()
    moments = {1: (0.0, 1.0), 2: (1.0, 2.0), 3: (0.0, 15.0), 4: (3.0, 96.0)}
    for power, (expected, variance) in moments.items():
        assert abs(float((z**power).mean()) - expected) < 5 * math.sqrt(variance / count)
    beyond_two = math.erfc(2 / math.sqrt(2))
    assert abs(float((z.abs() > 2).double().mean()) - beyond_two) < 5 * math.sqrt(beyond_two / count)
    for lag in (1, 2, 3, 4):
        assert abs(float((z[lag:] * z[:-lag]).mean())) < 5 / math.sqrt(count)
    assert float(z.abs().max()) <= math.sqrt(2 * 33 * math.log(2.0)) + 1e-12


def test_distribution_function():
    """Kolmogorov and Smirnov's distance from the normal distribution, at the level of one in a thousand."""
    z = philox_normal(77, torch.arange(64), 1 << 14).flatten().sort().values
    expected = 0.5 * torch.erfc(-z / math.sqrt(2.0))
    place = torch.arange(z.numel() + 1, dtype=torch.float64) / z.numel()
    distance = torch.maximum(expected - place[:-1], place[1:] - expected).max()
    assert float(distance) * math.sqrt(z.numel()) < 1.95


@pytest.mark.parametrize("neighbour", ["block", "stream", "seed"])
def test_words_of_neighbours_have_nothing_in_common(neighbour):
    """Counters and keys that differ in one bit: every bit of every word flips half of the time."""
    count = 1 << 12
    number, zero = torch.arange(count), torch.tensor([0])
    if neighbour == "seed":
        blocks = torch.arange(count // 32)
        pairs = [(philox_words(s, zero, blocks), philox_words(s ^ 1, zero, blocks)) for s in range(0, 64, 2)]
        first, second = (torch.stack([torch.cat(words) for words in side]).reshape(-1) for side in zip(*pairs))
    else:
        arguments = (lambda x: (zero, x)) if neighbour == "block" else (lambda x: (x, zero))
        first, second = (torch.cat(philox_words(5, *arguments(x))) for x in (2 * number, 2 * number + 1))
    flips = ((first ^ second)[:, None] >> torch.arange(32)) & 1
    # 4 words of 32 bits
    rate = flips.double().reshape(4, -1, 32).mean(1)
    assert float((rate - 0.5).abs().max()) < 5 * 0.5 / math.sqrt(count)


def test_streams_and_seeds_are_independent():
    z = philox_normal(1, torch.arange(8), 4096)
    other = philox_normal(2, torch.arange(8), 4096)
    correlation = torch.corrcoef(torch.cat((z, other)))
    assert float((correlation - torch.eye(16)).abs().max()) < 5 / math.sqrt(4096)


@pytest.mark.bits(across="rows")
def test_an_int_stream_counts_rows():
    counted = PhiloxNoise(3, 40).materialize((4, 2, 5))
    listed = PhiloxNoise(3, torch.tensor([40, 41, 42, 43])).materialize((4, 2, 5))
    assert torch.equal(counted, listed)
    # rows [2, 3] are counted row by row
    stacked = PhiloxNoise(3, 40).materialize((2, 3, 5), row_dims=2)
    assert torch.equal(stacked.flatten(0, 1), PhiloxNoise(3, 40).materialize((6, 5)))


def test_seeds_are_64_bits():
    a = PhiloxNoise(5).materialize((1, 64))
    assert not torch.equal(a, PhiloxNoise(5 + 2**32).materialize((1, 64)))
    assert not torch.equal(a, PhiloxNoise(5 + 2**63).materialize((1, 64)))
    assert torch.equal(PhiloxNoise(-1).materialize((1, 64)), PhiloxNoise(2**64 - 1).materialize((1, 64)))


@pytest.mark.bits(across="rows")
def test_a_prefix_does_not_depend_on_the_length():
    long = PhiloxNoise(5, 1).materialize((2, 103))
    for length in (1, 2, 3, 4, 5, 100):
        assert torch.equal(PhiloxNoise(5, 1).materialize((2, length)), long[:, :length])


@pytest.mark.parametrize("numel", [1, 4, 105, 1027])
def test_every_backend_draws_the_same_normals(backend, numel):
    """With ``u`` one-hot, P is the draw itself over N: as close to the float64 definition as ``noise.py`` says."""
    step = SDEStep(1.0, -1.0, 1.0, -0.1)
    elements = sorted({0, numel // 3, numel // 2, numel - 1})
    for element in elements:
        old = torch.zeros(64, numel, device=backend.device)
        new = old.clone()
        new[:, element] = -float(numel)
        p, _ = row_statistics(new, old, PhiloxNoise(17, 2**33), step, backend=backend.name)
        expected = philox_normal(17, torch.arange(2**33, 2**33 + 64), numel)[:, element]
        # the factor N and the division by it cost two roundings
        bound = 6 * torch.finfo(torch.float32).eps * expected.abs().clamp_min(2.0**-12)
        if backend.name in ("triton", "cuda"):
            bound += 1e-5
        assert bool(((p.cpu().double() - expected).abs() <= bound).all())


@pytest.mark.bits(across="rows")
def test_shuffled_rows_keep_their_draws(backend):
    g = torch.Generator().manual_seed(0)
    velocity, old = (torch.randn(6, 3, 7, generator=g).to(backend.device) for _ in range(2))
    step = SDEStep.from_sigmas("dance", 0.7, 0.6)
    streams = torch.arange(100, 106, device=backend.device)
    p, q = row_statistics(velocity, old, PhiloxNoise(9, streams), step, backend=backend.name)
    order = torch.tensor([4, 1, 5, 0, 3, 2], device=backend.device)
    shuffled = row_statistics(velocity[order], old[order], PhiloxNoise(9, streams[order]), step, backend=backend.name)
    assert torch.equal(shuffled[0], p[order])
    assert torch.equal(shuffled[1], q[order])
    # a micro-batch taken out of the middle
    part = row_statistics(velocity[2:4], old[2:4], PhiloxNoise(9, streams[2:4]), step, backend=backend.name)
    assert torch.equal(part[0], p[2:4])
    counted = row_statistics(velocity, old, PhiloxNoise(9, 100), step, backend=backend.name)
    assert torch.equal(counted[0], p)


def test_a_step_and_its_loss_see_the_same_noise(backend):
    """Rollout draws from a seed, training regenerates from it: the ratio of the rollout policy with itself is 1."""
    from flowdppo_fast import fused_dppo_velocity_loss, sde_step

    g = torch.Generator().manual_seed(1)
    state, velocity, new = (torch.randn(4, 3, 5, generator=g).to(backend.device) for _ in range(3))
    step, noise = SDEStep.from_sigmas("dance", 0.7, 0.6), PhiloxNoise(3, 12)
    drawn = sde_step(state, velocity, step, noise=noise, return_mean=True, backend=backend.name)
    e = (drawn.prev_sample - drawn.mean) / step.std
    assert drawn.noise is noise
    advantages = torch.ones(4, device=backend.device)
    seeded = fused_dppo_velocity_loss(new, velocity, noise, step, advantages, backend=backend.name)
    stored = fused_dppo_velocity_loss(new, velocity, e, step, advantages, backend=backend.name)
    torch.testing.assert_close(seeded.rows.log_ratio, stored.rows.log_ratio, rtol=1e-4, atol=1e-5)
    same = fused_dppo_velocity_loss(velocity, velocity, noise, step, advantages, backend=backend.name)
    assert same.rows.ratio.tolist() == [1.0] * 4
