"""A run continues in three classes: free, with a warning, refused unless it is allowed; out of memory is a sentence."""

from __future__ import annotations

import json
import logging
import shutil

import pytest
import torch
from digits_example import EXAMPLE, PROMPTS, ink
from test_cli import CONFIG, SHORT, refused

from flowdppo_fast.cli import main
from flowdppo_fast.trainer import FlowDPPOTrainer
from flowdppo_fast.trainer.levers import explain_out_of_memory


@pytest.fixture
def started(tmp_path):
    """Arguments of a run of one iteration that is done, on a copy of the model and a prompt file."""
    shutil.copytree(EXAMPLE / "checkpoint", tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("3\n5\n")
    arguments = ["train", CONFIG, *SHORT, f"run.output_dir={tmp_path / 'run'}", "run.progress=false"]
    assert main([*arguments, *inputs(tmp_path / "model", tmp_path / "prompts.txt"), "run.iterations=1"]) == 0
    return arguments


def inputs(model, prompts) -> list[str]:
    return [f"pipeline.pretrained={model}", f"prompts.train={prompts}"]


def changes(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "changes.jsonl").read_text().splitlines()]


def test_the_same_model_and_prompts_may_lie_elsewhere(started, tmp_path, capsys):
    shutil.move(tmp_path / "model", tmp_path / "moved")
    shutil.move(tmp_path / "prompts.txt", tmp_path / "elsewhere.txt")
    moved = [*started, *inputs(tmp_path / "moved", tmp_path / "elsewhere.txt"), "run.iterations=2", "--resume"]
    (tmp_path / "elsewhere.txt").write_text("3\n6\n")
    assert "the contents of prompts.train; expected the same" in refused(capsys, *moved)
    (tmp_path / "elsewhere.txt").write_text("3\n5\n")
    weights = next((tmp_path / "moved" / "transformer").glob("*.safetensors"))
    own = weights.read_bytes()
    weights.write_bytes(own[:-4] + b"\0\0\0\1")
    assert "the contents of pipeline.pretrained; expected the same" in refused(capsys, *moved)
    weights.write_bytes(own)
    (tmp_path / "moved" / ".cache").mkdir()
    (tmp_path / "moved" / ".cache" / "stamp").write_text("another download")
    assert main(moved) == 0
    assert not (tmp_path / "run" / "changes.jsonl").exists()


def test_a_changed_setting_goes_on_where_that_is_allowed_and_is_kept_for_readers(started, tmp_path, capsys):
    again = [*started, *inputs(tmp_path / "model", tmp_path / "prompts.txt"), "--resume"]
    faster = ["optimizer.learning_rate=0.002", "run.iterations=2"]
    said = refused(capsys, *again, *faster)
    assert "optimizer.learning_rate; expected the same, or --allow-changed (allow_changed=True in Python)" in said
    assert main([*again, *faster, "--allow-changed"]) == 0
    (line,) = changes(tmp_path / "run")
    assert line["iteration"] == 1
    assert line["changed"]["optimizer.learning_rate"][1] == 0.002
    # the run is one with the new rate from here on
    assert main([*again, "optimizer.learning_rate=0.002", "run.iterations=3"]) == 0
    assert len(changes(tmp_path / "run")) == 1


def test_rounding_is_a_warning_and_kept_for_readers(pipes, small_config, caplog):
    FlowDPPOTrainer(pipes.digits(), ink, PROMPTS, small_config()).train()
    again = small_config(optimizer={"micro_batch_size": 4}, run={"iterations": 4})
    with caplog.at_level(logging.WARNING):
        FlowDPPOTrainer(pipes.digits(), ink, PROMPTS, again).train(resume=True)
    assert "optimizer.micro_batch_size is 4, and was 8: numbers round otherwise" in caplog.text
    with open(again.run.output_dir + "/changes.jsonl") as log:
        assert json.loads(log.read()) == {"iteration": 3, "changed": {"optimizer.micro_batch_size": [8, 4]}}


def test_other_weights_or_rewards_of_the_past_cannot_be_allowed(pipes, small_config):
    lora = {"train": "lora", "lora_rank": 2}
    FlowDPPOTrainer(pipes.digits(), ink, PROMPTS, small_config(model=lora, advantage={"history": 8})).train()
    wider = FlowDPPOTrainer(
        pipes.digits(), ink, PROMPTS, small_config(model={**lora, "lora_rank": 4}, advantage={"history": 8})
    )
    wider.state.allow_changed = True
    with pytest.raises(ValueError, match=r"weights has shape \[2, \d+\] for .*, expected that of the pipeline's"):
        wider.train(resume=True)
    other = FlowDPPOTrainer(pipes.digits(), ink, PROMPTS[::-1], small_config(model=lora, advantage={"history": 8}))
    other.state.allow_changed = True
    with pytest.raises(ValueError, match="of which entry 0 is not that of the run"):
        other.train(resume=True)


class Full:
    """Raises what a full device does, where it is called."""

    def __init__(self, module, method):
        self.own = getattr(module, method)
        setattr(module, method, self)

    def __call__(self, *args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2.00 GiB")


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("transformer", r"full in denoising: try sampling\.batch_size: 8 next"),
        ("vae", r"full in decoding images: try pipeline\.vae\.enable_tiling\(\) next"),
        ("reward", r"full in computing rewards: try sampling\.batch_size: 8 next"),
        ("backward", r"full in an update: try model\.mixed_precision: bf16 next"),
    ],
)
def test_out_of_memory_is_one_sentence(pipes, small_config, where, said):
    pipeline, prompts, reward, options = pipes.digits(), PROMPTS, ink, {}
    if where == "vae":
        pipeline, options = pipes.sd3(), {"guidance_scale": 0.0}
        prompts = [{key: value[row] for key, value in pipes.text_inputs(4).items()} for row in range(4)]
    config = small_config(sampling={"pipeline_kwargs": options})
    trainer = FlowDPPOTrainer(pipeline, lambda *given: reward(*given), prompts, config)
    if where == "transformer":
        Full(pipeline.transformer.transformer_blocks[0], "forward")
    elif where == "vae":
        Full(pipeline.vae.decoder, "forward")
    elif where == "reward":
        reward = Full(type("Empty", (), {"f": ink}), "f")
    else:
        Full(trainer, "_loss")
    with pytest.raises(torch.OutOfMemoryError, match=said) as error:
        trainer.train()
    text = str(error.value)
    assert "\n" not in text
    assert text.endswith("CUDA out of memory. Tried to allocate 2.00 GiB")


def test_the_command_prints_the_sentence_and_no_traceback(tmp_path, capsys, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(FlowDPPOTrainer, "_loss", full)
    assert main(["train", CONFIG, f"run.output_dir={tmp_path / 'run'}", *SHORT, "pipeline.vae_slicing=false"]) == 1
    said = capsys.readouterr().err
    assert "flowdppo train: the device's memory is full in an update: try " in said
    assert "Traceback" not in said


def test_a_text_encoder_that_does_not_fit_is_named(small_config):
    class Pipeline:
        def __init__(self):
            self.components = {"text_encoder_2": torch.nn.Linear(2, 2)}
            Full(self.components["text_encoder_2"], "forward")

        def __call__(self):
            return self.components["text_encoder_2"](torch.zeros(2))

    with pytest.raises(torch.OutOfMemoryError) as error:
        Pipeline()()
    said = explain_out_of_memory(error.value, small_config(), updating=False)
    assert "full in encoding texts" in said
