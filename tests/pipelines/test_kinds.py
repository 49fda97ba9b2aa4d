"""Pipelines by kind of what is odd about them: the replay is the recording, and follows the weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from flowdppo_fast.losses import row_statistics

from .cases import CASES, record
from .kinds import KINDS
from .siblings import SIBLINGS

# diffusers' own
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


ALL = {**KINDS, **{kind.__name__: sibling for kind, sibling in SIBLINGS.items()}}


@pytest.mark.bits(across="again")
@pytest.mark.parametrize("name", ALL)
def test_the_replay_is_bitwise_and_follows_the_weights(name):
    kind = ALL[name]
    recorder, trajectory, call = kind.recorded()
    rows = [2, 0, 3] if kind.rows == 4 else [0]
    check = recorder.verify(trajectory, rows)
    assert check.same_geometry == 0.0
    assert check.batched_kl <= 1e-9 < check.tolerance
    moved = recorder.verify_moved(trajectory, call)
    assert moved.difference == 0.0
    assert moved.moved_kl > 1e-9
    recorder.replay(trajectory, rows[:1]).square().sum().backward()
    for module in recorder.modules.values():
        reached = [p.grad is not None and bool(p.grad.any()) for p in module.parameters()]
        assert sum(reached) > 0.7 * len(reached)


@pytest.mark.parametrize("residuals", [2, 4])
def test_a_control_net_that_gives_nothing_yet_is_taken_row_by_row(residuals):
    kind = KINDS[f"sd3-control-{residuals}"]
    pipeline = kind.family.pipeline()
    with torch.no_grad():
        for layer in pipeline.controlnet.controlnet_blocks.parameters():
            layer.zero_()
    recorder, trajectory, call = kind.recorded(pipeline)
    # nothing tells rows from what they share but the sizes
    assert trajectory.groups == [[0, 1]]
    assert recorder.verify_moved(trajectory, call).difference == 0.0
    for p in pipeline.controlnet.controlnet_blocks.parameters():
        torch.nn.init.normal_(p, std=0.1)
    with torch.no_grad():
        whole, rows = recorder.replay(trajectory), recorder.replay(trajectory, [3, 1])
    torch.testing.assert_close(rows, whole[[3, 1]], rtol=0, atol=1e-5)


def test_chunks_are_passes_through_the_schedule():
    _, trajectory, _ = KINDS["helios"].recorded()
    assert [step.index for step in trajectory.steps] == [1, 2, 1, 2]
    assert trajectory.noise.stream.unique().numel() == trajectory.noise.stream.numel()


def test_picture_and_sound_are_one_density():
    recorder, trajectory, _ = KINDS["ltx2"].recorded()
    picture, sound = 16 * 12, trajectory.elements
    assert 0 < picture < sound
    moved = trajectory.velocity.clone()
    noise = trajectory.noise.materialize(moved.shape, row_dims=2)
    # a step of the sound alone moves the row's log-ratio
    moved[..., -8:] += 0.1
    log_ratio, squared = row_statistics(moved, trajectory.velocity, noise, trajectory.sde_step, row_dims=2)
    assert (log_ratio != 0).all()
    assert (squared > 0).all()
    assert recorder.verify(trajectory, [1]).same_geometry == 0.0


def test_the_cap_of_z_image_is_followed_where_it_turns():
    case = replace(CASES["z-image-capped"], steps=(0,), options={"guidance_scale": 4.3, "cfg_normalization": 1.0})
    recording = record(case)
    recorder, trajectory = recording.recorder, recording.trajectory

    def sides(trajectory):
        return [op.expected for op in trajectory.steps[0].program.guards]

    turned = set()
    for seed in range(6):
        torch.manual_seed(seed)
        with torch.no_grad():
            for p in recording.pipeline.transformer.parameters():
                p += 0.2 * torch.randn_like(p) * p.square().mean().sqrt()
        with recorder.recording([0], seed=11) as fresh:
            recording.call()
        turned |= {b for a, b in zip(sides(trajectory), sides(fresh)) if a != b}
        with torch.no_grad():
            assert torch.equal(recorder.replay(trajectory), fresh.velocity)
    assert turned == {True, False}, (sides(trajectory), sides(fresh))
