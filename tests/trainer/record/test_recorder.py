"""Recording and replaying real and toy pipelines: velocities, gradients, losses, sharing, and what is refused."""

from __future__ import annotations

import inspect

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from support import oracle
from torch.utils._python_dispatch import TorchDispatchMode

from flowdppo_fast import PhiloxNoise, fused_dppo_velocity_loss
from flowdppo_fast.trainer import TrajectoryRecorder
from flowdppo_fast.trainer.record import layouts
from flowdppo_fast.trainer.record.arguments import ArgumentStore, join, joinable, tensors_of

ROWS, STEPS = 3, [0, 1, 3]


CASES = {
    "sd3": ("sd3", {"guidance_scale": 1.0, "height": 8, "width": 8}, "b0"),
    "sd3-doubled-batch": (
        "sd3",
        {"guidance_scale": 4.5, "height": 8, "width": 8},
        "b0 + 4.5*(b1 - b0)",
    ),
    "flux": ("flux", {"guidance_scale": 3.5, "height": 16, "width": 16}, "b0"),
    "flux-two-calls": (
        "flux",
        {"guidance_scale": 3.5, "true_cfg_scale": 2.3, "height": 16, "width": 16},
        "b1 + 2.3*(b0 - b1)",
    ),
    "dit-labels": ("dit", {"guidance_scale": 3.0}, "b0 + 3*(b1 - b0)"),
    "digits": ("digits", {"guidance_scale": 1.0}, "b0"),
    "digits-doubled-batch": (
        "digits",
        {"guidance_scale": 2.75},
        "b0 + 2.75*(b1 - b0)",
    ),
}


def record(pipes, case: str, noise: str = "seeded"):
    name, arguments, _ = CASES[case]
    pipeline = getattr(pipes, name)()
    recorder = TrajectoryRecorder(pipeline, noise=noise)
    given = {"digits": {"prompt": ["3", "1", "4"]}, "dit": {"labels": torch.tensor([3, 1, 4])}}
    inputs = given.get(name) or pipes.text_inputs(ROWS)
    with recorder.recording(STEPS, seed=11) as trajectory:
        pipeline(**inputs, **arguments, num_inference_steps=6, generator=pipes.generators(ROWS), output_type="pt")
    return pipeline, recorder, trajectory


def nudge(module: torch.nn.Module, size: float) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += size * torch.randn_like(parameter)


@pytest.mark.bits(across="again")
@pytest.mark.parametrize("case", CASES)
def test_replay_gives_the_recorded_velocity_and_gradients(pipes, case):
    pipeline, recorder, trajectory = record(pipes, case)
    check = recorder.verify(trajectory, rows=[2, 0])
    assert check.rule == CASES[case][2]
    assert check.same_geometry == 0.0
    assert check.batched_kl <= 1e-9 < check.tolerance == pytest.approx(1e-6)
    assert trajectory.groups == [[0, 1, 2]], "all steps in one transformer call"

    recorder.replay(trajectory, [1, 2]).square().sum().backward()
    gradients = {name: p.grad for name, p in pipeline.transformer.named_parameters()}
    reached = [name for name, gradient in gradients.items() if gradient is not None and gradient.any()]
    assert any(name.startswith("transformer_blocks.0") for name in reached)
    assert len(reached) > 0.7 * len(gradients)


