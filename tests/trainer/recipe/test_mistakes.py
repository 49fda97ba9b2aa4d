"""Mistakes of a first day: each is one message that names the cause, before weights are loaded."""

from __future__ import annotations

import pytest
from diffusers import DDIMScheduler, UniPCMultistepScheduler
from test_rehearsal import recipe_of

from flowdppo_fast.trainer.recipe import PreparedRun
from flowdppo_fast.trainer.recipe.preflight import check_environment, inspect_pipeline


@pytest.fixture
def folder(pipes, tmp_path):
    pipes.sd3().save_pretrained(tmp_path / "sd3")
    for file in (tmp_path / "sd3").rglob("*.safetensors"):
        file.unlink()
    return tmp_path / "sd3"


def test_a_scheduler_that_is_no_flow_is_found_in_its_config(folder):
    inspect_pipeline(recipe_of(folder))
    (folder / "scheduler" / "scheduler_config.json").unlink()
    index = folder / "model_index.json"
    own = index.read_text()
    for scheduler, message in (
        (DDIMScheduler(), "got that of DDIMScheduler, expected a flow-matching scheduler"),
        (UniPCMultistepScheduler(), "got that of UniPCMultistepScheduler, expected a flow-matching scheduler"),
    ):
        scheduler.save_pretrained(folder / "scheduler")
        index.write_text(own.replace("FlowMatchEulerDiscreteScheduler", type(scheduler).__name__))
        with pytest.raises(ValueError, match=f"pipeline.pretrained: the scheduler of .*sd3: .*{message}"):
            inspect_pipeline(recipe_of(folder))
    flow = UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
    flow.save_pretrained(folder / "scheduler")
    inspect_pipeline(recipe_of(folder))


def test_an_attention_backend_from_the_hub_has_one_message(folder):
    recipe = recipe_of(folder, pipeline={"attention_backend": "_flash_3_hub"})
    with pytest.raises(ValueError, match="expected one whose code is not fetched from the Hub") as error:
        check_environment(recipe)
    assert "pip install" not in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_a_model_that_the_hub_does_not_give_says_what_may_be_missing():
    recipe = recipe_of("nobody/nothing", pipeline={"local_files_only": True})
    with pytest.raises(ValueError, match=r"cannot read nobody/nothing \(without a network .* token in HF_TOKEN"):
        inspect_pipeline(recipe)


def test_a_look_at_a_recipe_is_not_refused_for_its_folder(folder, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text("{}\n")
    recipe = recipe_of(folder, run={"output_dir": str(run)})
    assert "holds a run already" in PreparedRun.of(recipe, devices=False).note
    with pytest.raises(ValueError, match="holds a run already"):
        PreparedRun.of(recipe)
