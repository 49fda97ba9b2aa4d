"""A rollout in memory, on disk and from a server's answer: kept to the bit, and what does not fit is refused."""

from __future__ import annotations

import base64
import dataclasses
import json
import pickle
import re
from pathlib import Path

import pytest
import torch
from digits_example import PROMPTS
from safetensors.torch import save_file

from flowdppo_fast import PhiloxNoise, SDEStep, fused_dppo_velocity_loss
from flowdppo_fast.trainer import FlowMatchSDEScheduler, TrajectoryRecorder
from flowdppo_fast.trainer.engines.container import EngineRollout
from flowdppo_fast.trainer.engines.readers import TrajectoryCollector, read_sglang
from flowdppo_fast.trainer.engines.wire import decode, encode

SIGMAS = torch.tensor([1.0, 0.9, 0.75, 0.5, 0.25, 0.0])
ROWS, STEPS, LATENT = 3, (1, 3), (2, 4, 4)


def sampled(noise: str = "stored", dtype=torch.float32, sampler="flow_sde", eta=0.7) -> EngineRollout:
    """What an engine that takes exact steps would give."""
    g = torch.Generator().manual_seed(0)
    velocity = torch.randn(ROWS, len(SIGMAS) - 1, *LATENT, generator=g).to(dtype)
    streams = torch.arange(ROWS * 2).view(ROWS, 2)
    seeded = PhiloxNoise(5, streams)
    stored = seeded.materialize((ROWS, 2, *LATENT), row_dims=2)
    states = [torch.randn(ROWS, *LATENT, generator=g)]
    empty = EngineRollout(
        velocity[:, list(STEPS)], stored, SIGMAS, STEPS, states[0][:, None], (0,), sampler, eta
    ).sde_step
    for index in range(len(SIGMAS) - 1):
        x, v = states[-1], velocity[:, index]
        if index in STEPS:
            place = STEPS.index(index)
            step = empty[place : place + 1]
            a, b, s = (torch.as_tensor(value).item() for value in (step.sample_coef, step.velocity_coef, step.std))
            states.append((a * x.double() + b * v.double() + s * stored[:, place].double()).float())
        else:
            states.append(x + float(SIGMAS[index + 1] - SIGMAS[index]) * v)
    return EngineRollout(
        velocity[:, list(STEPS)], stored if noise == "stored" else seeded, SIGMAS, STEPS,
        torch.stack(states, dim=1), tuple(range(len(SIGMAS))), sampler, eta, {"text": torch.randn(ROWS, 5, 8)},
    )  # fmt: skip


def assert_equal(a: EngineRollout, b: EngineRollout) -> None:
    for name in ("velocity", "sigmas", "states"):
        one, other = getattr(a, name), getattr(b, name)
        assert one.dtype == other.dtype
        assert torch.equal(one, other), name
    assert (a.steps, a.state_steps, a.sampler, a.eta) == (b.steps, b.state_steps, b.sampler, b.eta)
    assert a.conditioning.keys() == b.conditioning.keys()
    assert all(torch.equal(a.conditioning[name], b.conditioning[name]) for name in a.conditioning)
    if isinstance(a.noise, PhiloxNoise):
        assert a.noise.seed == b.noise.seed
        assert torch.equal(a.noise.stream, b.noise.stream)
    else:
        assert torch.equal(a.noise, b.noise)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("noise", ["stored", "seeded"])
def test_a_file_holds_what_was_saved(tmp_path, noise, dtype):
    rollout = sampled(noise, dtype, "cps", 0.5)
    rollout.save(tmp_path / "rollout.safetensors")
    assert_equal(rollout, EngineRollout.load(tmp_path / "rollout.safetensors"))


def test_the_loss_takes_a_rollout_as_it_is(tmp_path):
    sampled().save(tmp_path / "rollout.safetensors")
    rollout = EngineRollout.load(tmp_path / "rollout.safetensors")
    new = (rollout.velocity + 0.01).requires_grad_()
    advantages = torch.tensor([1.0, -1.0, 0.5])[:, None].expand(-1, 2)
    out = fused_dppo_velocity_loss(new, rollout.velocity, rollout.noise, rollout.sde_step, advantages)
    out.loss.backward()
    steps = [SDEStep.from_sigmas("flow_sde", *SIGMAS[i : i + 2].tolist(), eta=0.7) for i in STEPS]
    scale = torch.tensor([abs(step.velocity_coef) / step.std for step in steps]).double()
    torch.testing.assert_close(out.rows.kl.double(), ((scale * 0.01) ** 2 / 2).expand(3, 2), rtol=1e-4, atol=0)
    assert new.grad.abs().max() > 0


