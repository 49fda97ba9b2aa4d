"""What an installed wheel must do where there is no compiler: load its library, and give the reference's numbers.

``--pure`` is for a wheel without any library, which must work all the same and say what it lacks.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import io
import json
import shutil
import sys
import warnings
from pathlib import Path

import torch

import flowdppo_fast as fast
from flowdppo_fast.backend import problem
from flowdppo_fast.cli import main

PURE = "--pure" in sys.argv[1:]
NOT_BUILT = "the C++ library is not built; install with a C++ compiler present"


def said_by(command: str) -> str:
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        assert main([command]) == 0
    return said.getvalue()


for compiler in ("c++", "g++", "gcc", "clang", "nvcc"):
    assert shutil.which(compiler) is None, f"{compiler} is on the path"
installed = Path(fast.__file__).resolve()
assert "site-packages" in installed.parts, installed
assert fast.__version__ == importlib.metadata.version("flowdppo_fast")

torch.manual_seed(0)
old, away, noise = torch.randn(3, 6, 4, 16, 16)
velocity = (old + 0.05 * away).requires_grad_()
advantages = torch.randn(6).sign()
step = fast.SDEStep.from_sigmas("cps", 0.8, 0.6, eta=0.6)


def kl_and_gradient(backend: str) -> tuple[str, torch.Tensor, torch.Tensor]:
    out = fast.fused_dppo_velocity_loss(velocity, old, noise, step, advantages, threshold=1e-3, backend=backend)
    (grad,) = torch.autograd.grad(out.loss, velocity)
    return out.backend, out.rows.kl, grad


with warnings.catch_warnings(record=True) as warned:
    warnings.simplefilter("always")
    took, *mine = kl_and_gradient("auto")
_, *exact = kl_and_gradient("reference")
assert exact[0].min() > 0
assert exact[1].abs().max() > 0
for got, expected in zip(mine, exact):
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-9)
next_state = fast.sde_step(old, velocity.detach(), step, noise=fast.PhiloxNoise(3, 0)).prev_sample
assert next_state.shape == old.shape

why_not_cpu, doctor = problem("cpu", "cpu"), said_by("doctor")
fallbacks = [str(warning.message) for warning in warned if "plain torch reference" in str(warning.message)]
if PURE:
    assert took == "reference"
    assert len(fallbacks) == 1, warned
    assert NOT_BUILT in fallbacks[0]
    assert why_not_cpu is not None
    assert why_not_cpu.startswith(NOT_BUILT)
    assert f"cpu            no: {why_not_cpu}" in doctor, doctor
else:
    assert took == "cpu", why_not_cpu
    assert fallbacks == []
    assert "cpu            serves cpu tensors" in doctor, doctor
assert f"backend='auto' takes {took!r} for cpu tensors" in doctor, doctor

try:
    fast.fused_dppo_velocity_loss(velocity, old, noise, step, torch.ones(6), backend="triton")
except RuntimeError as error:
    refused = str(error)
else:
    raise AssertionError("triton ran on CPU tensors")

entry = {
    "python": ".".join(map(str, sys.version_info[:3])),
    "torch": torch.__version__,
    "triton": importlib.metadata.version("triton") if importlib.util.find_spec("triton") else None,
    "flowdppo_fast": fast.__version__,
    "backend": took,
    "cpu refused because": why_not_cpu,
    "triton refused because": refused,
    "cuda refused because": problem("cuda", "cuda"),
    "isa": None if PURE else torch.ops.flowdppo.cpu_isa(),
}
print(json.dumps(entry))
