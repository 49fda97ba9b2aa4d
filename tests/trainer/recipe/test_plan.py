"""``flowdppo plan``: memory by phase is that of real components, counts are those of a run, levers are settings."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from test_rehearsal import recipe_of, sd3_with_encoders  # noqa: F401

from flowdppo_fast.cli import main
from flowdppo_fast.trainer import FlowDPPOConfig
from flowdppo_fast.trainer.levers import PHASES, next_lever
from flowdppo_fast.trainer.recipe.memory import LiveBytes, fused_attention
from flowdppo_fast.trainer.recipe.plan import describe_plan, plan_run
from flowdppo_fast.trainer.recipe.preflight import inspect_pipeline
from flowdppo_fast.trainer.recipe.recipe import PipelineConfig

SIZE = {"height": 8, "width": 8}


def planned(folder, **sections):
    sampling = {"pipeline_kwargs": SIZE, "prompts_per_rollout": 2, "group_size": 4, **sections.pop("sampling", {})}
    recipe = recipe_of(folder, sampling=sampling, **sections)
    plan = inspect_pipeline(recipe)
    return recipe, plan, plan_run(recipe, plan)


def peak_of(call, module, *args, **kwargs) -> int:
    given = [x for x in (*args, *kwargs.values()) if torch.is_tensor(x)]
    live = LiveBytes([*module.parameters(), *module.buffers(), *given])
    with torch.no_grad(), fused_attention(), live:
        call(*args, **kwargs)
    return live.peak


def test_peaks_are_those_of_the_real_components(sd3_with_encoders):  # noqa: F811
    pipeline, folder = sd3_with_encoders
    _, _, found = planned(folder)
    assert found.missing is None
    seen = {}
    hook = pipeline.transformer.register_forward_pre_hook(lambda m, a, k: seen.update(k), with_kwargs=True)
    latents = []
    own = pipeline.vae.decode
    pipeline.vae.decode = lambda z, **options: (latents.append(z), own(z, **options))[1]
    try:
        pipeline("a cat", num_images_per_prompt=8, num_inference_steps=2, output_type="pt", **SIZE)
    finally:
        hook.remove()
        del pipeline.vae.decode
    held = found.parts["rollout"]
    seen.pop("return_dict")
    denoising = peak_of(pipeline.transformer, pipeline.transformer, **seen, return_dict=False)
    assert found.peaks["denoising"] - held == pytest.approx(denoising, rel=0.02)
    decoding = peak_of(pipeline.vae.decode, pipeline.vae, latents[0])
    assert found.peaks["decoding"] - held == pytest.approx(decoding, rel=0.02)
    ids = torch.zeros(1, 77, dtype=torch.long)
    encoding = peak_of(pipeline.text_encoder, pipeline.text_encoder, ids, output_hidden_states=True)
    # two prompts in the call
    assert found.peaks["encoding"] - held == pytest.approx(2 * encoding, rel=0.1)
    assert found.peaks["update"] == found.parts["update"]


def test_counts_are_those_of_a_run(sd3_with_encoders):  # noqa: F811
    _, folder = sd3_with_encoders
    sampling = {"batch_size": 4, "pipeline_kwargs": {**SIZE, "guidance_scale": 4.0}}
    optimizer = {"micro_batch_size": 2, "steps_per_micro_batch": 1, "inner_epochs": 2}
    _, _, found = planned(folder, sampling=sampling, optimizer=optimizer)
    # guidance doubles the batch: 2 calls of 4 steps; 8 rows by 2, 2 steps, 2 passes
    assert found.calls == (2 * 4, 4 * 2 * 2)
    assert found.forwards == (8 * 4 * 2, 8 * 2 * 2 * 2 * 3)
    _, _, more = planned(
        folder, sampling=sampling, optimizer=optimizer, model={"gradient_checkpointing": True},
        objective={"kl_weight": 0.1},
    )  # fmt: skip
    assert more.calls[1] == 2 * found.calls[1]
    assert more.forwards[1] * 3 == found.forwards[1] * 5
    assert more.peaks["update"] < found.peaks["update"]


def test_a_card_that_is_too_small_gets_the_next_lever(sd3_with_encoders):  # noqa: F811
    _, folder = sd3_with_encoders
    recipe, plan, found = planned(folder)
    largest = max(found.peaks.values())
    said = describe_plan(recipe, plan, found, [largest / 1e9, (largest - 1) / 1e9])
    fits, small = said.splitlines()[-3:], said
    assert fits[0].endswith("GB: fits")
    phase = max(found.peaks, key=found.peaks.get)
    assert f"  {PHASES[phase]} needs" in small
    assert f"; next: {next_lever(phase, recipe.config, recipe.pipeline)}" in small
    assert found.too_large(largest) == []
    _, _, sliced = planned(folder, pipeline={"vae_slicing": True})
    decoding = [plan.peaks["decoding"] - plan.parts["rollout"] for plan in (found, sliced)]
    assert decoding[1] < decoding[0] / 4


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("with_recipe", [True, False])
def test_levers_are_settings_that_were_not_yet_made_until_none_is_left(phase, with_recipe):
    values = {"sampling": {"prompts_per_rollout": 4, "group_size": 8}}
    pipeline = PipelineConfig(pretrained="x/y") if with_recipe else None
    done = []
    for _ in range(30):
        text = next_lever(phase, FlowDPPOConfig.from_dict(values), pipeline)
        assert text not in done
        done.append(text)
        if text.startswith("more processes"):
            break
        section, _, rest = text.partition(".")
        key, colon, value = rest.partition(": ")
        if section == "pipeline" and (not with_recipe or not colon):
            # in Python it is the caller's pipeline, of which nothing is known
            return
        if section == "pipeline":
            assert hasattr(pipeline, key)
            setattr(pipeline, key, yaml.safe_load(value))
        else:
            values.setdefault(section, {})[key] = yaml.safe_load(value)
    assert done[-1].startswith("more processes")
    assert len(done) >= 4


def test_the_command_says_the_plan(sd3_with_encoders, tmp_path, capsys):  # noqa: F811
    _, folder = sd3_with_encoders
    recipe, _, found = planned(folder)
    recipe.save(tmp_path / "recipe.yaml")
    assert main(["plan", str(tmp_path / "recipe.yaml"), "--card", "24", "--card", "0.0001"]) == 0
    said = capsys.readouterr().out
    assert "LoRA on " in said
    assert " of 2 blocks" in said
    assert "24 GB: fits" in said
    assert "0.0001 GB: too small" in said
    assert main(["plan", str(tmp_path / "recipe.yaml"), "--json"]) == 0
    numbers = json.loads(capsys.readouterr().out)
    assert numbers["peaks"] == found.peaks
    assert numbers["trajectory"] == found.trajectory