def test_parts_are_joined_in_order():
    for noise in ("stored", "seeded"):
        rollout = sampled(noise)
        parts = [
            dataclasses.replace(
                rollout, velocity=rollout.velocity[rows], states=rollout.states[rows],
                noise=rollout.noise[rows] if noise == "stored" else PhiloxNoise(5, rollout.noise.stream[rows]),
                conditioning={"text": rollout.conditioning["text"][rows]},
            )
            for rows in (slice(0, 1), slice(1, 3))
        ]  # fmt: skip
        assert_equal(rollout, EngineRollout.join(parts))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"velocity": torch.zeros(ROWS, 1, *LATENT)}, r"velocity: got shape \[3, 1, 2, 4, 4\], expected \[3, 2, 2, 4"),
        ({"noise": torch.zeros(ROWS, 2, 2, 4, 3)}, "noise: got shape"),
        ({"noise": PhiloxNoise(1, torch.zeros(2, 2, dtype=torch.int64))}, r"noise.stream: got shape \[2, 2\]"),
        ({"states": torch.full((ROWS, 6, *LATENT), torch.nan)}, "states: got numbers that are not finite"),
        ({"sigmas": SIGMAS.double()}, r"sigmas: got torch.float64 \[6\], expected float32"),
        ({"steps": (3, 1)}, r"steps: got \[3, 1\], expected ascending indices from 0 to 4"),
        ({"steps": (1, 5)}, r"steps: got \[1, 5\]"),
        ({"state_steps": (0, 1, 2, 3, 4, 6)}, "state_steps: got"),
        ({"conditioning": {"text": torch.zeros(2, 8)}}, r"conditioning.text: got shape \[2, 8\], expected \[3, 8\]"),
    ],
)
def test_what_does_not_fit_together_is_refused(change, told):
    with pytest.raises(ValueError, match=told):
        dataclasses.replace(sampled(), **change)


def test_noise_of_one_first_stream_is_refused():
    with pytest.raises(TypeError, match="noise: got one first stream"):
        dataclasses.replace(sampled(), noise=PhiloxNoise(1, 0))


@pytest.mark.parametrize(
    ("change", "error"),
    [({"eta": 0.6}, "eta=0.6"), ({"sampler": "dance"}, "sampler='dance'"), ({"noise": 0}, "step 1")],
)
def test_steps_of_another_kind_are_seen(change, error):
    assert sampled().check_steps() < 1e-5
    if "noise" in change:
        change = {"noise": sampled().noise.flip(0)}
    with pytest.raises(ValueError, match=rf"step 1 is off .*{error}|{error} is off"):
        dataclasses.replace(sampled(), **change).check_steps()


def test_steps_that_cannot_be_compared_are_not():
    rollout = sampled()
    few = dataclasses.replace(rollout, states=rollout.states[:, ::5], state_steps=(0, 5), eta=0.6)
    assert few.check_steps() == 0.0


@pytest.mark.parametrize("kind", ["absent", "pickle", "other", "version", "part"])
def test_files_of_another_form_are_refused(tmp_path, kind):
    path = tmp_path / "rollout.safetensors"
    told = "no rollout could be read"
    if kind == "pickle":
        path.write_bytes(pickle.dumps({"velocity": 1}))
    elif kind == "other":
        save_file({"velocity": torch.zeros(1)}, path)
        told = "got metadata None, expected flowdppo_rollout of version 1"
    elif kind == "version":
        save_file({"velocity": torch.zeros(1)}, path, {"flowdppo_rollout": '{"version": 2}'})
        told = "expected flowdppo_rollout of version 1"
    elif kind == "part":
        save_file({"velocity": torch.zeros(1)}, path, {"flowdppo_rollout": '{"version": 1, "steps": [0]}'})
        told = "got no sigmas, states, noise, state_steps, sampler, eta"
    with pytest.raises(ValueError, match=told):
        EngineRollout.load(path)


def answers(rollout: EngineRollout, *, every: bool) -> list[dict]:
    """As SGLang answers: one per image, without a batch dim; debug tensors of all steps or of the chosen ones."""
    made = []
    for row in range(len(rollout)):
        velocity, noise = rollout.velocity[row], rollout.noise[row]
        if every:
            whole = torch.full((len(SIGMAS) - 1, *LATENT), 7.0)
            velocity, noise = (whole.index_copy(0, torch.tensor(STEPS), x) for x in (velocity, noise))
        made.append(
            {
                "request_id": "a",
                "prompt": "a cat",
                "seed": row,
                "generated_output": None,
                "rollout_log_probs": encode(torch.zeros(len(SIGMAS) - 1)),
                "dit_trajectory": encode(
                    {"latents": rollout.states[row], "sigmas": SIGMAS, "timesteps": SIGMAS[:-1] * 1000}
                ),
                "rollout_debug_tensors": encode(
                    {
                        "rollout_model_outputs": velocity,
                        "rollout_variance_noises": noise,
                        "rollout_prev_sample_means": None,
                    }
                ),
                "denoising_env": encode(
                    {
                        "pos_cond_kwargs": {"encoder_hidden_states": [rollout.conditioning["text"][row]]},
                        "guidance": None,
                    }
                ),
            }
        )
    return made


@pytest.mark.parametrize("every", [True, False])
def test_answers_of_sglang(every):
    rollout = sampled()
    read = read_sglang(answers(rollout, every=every), STEPS)
    name = "pos_cond_kwargs.encoder_hidden_states.0"
    assert_equal(dataclasses.replace(rollout, conditioning={name: rollout.conditioning["text"]}), read)
    assert read.check_steps() < 1e-5


