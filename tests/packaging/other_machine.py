"""The C++ library against the reference where nothing but torch is installed, an emulated machine for one."""

from __future__ import annotations

import json
import platform

import torch

import flowdppo_fast as fast

assert fast.resolve_backend("auto", "cpu") == "cpu"
torch.manual_seed(0)
step = fast.SDEStep.from_sigmas("cps", 0.8, 0.6, eta=0.6)
largest = {}
for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
    # rows that vectors do not divide
    old, away, noise = (torch.randn(5, 3, 17, 19).to(dtype) for _ in range(3))
    velocity = (old + 0.05 * away).requires_grad_()
    advantages = torch.tensor([1.0, -1.0, 0.5, -0.5, 2.0])
    for objective in (fast.DPPO(threshold=1e-3), fast.RatioClip(), fast.GRPOGuard()):
        found = []
        for backend in ("cpu", "reference"):
            out = fast.fused_policy_velocity_loss(
                velocity, old, noise, step, advantages, objective=objective, backend=backend
            )
            (gradient,) = torch.autograd.grad(out.loss, velocity)
            found.append((out.rows.kl, gradient))
        for got, expected in zip(*found):
            eps = torch.finfo(expected.dtype).eps
            torch.testing.assert_close(got, expected, rtol=16 * eps, atol=16 * eps * float(expected.abs().max()))
            error = float((got.double() - expected.double()).abs().max() / expected.double().abs().max())
            largest[str(dtype)] = max(error, largest.get(str(dtype), 0.0))
    mine, theirs = (
        fast.sde_step(old, velocity.detach(), step, noise=fast.PhiloxNoise(3, 0), backend=backend).prev_sample
        for backend in ("cpu", "reference")
    )
    torch.testing.assert_close(mine, theirs, rtol=16 * torch.finfo(dtype).eps, atol=16 * torch.finfo(dtype).eps)
print(json.dumps({"machine": platform.machine(), "torch": torch.__version__, "largest relative error": largest}))
