"""Every pipeline of the table: its velocities come back, gradients arrive, losses are the textbook's."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support import oracle

from flowdppo_fast import PhiloxNoise, fused_dppo_velocity_loss
from flowdppo_fast.trainer.record.arguments import tensors_of
from flowdppo_fast.trainer.weights.adapters import add_lora

from . import table
from .cases import CASES, REFUSED, record
from .cut import cut_to_latent
from .families import FAMILIES

# diffusers' own
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation:DeprecationWarning", "ignore:`FluxPosEmbed` is deprecated:FutureWarning"
)
EPS = torch.finfo(torch.float32).eps


@pytest.mark.bits(across="again")
@pytest.mark.parametrize("name", CASES)
def test_the_recorded_velocity_comes_back(recorded, name):
    case, recording = CASES[name], recorded(name)
    trajectory = recording.trajectory
    rules = [str(step.rule) for step in trajectory.steps]
    assert rules == list(case.rules) * (len(rules) // len(case.rules))
    assert trajectory.groups == case.groups
    check = recording.recorder.verify(trajectory, rows=[2, 0, 3])
    assert check.same_geometry == 0.0
    # the roundings of the network's output in another geometry cost nothing near a tenth of the threshold
    assert check.batched_kl <= 1e-9 < check.tolerance == pytest.approx(1e-6)
    # what is checked is the training geometry: fewer rows than were recorded, in another order, all steps together
    replayed = recording.recorder.replay(trajectory, [3, 1])
    # at most 17 of them were measured, of velocities of about 1
    torch.testing.assert_close(replayed, trajectory.select([3, 1])[0], rtol=0, atol=128 * EPS)


@pytest.mark.parametrize("name", CASES)
def test_at_moved_weights_the_replay_equals_a_new_recording(recorded, name):
    recording = recorded(name)
    check = recording.recorder.verify_moved(recording.trajectory, recording.call)
    assert (check.difference, check.kl) == (0.0, 0.0)
    # far more than rounding
    assert check.moved_kl > 1e-9


@pytest.mark.parametrize("name", CASES)
def test_gradients_reach_every_transformer(recorded, name):
    recording = recorded(name)
    recording.recorder.replay(recording.trajectory, [1, 2]).square().sum().backward()
    used = {id(call.module) for step in recording.trajectory.steps for call in step.calls}
    for module_name, module in recording.recorder.modules.items():
        gradients = {key: p.grad for key, p in module.named_parameters()}
        module.zero_grad(set_to_none=True)
        assert id(module) in used, f"{module_name} belongs to none of the steps"
        reached = [key for key, gradient in gradients.items() if gradient is not None and gradient.any()]
        # the last block's text half and unused embeddings get none
        assert len(reached) > 0.7 * len(gradients), sorted(set(gradients) - set(reached))


@pytest.mark.parametrize("name", CASES)
def test_states_follow_from_the_recorded_velocity_and_noise(recorded, name):
    recording = recorded(name)
    trajectory, states = recording.trajectory, recording.states
    step, latent = trajectory.sde_step, trajectory.velocity.shape[2:]
    # img2img starts later in the schedule
    first = len(recording.states) - CASES[name].num_steps
    noise = trajectory.noise.materialize(trajectory.velocity.shape, row_dims=2)
    compared = 0
    for position, record_of_step in enumerate(trajectory.steps):
        index = record_of_step.index + first
        if index < 1:
            continue
        x, following = (cut_to_latent(states[i], latent).double() for i in (index - 1, index))
        a, b, s = (float(column[position]) for column in (step.sample_coef, step.velocity_coef, step.std))
        expected = a * x + b * trajectory.velocity[:, position].double() + s * noise[:, position].double()
        if record_of_step.active is not None:
            # the other tokens are the condition, which the pipeline noises anew
            moved = record_of_step.active.expand_as(expected)
            assert 0 < int(moved.sum()) < moved.numel()
            assert not trajectory.velocity[:, position][~moved].any()
            following, expected = following[moved], expected[moved]
        # three products and two sums in float32
        torch.testing.assert_close(following, expected, rtol=0, atol=8 * EPS * float(expected.abs().max()))
        compared += 1
    assert compared >= 2


def nudge(module: torch.nn.Module, size: float) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += size * torch.randn_like(parameter)


@pytest.mark.parametrize("name", CASES)
def test_loss_and_mask_are_the_textbooks(name):
    recording = record(CASES[name])
    trajectory, recorder = recording.trajectory, recording.recorder
    for module in recorder.modules.values():
        nudge(module, 0.02)
    rows = [2, 0, 3]
    old, noise, _ = trajectory.select(rows)
    steps, latent = len(trajectory.steps), old.shape[2:]
    advantages = torch.tensor([1.3, -0.4, 0.9])[:, None].expand(-1, steps)
    velocity = recorder.replay(trajectory, rows)

    # Gaussians of the next state around the two policies' means; where the state is cancels from both
    std, coef, dt = (
        x.expand(len(rows), -1).reshape(-1)
        for x in (trajectory.sde_step.std, trajectory.sde_step.velocity_coef, trajectory.sde_step.dt)
    )
    mean, old_mean = (coef.view(-1, *[1] * len(latent)) * x.detach().flatten(0, 1).double() for x in (velocity, old))
    drawn = noise.materialize(old.shape, row_dims=2) if isinstance(noise, PhiloxNoise) else noise
    next_state = old_mean + oracle.lift(std, old_mean) * drawn.flatten(0, 1).double()
    kl = ((mean - old_mean) / oracle.lift(std, mean)).square().flatten(1).mean(1) / 2
    # between two rows' divergences, so that rounding cannot move a row across
    threshold = float(kl.sort().values[1:3].mean())
    truth = oracle.policy_loss(
        oracle.Rule("dppo", threshold), mean, old_mean, next_state, std, dt, advantages.flatten().double()
    )
    out = fused_dppo_velocity_loss(velocity, old, noise, trajectory.sde_step, advantages, threshold=threshold)
    assert not truth.kept.all()
    assert torch.equal(out.rows.kept.flatten(), truth.kept)
    torch.testing.assert_close(out.rows.kl.flatten().double(), truth.kl, rtol=1e-5, atol=0)
    # sums of N float32 products
    size = float(truth.size.max())
    torch.testing.assert_close(out.rows.log_ratio.flatten().double(), truth.log_ratio, rtol=0, atol=16 * EPS * size)
    torch.testing.assert_close(out.loss.double(), truth.row_loss.mean(), rtol=0, atol=16 * EPS * (1 + size))


@pytest.mark.parametrize("name", ["sd3-guided", "wan-two-guided", "z-image-guided", "qwen-guided", "ltx-i2v-guided"])
def test_adapters_are_trained_through_the_replay(name):
    recording = record(CASES[name])
    recorder, trajectory = recording.recorder, recording.trajectory
    for module in recorder.modules.values():
        module.requires_grad_(False)
        add_lora(module, rank=2, alpha=4.0, targets=None, seed=0)
    # fresh adapters change nothing
    torch.testing.assert_close(recorder.replay(trajectory), trajectory.velocity, rtol=0, atol=256 * EPS)
    recorder.replay(trajectory, [0, 3]).square().sum().backward()
    for module in recorder.modules.values():
        trained = {key: p for key, p in module.named_parameters() if p.requires_grad}
        assert trained
        assert all("lora_" in key for key in trained)
        reached = [key for key, p in trained.items() if p.grad is not None and p.grad.any()]
        assert any("lora_B" in key for key in reached)
        optimizer = torch.optim.SGD(trained.values(), lr=1.0)
        optimizer.step()
    assert not torch.equal(recorder.replay(trajectory), trajectory.velocity)


@pytest.mark.bits(across="again")
@pytest.mark.parametrize(
    "name", ["flux", "sd3-guided", "wan-guided", "z-image-guided", "lumina2-guided", "ltx-rescaled"]
)
def test_in_bfloat16_it_is_bitwise_as_well(recorded, name):
    case = CASES[name]
    sizes = replace(FAMILIES[case.family].tiny, dtype=torch.bfloat16)
    recording = record(case, sizes)
    check = recording.recorder.verify(recording.trajectory, [3, 1])
    assert check.rule == recorded(name).trajectory.steps[0].rule
    assert check.same_geometry == 0.0


@pytest.mark.parametrize("name", ["flux-guided", "sd3-guided", "wan-guided", "z-image-guided", "flux-kontext"])
def test_what_is_shared_is_kept_once(recorded, name):
    """Bytes are those of the states, one text per prompt and a few numbers, whatever the pipeline repeats."""
    trajectory = recorded(name).trajectory
    rows, steps = trajectory.velocity.shape[:2]
    family = FAMILIES[CASES[name].family]
    texts = family.inputs(family.tiny, 2)
    guided = [key for key in texts if not key.startswith("negative_") or "guided" in name]
    tensors = [texts[key] for key in guided if isinstance(texts[key], (torch.Tensor, list))]
    text_bytes = sum(x.nbytes for given in tensors for x in (given if isinstance(given, list) else [given]))
    inputs = next(t for t in tensors_of(trajectory.steps[0].calls) if t.ndim > 2 or t.dtype.is_floating_point)
    state_bytes = trajectory.velocity.nbytes + (
        rows * steps * (inputs.nbytes // len(inputs)) if name != "z-image-guided" else trajectory.velocity.nbytes
    )
    # timesteps, row numbers, noise streams and position ids
    assert state_bytes + text_bytes <= trajectory.nbytes <= state_bytes + text_bytes + 2500


def test_arguments_that_are_mappings_are_replayed():
    case = replace(CASES["cogview4-guided"], options={"guidance_scale": 5.0, "attention_kwargs": {"scale": 1.0}})
    recording = record(case)
    (call, _) = recording.trajectory.steps[0].calls
    assert call.spec.unflatten(call.leaves)[1]["attention_kwargs"] == {"scale": 1.0}
    assert recording.recorder.verify(recording.trajectory, [1, 0]).same_geometry == 0.0


def test_a_step_so_near_to_noise_that_it_overshoots_is_an_error():
    with pytest.raises(ValueError, match=r"step 0 of 6 from sigma=0.99\d+ to .* overshoots .* leave the step out"):
        record(replace(CASES["sana"], steps=(0, 1)))
    # in the sampler that does not divide by 1 - sigma it is a step like any other
    recording = record(replace(CASES["sana"], steps=(0, 1), sampler="cps"))
    assert recording.recorder.verify(recording.trajectory, [0]).same_geometry == 0.0


def test_a_step_that_image_to_image_leaves_out_is_an_error():
    with pytest.raises(ValueError, match=r"FluxImg2ImgPipeline ran the chosen steps \[2\], expected \[0, 2\]"):
        record(replace(CASES["flux-img2img"], steps=(0, 2)))


REASONS = {
    "Flux2KleinKVPipeline with a reference image": r"Flux2KleinKVPipeline, step 1: got a Flux2KVCache among the tra",
    "SanaSprintPipeline": r"^config: got that of SCMScheduler, expected a flow-matching scheduler",
    "FlowMatchHeunDiscreteScheduler in any pipeline": r"^config: got that of FlowMatchHeun\w+, expected one Euler step",
    "FlowMatchLCMScheduler in any pipeline": r"^config: got that of FlowMatchLCMScheduler, expected one Euler step per",
    "DDIMScheduler in any pipeline": r"^config: got that of DDIMScheduler, expected a flow-matching scheduler",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_served_says_why(name):
    with pytest.raises(ValueError, match=REASONS[name]):
        REFUSED[name]()


def test_the_documented_table_is_what_the_recordings_give(recorded):
    made = table.table({name: recorded(name) for name in CASES})
    assert made == table.committed(), "run: python -m tests.pipelines.table"