@pytest.mark.parametrize("noise", ["seeded", "stored"])
@pytest.mark.parametrize("case", ["sd3", "digits-doubled-batch"])
def test_loss_and_mask_on_replayed_velocities_equal_the_textbook(pipes, case, noise):
    pipeline, recorder, trajectory = record(pipes, case, noise)
    states = torch.stack([record.calls[0].leaves[0].values for record in trajectory.steps], dim=1)
    nudge(pipeline.transformer, 0.01)
    rows = [2, 0, 1]
    old, drawn, step = trajectory.select(rows)
    advantages = torch.tensor([1.3, -0.4, 0.9])[:, None].expand(-1, len(STEPS))
    velocity = recorder.replay(trajectory, rows)
    # between the rows' divergences, so that some are beyond it
    threshold = 1e-4
    out = fused_dppo_velocity_loss(velocity, old, drawn, step, advantages, threshold=threshold)

    levels = [trajectory.sde_step.sigma, trajectory.sde_step.sigma_next]
    sigma, following = (level.expand(ROWS, -1).reshape(-1) for level in levels)
    sigmas = [1.0, float(trajectory.sde_step.sigma_next[0])]

    def mean_of(v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return oracle.sampler_step(
            "flow_sde",
            states[rows].flatten(0, 1).double(),
            v.detach().flatten(0, 1).double(),
            sigma,
            following,
            0.7,
            sigmas,
        )

    (mean, std), (old_mean, _) = mean_of(velocity), mean_of(old)
    noise_tensor = drawn.materialize(old.shape, row_dims=2) if isinstance(drawn, PhiloxNoise) else drawn
    next_state = old_mean + oracle.lift(std, old_mean) * noise_tensor.flatten(0, 1).double()
    truth = oracle.policy_loss(
        oracle.Rule("dppo", threshold),
        mean,
        old_mean,
        next_state,
        std,
        following - sigma,
        advantages.flatten().double(),
    )
    assert 0 < int((~truth.kept).sum()) < truth.kept.numel(), "the threshold should split the rows"
    assert torch.equal(out.rows.kept.flatten(), truth.kept)
    # statistics are means of N float32 products of relative error eps
    torch.testing.assert_close(out.rows.kl.flatten().double(), truth.kl, rtol=1e-5, atol=0)
    torch.testing.assert_close(out.rows.log_ratio.flatten().double(), truth.log_ratio, rtol=1e-4, atol=1e-8)
    torch.testing.assert_close(out.loss.double(), truth.row_loss.mean(), rtol=1e-6, atol=0)


class HostReads(TorchDispatchMode):
    """Counts what waits for a device: single numbers that are read, and comparisons."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.overloadpacket.__name__ in ("_local_scalar_dense", "equal")
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("case", ["sd3-doubled-batch", "flux-two-calls"])
def test_looking_for_rows_reads_one_number_per_trial(pipes, case, monkeypatch):
    name, arguments, _ = CASES[case]
    pipeline, trials = getattr(pipes, name)(), []
    recorder, reads = TrajectoryRecorder(pipeline), []
    own = layouts._try
    monkeypatch.setattr(layouts, "_try", lambda *given: trials.append(given) or own(*given))
    for _ in range(2):
        with HostReads() as counted, recorder.recording(STEPS, seed=11):
            pipeline(
                **pipes.text_inputs(ROWS), **arguments, num_inference_steps=6, generator=pipes.generators(ROWS),
                output_type="pt",
            )  # fmt: skip
        reads.append(counted.count)
    assert 3 <= len(trials) < 12, "of the first recording alone"
    # the second looks of a new kind of step are read at once
    assert reads[0] - reads[1] <= len(trials)


def test_what_steps_share_is_kept_once_and_what_differs_is_not(pipes):
    _, _, trajectory = record(pipes, "flux")
    first, second = (
        dict(zip(r.calls[0].spec.unflatten(r.calls[0].leaves)[1], r.calls[0].leaves)) for r in trajectory.steps[:2]
    )
    assert first["encoder_hidden_states"] is second["encoder_hidden_states"]
    assert first["img_ids"] is second["img_ids"]
    assert first["hidden_states"] is not second["hidden_states"]


def test_the_pipelines_scheduler_stays_its_own_and_nothing_is_left_also_after_an_error(pipes):
    pipeline = pipes.toy()
    own = pipeline.scheduler
    recorder = TrajectoryRecorder(pipeline)

    def fails(output):
        assert pipeline.scheduler is own
        assert type(own) is FlowMatchEulerDiscreteScheduler
        assert own.step is not FlowMatchEulerDiscreteScheduler.step.__get__(own)
        assert inspect.signature(own.step) == inspect.signature(FlowMatchEulerDiscreteScheduler().step)
        assert inspect.signature(own.set_timesteps) == inspect.signature(
            FlowMatchEulerDiscreteScheduler().set_timesteps
        )
        assert pipeline.transformer._forward_hooks
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), recorder.recording([0]):
        pipeline(fails)
    assert pipeline.scheduler is own
    assert not {"step", "set_timesteps"} & vars(own).keys()
    assert not pipeline.transformer._forward_hooks


def test_arguments_that_the_pipeline_overwrites_are_copied(pipes):
    pipeline = pipes.toy()
    recorder = TrajectoryRecorder(pipeline)
    with recorder.recording([0, 1]) as trajectory:
        pipeline(lambda x: x, in_place=True)
    assert recorder.verify(trajectory, [0, 1]).same_geometry == 0.0


def test_a_transformer_that_is_no_function_of_its_arguments_is_refused(pipes):
    pipeline = pipes.toy()
    recorder = TrajectoryRecorder(pipeline)
    with recorder.recording([0, 1]) as trajectory:
        pipeline(lambda x: x)
    nudge(pipeline.transformer, 1e-6)
    with pytest.raises(ValueError, match=r"replaying step 0 of ToyPipeline .* differs .* up to \d"):
        recorder.verify(trajectory, [0])


def _norm(x: torch.Tensor) -> torch.Tensor:
    return torch.norm(x, dim=-1, keepdim=True)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_model_that_lost_its_numbers_is_told(pipes, value):
    pipeline = pipes.toy()
    with torch.no_grad():
        pipeline.transformer.mix.bias[0] = value
    pipeline.transformer.forward = lambda hidden_states, timestep, shift: (pipeline.transformer.mix(hidden_states),)
    with (
        pytest.raises(ValueError, match=r"ToyPipeline, step 0: .* not finite: the model has diverged"),
        TrajectoryRecorder(pipeline).recording([0]),
    ):
        pipeline(lambda x: x)


def _std(x: torch.Tensor) -> torch.Tensor:
    return x.std(dim=[1, 2], keepdim=True)


def _rescaled(cond, uncond, share: float):
    mixed = uncond + 6.0 * (cond - uncond)
    return share * (mixed * (_std(cond) / _std(mixed))) + (1 - share) * mixed


def _row_capped(cond, uncond, most: float):
    rows = []
    for c, u in zip(cond, uncond):
        mixed, limit = c + 4.0 * (c - u), torch.linalg.vector_norm(c) * most
        norm = torch.linalg.vector_norm(mixed)
        rows.append(mixed * (limit / norm) if norm > limit else mixed)
    return torch.stack(rows)


# outputs, combination, what people are told; each is how some pipeline or guider writes it
MANY = {
    "sign": (1, lambda x: -x, "-b0"),
    "from the condition": (2, lambda c, u: c + 3 * (c - u), "b0 + 3*(b0 - b1)"),
    "clipped": (1, lambda x: x.clamp(-0.3, 0.3), "clamp(b0)"),
    "scaled": (1, lambda x: 0.7 * x, "0.7*b0"),
    "a product": (3, lambda a, b, c: a + 2 * (b - c) * (a - c), "b0 + 2*(b1 - b2)*(b0 - b2)"),
    "five calls": (5, lambda a, b, c, d, e: a + 2 * (b - c) + d - e, "b0 + 2*(b1 - b2) + b3 - b4"),
    "skipped layers": (3, lambda u, c, p: u + 4.5 * (c - u) + (c - p) * 2.8, "b0 + 4.5*(b1 - b0) + 2.8*(b1 - b2)"),
    "two deltas from the condition": (
        3, lambda c, u, p: c + 2.0 * (c - u) + 1.5 * (c - p), "b0 + 2*(b0 - b1) + 1.5*(b0 - b2)",
    ),
    "image and text in a chain": (
        3, lambda c, i, u: u + 1.6 * (i - u) + 5.0 * (c - i), "b2 + 1.6*(b1 - b2) + 5*(b0 - b1)",
    ),
    "three deltas": (
        4, lambda c, u, p, m: c + 3.0 * (c - u) + 1.25 * (c - p) + 2.0 * (c - m),
        "b0 + 3*(b0 - b1) + 1.25*(b0 - b2) + 2*(b0 - b3)",
    ),
    "an output that is not used": (3, lambda u, c, p: u + 4.5 * (c - u), "b0 + 4.5*(b1 - b0)"),
    "guidance that is off": (2, lambda c, u: c, "b0"),
    "guidance of one": (2, lambda c, u: u + 1.0 * (c - u), "b1 + 1*(b0 - b1)"),
    "a negated chain": (3, lambda c, i, u: -(u + 1.6 * (i - u) + 5.0 * (c - i)), "-(b2 + 1.6*(b1 - b2) + 5*(b0 - b1))"),
    "standard deviation": (
        2, lambda c, u: _rescaled(c, u, 1.0),
        "1*(b1 + 6*(b0 - b1))*std(b0)/std(b1 + 6*(b0 - b1)) + 0*(b1 + 6*(b0 - b1))",
    ),
    "part of the standard deviation": (
        2, lambda c, u: _rescaled(c, u, 0.7),
        "0.7*(b1 + 6*(b0 - b1))*std(b0)/std(b1 + 6*(b0 - b1)) + 0.3*(b1 + 6*(b0 - b1))",
    ),
    "capped rows": (
        2, lambda c, u: -_row_capped(c, u, 1.1), "-((b0 + 4*(b0 - b1))*1.1*norm(b0)/norm(b0 + 4*(b0 - b1)))",
    ),
    "rescaled skipped layers": (
        3, lambda u, c, p: (lambda v: v * (_norm(c) / _norm(v)))(u + 4.5 * (c - u) + (c - p) * 2.8),
        "(b0 + 4.5*(b1 - b0) + 2.8*(b1 - b2))*norm(b1)/norm(b0 + 4.5*(b1 - b0) + 2.8*(b1 - b2))",
    ),
}  # fmt: skip


@pytest.mark.bits(across="again")
@pytest.mark.parametrize("name", MANY)
def test_guidance_is_told_as_a_formula(pipes, name):
    calls, combine, expected = MANY[name]
    pipeline = pipes.toy()
    recorder = TrajectoryRecorder(pipeline)
    with recorder.recording([0, 2]) as trajectory:
        pipeline(combine, calls=calls)
    rules = [str(step.rule) for step in trajectory.steps]
    assert rules == [expected, expected]
    assert recorder.verify(trajectory, [1]).same_geometry == 0.0


@pytest.mark.bits(across="again")
def test_guidance_that_changes_on_the_way_is_followed(pipes):
    scales = iter([2.0, 2.0, 2.0, 5.0, 5.0, 5.0])

    def combine(cond, uncond):
        return uncond + next(scales) * (cond - uncond)

    pipeline = pipes.toy()
    recorder = TrajectoryRecorder(pipeline)
    with recorder.recording([1, 2, 3]) as trajectory:
        pipeline(combine, calls=2)
    assert [step.rule for step in trajectory.steps] == [f"b1 + {scale}*(b0 - b1)" for scale in (2, 2, 5)]
    assert trajectory.groups == [[0, 1, 2]], "steps that differ in numbers share a call"
    assert recorder.verify(trajectory, [0, 2]).same_geometry == 0.0


def test_steps_that_are_not_run_and_pipelines_without_a_transformer_are_errors(pipes):
    pipeline = pipes.toy()
    with pytest.raises(ValueError, match=r"got the last step"), TrajectoryRecorder(pipeline).recording([5]):
        pipeline(lambda x: x)
    with (
        pytest.raises(ValueError, match=r"ran the chosen steps \[\], expected \[1\]"),
        TrajectoryRecorder(pipeline).recording([1]),
    ):
        pass
    with pytest.raises(
        ValueError, match=r"ToyPipeline has no scheduler, expected a flow-matching one, such as FlowMatchE"
    ):
        TrajectoryRecorder(type("ToyPipeline", (), {"components": pipeline.components, "scheduler": None})())
    with pytest.raises(ValueError, match=r"no component named transformer\* and no other denoiser"):
        TrajectoryRecorder(type("Empty", (), {"components": {}, "scheduler": pipeline.scheduler})())


def test_an_enabled_cache_is_an_error(pipes):
    pipeline = pipes.toy()
    pipeline.transformer.is_cache_enabled = True
    with (
        pytest.raises(ValueError, match=r"ToyPipeline has a cache enabled on transformer, .* call disable_cache\(\)"),
        TrajectoryRecorder(pipeline).recording([0]),
    ):
        pass


def test_equal_rows_and_equal_tensors_are_kept_once():
    store, module = ArgumentStore(), torch.nn.Identity()
    text = torch.randn(2, 5, 3)
    state = torch.randn(4, 6)

    def call(**changes):
        given = {
            "state": torch.cat([state, state]), "text": text.repeat_interleave(4, 0), "table": torch.eye(3),
            "names": [[(1, 2)]] * 8, "options": {"scale": 0.5, "mask": torch.ones(8, 2)}, "count": 3, **changes,
        }  # fmt: skip
        return store.call(module, (), given, 4, 2)

    first, second = call(), call(count=3)
    held = {x.data_ptr(): x for x in tensors_of([first, second]) if x.dtype != torch.int64}
    # states once and not twice, a text per prompt, one row of the mask
    assert sorted(x.numel() for x in held.values()) == sorted([24, 30, 9, 2])
    args, kwargs = join([first, second], [3, 1], torch.device("cpu"))
    assert args == ()
    assert torch.equal(kwargs["state"], state[[3, 3, 1, 1, 3, 3, 1, 1]])
    assert torch.equal(kwargs["text"], text[[0, 0, 0, 0, 1, 1, 1, 1]])
    assert torch.equal(kwargs["table"], torch.eye(3))
    assert kwargs["names"] == [[(1, 2)]] * 8
    assert kwargs["options"]["scale"] == 0.5
    assert kwargs["options"]["mask"].shape == (8, 2)
    assert joinable(first, second)
    assert joinable(first, call(state=torch.randn(8, 6)))
    changes = (
        {"count": 4}, {"table": 2 * torch.eye(3)}, {"state": torch.randn(8, 7)}, {"options": {}},
        {"text": text.repeat_interleave(2, 0)}, {"text": text.repeat_interleave(4, 0).double()},
    )  # fmt: skip
    for change in changes:
        assert not joinable(first, call(**change))


def test_rows_with_one_fingerprint_stay_different():
    store = ArgumentStore()
    rows = torch.tensor([[1.0, 2.0], [2.0, 1.0], [1.0, 2.0], [float("nan"), 0.0]])
    call = store.call(torch.nn.Identity(), (rows,), {}, 4, 1)
    (args, _) = join([call], None, torch.device("cpu"))
    assert torch.equal(args[0].nan_to_num(9.0), rows.nan_to_num(9.0))


def test_different_tensors_with_one_fingerprint_stay_different():
    store, module = ArgumentStore(), torch.nn.Identity()
    for first in (torch.eye(3), torch.tensor([[1.0, 2.0], [5.0, 0.0]])):
        second = first.flip(1)
        rows = len(first)
        # as an argument that rows share, and as one with an entry per row
        for batch in (rows + 1, rows):
            kept = [
                join([store.call(module, (x,), {}, batch, 1)], None, torch.device("cpu"))[0][0] for x in (first, second)
            ]
            assert torch.equal(kept[0], first)
            assert torch.equal(kept[1], second)
