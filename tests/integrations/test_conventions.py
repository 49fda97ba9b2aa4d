"""The conventions are those of the sampler table, and the recorded steps exercise every branch of every objective."""

from __future__ import annotations

import pytest
import torch

import flowdppo_fast as fast

from . import conventions
from .recorded import ETA, LATENTS, SIGMAS, THRESHOLD, record

SAMPLERS = ["flow_sde", "dance", "cps", "wan"]


@pytest.mark.parametrize("shape", LATENTS.values(), ids=LATENTS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_transitions(sampler, shape):
    """Means, standard deviations and log-probs of the first nine steps, ``sigma == 1`` among them."""
    r = record(sampler, shape, index=[0, 1, 2, 3, 4, 5, 6, 7, 8], rows=9)
    steps = fast.SDEStep.stack(fast.sde_schedule(sampler, SIGMAS, eta=ETA)[:9])
    kind = "unnormalized" if sampler == "cps" else "gaussian"
    expected = fast.sde_step(
        r.state, r.velocity, steps, prev_sample=r.next_state, return_mean=True, log_prob=kind, backend="reference"
    )
    actual = r.replay(r.velocity)
    torch.testing.assert_close(actual.mean, expected.mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(actual.log_prob, expected.log_prob, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(actual.std.flatten(), steps.std, rtol=1e-13, atol=0.0)
    torch.testing.assert_close(-(actual.sqrt_dt.flatten() ** 2), steps.dt, rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_recorded_steps_take_every_branch(sampler):
    """Dropped upwards and downwards, kept although far, kept because near."""
    r = record(sampler, LATENTS["image"])
    old, new = r.old, r.replay(r.velocity)
    far = conventions.per_row_mean((new.mean - old.mean) ** 2 / (2.0 * old.std**2)) >= THRESHOLD
    up, gain = new.log_prob > old.log_prob, r.advantages > 0
    for flags in (far & up & gain, far & ~up & ~gain, far & (up ^ gain), ~far & gain, ~far & ~gain):
        assert bool(flags.any())
