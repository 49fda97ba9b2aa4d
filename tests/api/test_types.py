"""What a type checker says of calls that users write: nothing of right ones, and of wrong ones what is wrong."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RIGHT = """
import torch
import flowdppo_fast as fast

x = torch.zeros(4, 3)
rows = torch.zeros(4)
step = fast.SDEStep.from_sigmas("dance", 0.7, 0.6)
out = fast.fused_dppo_velocity_loss(
    x, x, x, step, rows, threshold=1e-5, symmetric=True, trust_region="velocity_drift", reference_velocity=x,
    kl_weight=0.1, reference_kl="without_dt", advantage_clip=5.0, old_log_prob=rows, row_weights=rows,
    reduction="sum", latent_reduction="sum", log_prob="unnormalized", single_pass=True, backend="triton",
)
fast.fused_dppo_loss(x, x, x, 0.1, rows, dt=-0.1, reference_prev_sample_mean=x, reference_kl="without_dt")
fast.fused_policy_velocity_loss(x, x, fast.PhiloxNoise(1), step, rows, objective=fast.RatioClip(1e-4))
fast.fused_policy_loss(x, x, x, rows, rows, objective=fast.GRPOGuard(bias="batch"), dt=rows)
fast.FlowDPPOLoss(1e-6, kl_weight=0.1)(x, x, x, step, rows, reference_velocity=x).loss.backward()
statistics = fast.row_statistics(x, x, x, step, row_dims=1, second_moment=True)
floats: dict[str, float] = out.metrics().to_floats()
"""
# a wrong call, and what the checker has to name
WRONG = {
    "fast.fused_dppo_velocity_loss(x, x, x, step, rows, treshold=1e-5)": "treshold",
    'fast.fused_dppo_velocity_loss(x, x, x, step, rows, reduction="men")': "reduction",
    'fast.fused_dppo_velocity_loss(x, x, x, step, rows, latent_reduction="none")': "latent_reduction",
    'fast.fused_dppo_velocity_loss(x, x, x, step, rows, trust_region="klx")': "trust_region",
    'fast.fused_dppo_velocity_loss(x, x, x, step, rows, backend="gpu")': "backend",
    'fast.fused_dppo_velocity_loss(x, x, x, step, rows, log_prob="normal")': "log_prob",
    'fast.fused_dppo_loss(x, x, x, 0.1, rows, trust_region="velocity_drift")': "trust_region",
    "fast.fused_dppo_loss(x, x, x, 0.1, rows, reference_velocity=x)": "reference_velocity",
    "fast.fused_policy_velocity_loss(x, x, x, step, rows)": "objective",
    "fast.fused_policy_velocity_loss(x, x, x, 0.1, rows, objective=fast.DPPO())": "SDEStep",
    'fast.FlowDPPOLoss(reference_kl="dt")': "reference_kl",
    "fast.row_statistics(x, x, x, step, rows=2)": "rows",
    'fast.resolve_backend("gpu", 3)': "resolve_backend",
}


def test_calls_as_a_type_checker_sees_them(tmp_path):
    pytest.importorskip("mypy", reason="mypy is not installed; pip install -e '.[dev]'")
    lines = RIGHT.count("\n") + 1
    scratch = tmp_path / "calls.py"
    scratch.write_text(RIGHT + "\n".join(WRONG) + "\n")
    # torch's own types would be half a minute of checking and are not looked at here
    settings = tmp_path / "mypy.ini"
    settings.write_text("[mypy]\n[mypy-torch.*]\nfollow_imports = skip\nfollow_imports_for_stubs = True\n")
    command = [sys.executable, "-m", "mypy", "--config-file", str(settings), "--cache-dir", str(tmp_path), str(scratch)]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 1, found.stdout + found.stderr
    said: dict[int, str] = {}
    for line in found.stdout.splitlines():
        if line.startswith(str(scratch)) and ": error: " in line:
            number = int(line.split(":")[1])
            said[number] = said.get(number, "") + line
    assert {number: text for number, text in said.items() if number < lines} == {}
    for number, (call, word) in enumerate(WRONG.items(), start=lines):
        assert word in said.get(number, ""), f"{call}: {said.get(number)}"
