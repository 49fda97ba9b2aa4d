"""What an installed wheel must do where there is no compiler: load its library, and give the reference's numbers."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import shutil
import sys
from pathlib import Path

import torch

import flowdppo_fast as fast
from flowdppo_fast.backend import problem

for compiler in ("c++", "g++", "gcc", "clang", "nvcc"):
    assert shutil.which(compiler) is None, f"{compiler} is on the path"
installed = Path(fast.__file__).resolve()
assert "site-packages" in installed.parts, installed

torch.manual_seed(0)
old, away, noise = torch.randn(3, 6, 4, 16, 16)
velocity = (old + 0.05 * away).requires_grad_()
step = fast.SDEStep.from_sigmas("cps", 0.8, 0.6, eta=0.6)
results = {}
for backend in ("reference", "cpu"):
    reason = problem(backend, "cpu")
    assert reason is None, f"{backend}: {reason}"
    out = fast.fused_dppo_velocity_loss(
        velocity, old, noise, step, torch.randn(6).sign(), threshold=1e-3, backend=backend
    )
    torch.manual_seed(0)
    (grad,) = torch.autograd.grad(out.loss, velocity)
    results[backend] = (out.rows.kl, grad)
for mine, exact in zip(results["cpu"], results["reference"]):
    torch.testing.assert_close(mine, exact, rtol=1e-5, atol=1e-9)
next_state = fast.sde_step(old, velocity.detach(), step, noise=fast.PhiloxNoise(3, 0)).prev_sample
assert next_state.shape == old.shape

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
    "triton refused because": refused,
    "cuda refused because": problem("cuda", "cuda"),
    "isa": torch.ops.flowdppo.cpu_isa(),
}
print(json.dumps(entry))
