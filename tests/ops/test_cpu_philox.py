"""The C++ backend's Philox noise: known answers, draws against the reference in float64, and the header CUDA shares."""

from __future__ import annotations

import math
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
import torch

from flowdppo_fast import backend
from flowdppo_fast.noise import philox_normal, philox_words

needs_library = pytest.mark.skipif(
    backend.problem("cpu", "cpu") is not None, reason=f"no C++ backend: {backend.problem('cpu', 'cpu')}"
)
ROOT = Path(__file__).parents[2]
F32, F64 = torch.float32, torch.float64


def draws(seed, first_stream, rows, numel, streams=None, dtype=F32):
    """The noise itself: a step with a = b = 0, S = 1."""
    nothing = torch.zeros(rows, 1, numel, dtype=dtype)
    arguments = (nothing, nothing, None, None, streams, None, [0.0, 0.0, 1.0], seed, first_stream)
    return torch.ops.flowdppo.sde_step(*arguments, dtype, False, False, False)[0].reshape(rows, numel)


def rounded(value: float) -> float:
    """To float32."""
    return struct.unpack("f", struct.pack("f", value))[0]


@needs_library
def test_philox_known_answer():
    """Salmon's vector for key 0, counter 0, then the definition in plain ``math``."""
    words = (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)
    zero = torch.zeros(1, dtype=torch.int64)
    assert tuple(int(word) for word in philox_words(0, zero, zero)) == words
    want = []
    for radius_word, angle_word in (words[:2], words[2:]):
        radius = math.sqrt(-2 * math.log(rounded(rounded(radius_word) * 2**-32 + 2**-33)))
        angle = 2 * math.pi * angle_word * 2**-32
        want += [radius * math.cos(angle), radius * math.sin(angle)]
    got = draws(0, 0, 1, 4)[0]
    torch.testing.assert_close(got.double(), torch.tensor(want, dtype=F64), rtol=4 * 2**-23, atol=0)


@needs_library
@pytest.mark.parametrize(
    ("seed", "first_stream"), [(0, 0), (1234567, 5), (-1, (1 << 40) - 2), ((1 << 63) - 1, -3), (-(1 << 63), 1 << 62)]
)
def test_draws_are_within_ulps(seed, first_stream):
    rows, numel = 4, 62_501
    want = philox_normal(seed, torch.arange(rows) + first_stream, numel)
    got = draws(seed, first_stream, rows, numel)
    # at a quarter turn the reference's own cosine is off by 2^-53 of the radius
    ulp = torch.exp2(torch.floor(torch.log2(want.abs().clamp_min(1e-9)))) * 2**-23
    assert ((got.double() - want).abs() / ulp).max() <= 4
    torch.testing.assert_close(draws(seed, first_stream, rows, 1001, dtype=F64), want[:, :1001], rtol=1e-14, atol=1e-15)


@pytest.mark.bits(across="rows")
@needs_library
def test_draws_depend_on_the_stream_alone():
    streams = torch.tensor([7, -1, 7, 1 << 50])
    got = draws(3, 0, 4, 1500, streams=streams)
    assert torch.equal(got[0], got[2])
    for row, stream in enumerate(streams.tolist()):
        assert torch.equal(got[row], draws(3, stream, 1, 1500)[0])
    # a row's head does not depend on how long it is
    assert torch.equal(draws(3, 7, 1, 37)[0], got[0, :37])


_DRIVER = """
#include <stdio.h>
#include "philox.h"
int main() {
  using namespace flowdppo;
  const auto a = philox_words(philox_key(0), 0, 0);
  const auto b = philox_words(philox_key(0xffffffffffffffff), 0xffffffffffffffff, 0xffffffffffffffff);
  const auto c = philox_words(philox_key(0x299f31d0a4093822), 0x0370734413198a2e, 0x85a308d3243f6a88);
  for (const auto& w : {a, b, c}) printf("%08x %08x %08x %08x\\n", w.w0, w.w1, w.w2, w.w3);
  float z[4];
  double exact[4];
  philox_normals(philox_key(5), 6, 7, z);
  philox_normals(philox_key(5), 6, 7, exact);
  for (int i = 0; i < 4; ++i) printf("%.9g %.17g\\n", z[i], exact[i]);
}
"""


@pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler (c++)")
def test_scalar_header_known_answers(tmp_path):
    """The same header serves CUDA: all three of Salmon's vectors, and normals of the scalar form."""
    (tmp_path / "driver.cpp").write_text("#include <initializer_list>\n" + _DRIVER)
    program = tmp_path / "driver"
    command = ["c++", "-std=c++17", "-O1", "-Wall", "-Werror", f"-I{ROOT / 'csrc'}", str(tmp_path / "driver.cpp")]
    subprocess.run([*command, "-o", str(program)], check=True)
    lines = subprocess.run([program], check=True, capture_output=True, text=True).stdout.splitlines()
    assert lines[:3] == [
        "5f6fb709 0d893f64 4f121f81 4f730a48",
        "5207ddc2 45165e59 4d8ee751 8c52f662",
        "4dfccaba 190a87f0 c47362ba b6b5242a",
    ]
    want = philox_normal(5, torch.tensor([6]), 32)[0, 28:]
    got = torch.tensor([[float(x) for x in line.split()] for line in lines[3:]], dtype=F64)
    torch.testing.assert_close(got[:, 0], want, rtol=4 * 2**-23, atol=0)
    torch.testing.assert_close(got[:, 1], want, rtol=1e-14, atol=0)
