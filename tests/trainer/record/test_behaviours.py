"""Whatever a pipeline does between model and scheduler: the replay follows the weights, or it is refused by name."""

from __future__ import annotations

import pytest
import torch
from behaviours import BRANCHES, REFUSED, RIGHT, STEPS, build, moved
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


def test_what_was_set_for_a_call_is_refused_where_checkpointing_would_lose_it():
    combine, call, mode = RIGHT["replaced layer"]
    pipeline = build(mode, torch.float32)
    recorder, trajectory, _ = record(pipeline, STEPS, combine, call)
    assert recorder.replay(trajectory).requires_grad
    pipeline.transformer.gradient_checkpointing = True
    with pytest.raises(ValueError, match=r"had set forward of Net .* expected model.gradient_checkpointing=false"):
        recorder.replay(trajectory)


@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize("name", ["double batch", "two per row", "layers first", "list of rows", "clean image"])
def test_small_batches_are_ordinary(name, rows):
    combine, call, mode = RIGHT[name]
    pipeline = build(mode, torch.float32)
    recorder, trajectory, states = record(pipeline, STEPS, combine, call, rows=rows)
    assert recorder.verify(trajectory, [rows - 1]).same_geometry == 0.0
    with moved(pipeline), torch.no_grad():
        _, fresh, _ = record(pipeline, STEPS, combine, call, rows=rows, states=states)
        assert not torch.equal(fresh.velocity, trajectory.velocity)
        assert relative(recorder.replay(trajectory), fresh.velocity) <= 8 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("name", ["guidance", "clean image", "chunks in place", "control net that shares layers"])
def test_a_pipeline_in_inference_mode_is_trained_all_the_same(name):
    combine, call, mode = RIGHT[name]
    pipeline = build(mode, torch.float32)
    with torch.inference_mode():
        recorder, trajectory, _ = record(pipeline, STEPS, combine, call)
    recorder.replay(trajectory, [1, 2]).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in pipeline.transformer.out.parameters())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", BRANCHES)
def test_a_branch_that_turns_is_followed(name, dtype):
    combine, call, mode = RIGHT[name]
    pipeline, options = build(mode, DTYPES[dtype]), {"dtype": DTYPES[dtype]}
    recorder, trajectory, states = record(pipeline, STEPS, combine, call, **options)
    assert recorder.verify(trajectory, [2, 0]).same_geometry == 0.0
    turned = set()
    for size in (0.2, 25.0):
        with torch.no_grad():
            pipeline.transformer.out.weight.mul_(size)
        _, fresh, _ = record(pipeline, STEPS, combine, call, states=states, **options)
        for old, new in zip(trajectory.steps, fresh.steps):
            turned |= {a.expected for a, b in zip(old.program.guards, new.program.guards) if a.expected != b.expected}
        alone = torch.cat([recorder.replay(trajectory, steps=[place]) for place in range(3)], dim=1)
        assert torch.equal(alone, fresh.velocity)
        part = recorder.replay(trajectory, [3, 1])
        assert relative(part.detach(), fresh.velocity[[3, 1]]) <= 8 * torch.finfo(DTYPES[dtype]).eps
        part.square().sum().backward()
        assert pipeline.transformer.out.weight.grad.isfinite().all()
    assert turned == {True, False}, "rows should turn from either side"


def test_a_branch_whose_other_side_is_not_known_is_an_error_where_it_turns():
    def combine(pipeline, c, u, x, t, i):
        rows = []
        for row in c:
            if row.norm() > 0.3:
                size = row.norm()
                row = row * (0.3 / size)
            rows.append(row)
        return torch.stack(rows)

    pipeline = build("", torch.float32)
    recorder, trajectory, _ = record(pipeline, STEPS, combine, None)
    assert recorder.verify(trajectory, [2, 0]).same_geometry == 0.0
    with torch.no_grad():
        pipeline.transformer.out.weight.mul_(0.01)
        pipeline.transformer.out.bias.zero_()
    for rows in (None, [1]):
        with pytest.raises(ValueError, match=r"it branched on the transformer's output .* take the other branch"):
            recorder.replay(trajectory, rows)


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).square().mean().sqrt() / b.double().square().mean().sqrt())
