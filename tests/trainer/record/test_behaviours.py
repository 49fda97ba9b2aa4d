"""Whatever a pipeline does between model and scheduler: the replay follows the weights, or it is refused by name."""

from __future__ import annotations

import pytest
import torch
import torch.utils.checkpoint
from behaviours import REFUSED, RIGHT, STEPS, build, guided, moved
from numbers_chosen import BRANCHES
from torch import Tensor, nn

from flowdppo_fast.trainer import TrajectoryRecorder
from flowdppo_fast.trainer.record import watch
from flowdppo_fast.trainer.record.watch import modules_of

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
        steps = STEPS[:1] if "momentum" in name else STEPS
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


def looped(c):
    rows = []
    for row in c:
        while row.norm() > 0.3:
            row = row * 0.5
        rows.append(row)
    return torch.stack(rows)


def kept_for_later(c):
    rows = []
    for row in c:
        share = 1.0
        if row.norm() > 0.3:
            share = row.norm()
            row = row / share
        rows.append(row * share)
    return torch.stack(rows)


def one_of_two_names(c):
    rows = []
    for row in c:
        whole = row
        if row.norm() < 0.3:
            row = row * 2.0
        rows.append(row + whole)
    return torch.stack(rows)


@pytest.mark.parametrize("odd", [looped, kept_for_later, one_of_two_names])
def test_a_branch_whose_other_side_is_not_known_is_an_error_where_it_turns(odd):
    def combine(pipeline, c, u, x, t, i):
        return odd(c)

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


def moving(pipeline, combine, call, **options):
    """The check at moved weights on a new recording of steps 1 and 2."""
    recorder, trajectory, _ = record(pipeline, STEPS[1:], combine, call, **options)
    return recorder.verify_moved(trajectory, lambda: (torch.manual_seed(7), pipeline(combine, call, **options)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["guidance", "momentum", "capped", "control net that shares layers", "autocast"])
def test_at_moved_weights_the_replay_equals_a_new_recording(name, dtype):
    combine, call, mode = RIGHT[name]
    pipeline = build(mode, DTYPES[dtype])
    before = {key: value.clone() for key, value in pipeline.transformer.state_dict().items()}
    check = moving(pipeline, combine, call, dtype=DTYPES[dtype])
    assert (check.difference, check.kl, check.gradient) == (0.0, 0.0, None)
    assert check.moved_kl > 1e-6
    assert all(torch.equal(value, before[key]) for key, value in pipeline.transformer.state_dict().items())


def test_a_control_net_that_is_taken_for_a_constant_is_found(monkeypatch):
    def without_sharing(recorder):
        replayed, constant = modules_of(recorder)
        own = list(recorder.modules.values())
        return own, [*constant, *(module for module in replayed if module not in own)]

    combine, call, mode = RIGHT["control net that shares layers"]
    pipeline = build(mode, torch.float32)
    pipeline.refiner.requires_grad_(False)
    monkeypatch.setattr(watch, "modules_of", without_sharing)
    with pytest.raises(
        ValueError, match=r"with the trained weights moved a little, the replay of step 1 of Odd differs from a new "
        r"recording by up to [\d.e-]+ \(a KL of [\d.e-]+\), expected 0; something that depends on the trained weights",
    ):  # fmt: skip
        moving(pipeline, combine, call)
    # verified at unchanged weights it looks right
    recorder, trajectory, _ = record(pipeline, STEPS, combine, call)
    assert recorder.verify(trajectory, [2, 0]).same_geometry == 0.0


class Checkpointed(nn.Module):
    """A layer that runs again in the backward, where what was ``lost`` is no longer in force."""

    def __init__(self, inner, lost):
        super().__init__()
        self.inner, self.lost, self.gradient_checkpointing = inner, lost, True

    def forward(self, value):
        runs = []

        def run(x):
            runs.append(x)
            return torch.tanh(self.inner(x) * (0.5 if self.lost and len(runs) == 2 else 1.0))

        if self.gradient_checkpointing and torch.is_grad_enabled():
            return torch.utils.checkpoint.checkpoint(run, value, use_reentrant=False)
        return run(value)


@pytest.mark.parametrize("lost", [False, True])
def test_the_gradient_under_checkpointing_is_that_without(lost):
    pipeline = build("", torch.float32)
    pipeline.transformer.inp = layer = Checkpointed(pipeline.transformer.inp, lost)
    if lost:
        with pytest.raises(ValueError, match=r"under gradient checkpointing a row's gradient of Odd differs by 0\.\d+"):
            moving(pipeline, guided, None)
    else:
        assert moving(pipeline, guided, None).gradient == 0.0
    assert layer.gradient_checkpointing
