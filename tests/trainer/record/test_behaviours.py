"""Whatever a pipeline does between model and scheduler: the replay follows the weights, or it is refused by name."""

from __future__ import annotations

import pytest
import torch
from behaviours import REFUSED, RIGHT, STEPS, build, moved
from torch import Tensor

from flowdppo_fast.trainer import TrajectoryRecorder

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def record(pipeline, steps, combine, call, **options):
    recorder = TrajectoryRecorder(pipeline)
    # what a pipeline draws from torch's own generator is drawn again
    torch.manual_seed(7)
    with recorder.recording(steps, seed=3) as trajectory:
        states = pipeline(combine, call, **options)
    return recorder, trajectory, states


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", RIGHT)
def test_the_replay_follows_the_weights(name, dtype):
    combine, call, mode = RIGHT[name]
    pipeline, options = build(mode, DTYPES[dtype]), {"dtype": DTYPES[dtype]}
    recorder, trajectory, states = record(pipeline, STEPS, combine, call, **options)
    assert recorder.verify(trajectory, [2, 0, 3]).same_geometry == 0.0
    old = trajectory.velocity
    with moved(pipeline):
        # the same states at other weights: what a step computes of earlier steps' outputs is as it was recorded
        steps = STEPS if name != "momentum" else STEPS[:1]
        _, fresh, _ = record(pipeline, steps, combine, call, states=states, **options)
        with torch.no_grad():
            alone = torch.cat([recorder.replay(trajectory, steps=[place]) for place in range(len(steps))], dim=1)
            assert torch.equal(alone, fresh.velocity)
            rows = [3, 1]
            part = recorder.replay(trajectory, rows, range(len(steps)))
        if name != "zero at first":
            assert not torch.equal(fresh.velocity[:, 0], old[:, 0])
        size = relative(fresh.velocity, old[:, : len(steps)])
        # products of other sizes may round otherwise: a few roundings, far below the move
        error = relative(part, fresh.velocity[rows])
        assert error <= min(0.2 * size, 8 * torch.finfo(DTYPES[dtype]).eps), (error, size)


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_not_follow_is_refused_by_name(name):
    combine, call, mode, words = REFUSED[name]
    for dtype in DTYPES.values():
        with pytest.raises(ValueError, match=words):
            record(build(mode, dtype), STEPS, combine, call, dtype=dtype)


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).square().mean().sqrt() / b.double().square().mean().sqrt())