def test_kept_latents_are_those_the_answer_names():
    rollout = sampled()
    given = answers(rollout, every=True)
    for row, answer in enumerate(given):
        answer["dit_trajectory"]["latents"] = encode(rollout.states[row][[0, 1, 5]])
    assert read_sglang(given, STEPS, state_steps=[0, 1, 5]).state_steps == (0, 1, 5)
    with pytest.raises(ValueError, match="states: got shape"):
        read_sglang(given, STEPS)
    for answer in given:
        answer["dit_trajectory"]["latent_step_indices"] = encode(torch.tensor([0, 1, 5]))
    assert torch.equal(read_sglang(given, STEPS).state(5), rollout.states[:, 5])


@pytest.mark.parametrize(
    ("part", "name", "told"),
    [
        (
            "rollout_debug_tensors",
            None,
            "rollout_debug_tensors.rollout_model_outputs.*expected rollout_debug_mode=true",
        ),
        ("dit_trajectory", None, "dit_trajectory.latents.*expected rollout_return_dit_trajectory=true"),
        ("dit_trajectory", "sigmas", r"got no dit_trajectory\.sigmas, expected .* sends sigmas"),
    ],
)
def test_what_an_engine_left_out_is_named(part, name, told):
    given = answers(sampled(), every=True)
    given[0][part] = None if name is None else {k: v for k, v in given[0][part].items() if k != name}
    with pytest.raises(ValueError, match=f"answer 0: .*{told}"):
        read_sglang(given, STEPS)


def test_a_number_of_steps_that_fits_nothing_is_named():
    given = answers(sampled(), every=True)
    given[1]["rollout_debug_tensors"]["rollout_variance_noises"] = encode(torch.zeros(4, *LATENT))
    with pytest.raises(ValueError, match="answer 1: rollout_variance_noises has 4 steps, expected all 5 or the 2"):
        read_sglang(given, STEPS)
    with pytest.raises(ValueError, match="answers: got none"):
        read_sglang([], STEPS)


@pytest.mark.parametrize(
    "data", ["not base64!", base64.b64encode(b"short").decode(), base64.b64encode(pickle.dumps([1])).decode(), None, 3]
)
def test_what_is_no_tensor_is_refused(data):
    with pytest.raises(ValueError, match=r"a tensor: got .*, expected base64 of a safetensors file"):
        decode({"part": [{"__tensor__": True, "data": data}]})


def test_values_pass_the_wire():
    value = {"a": [torch.arange(3), None, {"b": torch.ones(2, dtype=torch.bfloat16)}], "c": "x", "d": 1.5, "e": True}
    read = decode(encode(value))
    assert torch.equal(read["a"][0], value["a"][0])
    assert read["a"][2]["b"].dtype == torch.bfloat16
    assert (read["a"][1], read["c"], read["d"], read["e"]) == (None, "x", 1.5, True)
    with pytest.raises(TypeError, match="got a set, expected tensors"):
        encode({"a": {1, 2}})


@pytest.mark.parametrize("noise", ["stored", "seeded"])
def test_the_recorder_and_an_injected_scheduler_keep_the_same_rollout(pipes, noise):
    arguments = {"prompt": PROMPTS[:2], "num_inference_steps": 6, "guidance_scale": 2.0, "output_type": "latent"}

    def call(pipeline):
        return pipeline(**arguments, generator=pipes.generators(2))

    recorder = TrajectoryRecorder(pipes.digits(), noise=noise)
    with recorder.recording([1, 3], seed=9, first_row=4) as trajectory:
        collector = TrajectoryCollector(recorder.pipeline.scheduler)
        images = call(recorder.pipeline).images
    recorded = collector.get_trajectory()
    injected = pipes.digits()
    injected.scheduler = FlowMatchSDEScheduler.from_config(
        injected.scheduler, sde_steps=[1, 3], noise=noise, seed=9, first_row=4
    )
    collector = TrajectoryCollector(injected.scheduler)
    call(injected)
    assert_equal(recorded, collector.get_trajectory())
    assert torch.equal(recorded.velocity, trajectory.velocity)
    assert torch.equal(recorded.state(6), images)
    assert recorded.state_steps == (0, 1, 2, 3, 4, 6)
    assert recorded.check_steps() < 1e-4
    collector.reset()
    with pytest.raises(ValueError, match=r"ran the chosen steps \[\], expected \[1, 3\]"):
        collector.get_trajectory()


def test_the_page_says_how_many_bytes_an_image_is():
    page = (Path(__file__).parents[2] / "docs" / "distributed.md").read_text()
    (told,) = re.findall(r"an image is (\d+\.\d) MB", page)
    velocity, noise, states = torch.zeros(2, 16, 128, 128), torch.zeros(2, 16, 128, 128), torch.zeros(4, 16, 128, 128)
    answer = encode({"v": velocity.bfloat16(), "e": noise, "x": states.bfloat16()})
    assert f"{len(json.dumps(answer)) / 1e6:.1f}" == told
