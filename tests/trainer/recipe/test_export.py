"""Trained weights of a run folder, read back by diffusers and put into a fresh pipeline."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    WanPipeline,
    WanTransformer3DModel,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from flowdppo_fast.trainer import FlowDPPOTrainer, checkpoint
from flowdppo_fast.trainer.recipe import Recipe
from flowdppo_fast.trainer.recipe.export import SavedRun, apply_weights, export_run
from flowdppo_fast.trainer.weights.adapters import add_lora


def pixels(images, prompts, metadata):
    return images.mean(dim=(1, 2, 3))


@pytest.fixture
def trained(pipes, small_config):
    """Trains a tiny pipeline for an iteration; returns the trainer and what draws with a pipeline of its kind."""

    def run(name: str, **sections):
        embeds = pipes.text_inputs(1)
        if name == "flux":
            embeds = {key: value for key, value in embeds.items() if not key.startswith("negative")}
        kwargs = {"height": 16, "width": 16} if name == "flux" else {"guidance_scale": 2.0}
        config = small_config(
            **{
                "sampling": {"pipeline_kwargs": kwargs, "prompts_per_rollout": 2},
                "optimizer": {"learning_rate": 0.02},
                "run": {"iterations": 1},
                **sections,
            }
        )
        prompts = [{key: value[0] for key, value in embeds.items()}]
        trainer = FlowDPPOTrainer(getattr(pipes, name)(), pixels, prompts, config)
        trainer.train()

        def draw(pipeline):
            return pipeline(
                **embeds, **kwargs, num_inference_steps=3, output_type="pt", generator=torch.Generator().manual_seed(7)
            ).images

        return trainer, draw

    return run


LORA = {"train": "lora", "lora_rank": 4, "lora_alpha": 3.0}


@pytest.mark.bits(across="again")
@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("sd3", ["to_q", "to_v", "to_out.0"]),
        ("flux", ["to_q", "to_v", "to_out.0"]),
        ("sd3", r"transformer_blocks\.\d+\.attn\.to_[qv]"),
        ("flux", "all-linear"),
    ],
)
def test_lora_is_what_load_lora_weights_loads(pipes, trained, tmp_path, name, targets):
    trainer, draw = trained(name, model={**LORA, "lora_targets": targets})
    run = SavedRun.open(trainer.output)
    written = export_run(run, tmp_path / "out")
    assert [path.name for path in written] == ["pytorch_lora_weights.safetensors", "flowdppo.json"]
    fresh = getattr(pipes, name)()
    before = draw(fresh)
    fresh.load_lora_weights(tmp_path / "out")
    settings = fresh.transformer.peft_config["default_0"]
    assert (settings.r, settings.lora_alpha) == (4, 3.0)
    after = draw(fresh)
    # the same operations on the same numbers
    assert torch.equal(after, draw(trainer.pipeline))
    assert (after - before).abs().max() > 1e-4


def test_folded_alpha_needs_no_metadata(pipes, trained, tmp_path):
    trainer, draw = trained("sd3", model=LORA)
    export_run(SavedRun.open(trainer.output), tmp_path / "out", fold_alpha=True)
    path = tmp_path / "out" / "pytorch_lora_weights.safetensors"
    with safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["lora_adapter_metadata"])["transformer.lora_alpha"] == 4
    # as a program that drops the metadata
    save_file(load_file(path), path)
    fresh = pipes.sd3()
    fresh.load_lora_weights(tmp_path / "out")
    # alpha/rank = 0.75 is exact in binary: only the order of two multiplications differs
    assert torch.allclose(draw(fresh), draw(trainer.pipeline), rtol=0, atol=64 * torch.finfo(torch.float32).eps)


@pytest.mark.bits(across="again")
def test_default_alpha_is_twice_the_rank(pipes, trained, tmp_path):
    trainer, draw = trained("sd3", model={"train": "lora"})
    export_run(SavedRun.open(trainer.output), tmp_path / "out")
    fresh = pipes.sd3()
    fresh.load_lora_weights(tmp_path / "out")
    settings = fresh.transformer.peft_config["default_0"]
    assert (settings.r, settings.lora_alpha) == (32, 64.0)
    assert torch.equal(draw(fresh), draw(trainer.pipeline))


@pytest.mark.bits(across="again")
def test_the_moving_average_is_taken_unless_the_weights_are_wanted(pipes, trained, tmp_path):
    trainer, draw = trained("sd3", model={**LORA, "ema_decay": 0.9})
    images = {}
    for average in (None, True, False):
        export_run(SavedRun.open(trainer.output, average=average), tmp_path / str(average))
        fresh = pipes.sd3()
        fresh.load_lora_weights(tmp_path / str(average))
        images[average] = draw(fresh)
    assert torch.equal(images[None], images[True])
    assert torch.equal(images[False], draw(trainer.pipeline))
    assert not torch.equal(images[True], images[False])
    with trainer.weights.averaged():
        assert torch.equal(images[True], draw(trainer.pipeline))


def test_written_weights_have_the_format_that_is_asked_for(trained, tmp_path):
    trainer, _ = trained("sd3", model=LORA)
    export_run(SavedRun.open(trainer.output), tmp_path / "out", dtype=torch.bfloat16)
    tensors = load_file(tmp_path / "out" / "pytorch_lora_weights.safetensors")
    assert {value.dtype for value in tensors.values()} == {torch.bfloat16}
    assert all(key.startswith("transformer.transformer_blocks.") for key in tensors)


@pytest.mark.bits(across="again")
@pytest.mark.parametrize("train", ["lora", "full"])
def test_weights_go_into_a_fresh_pipeline(pipes, trained, train):
    trainer, draw = trained("sd3", model=LORA if train == "lora" else {"train": "full"})
    fresh = pipes.sd3()
    apply_weights(SavedRun.open(trainer.output), fresh)
    assert torch.equal(draw(fresh), draw(trainer.pipeline))


def test_another_pipeline_is_refused(pipes, trained):
    trainer, _ = trained("sd3", model={"train": "full"})
    with pytest.raises(ValueError, match=r"pipeline: transformer\..* in .*, here it is"):
        apply_weights(SavedRun.open(trainer.output), pipes.flux())
    other = pipes.sd3()
    other.register_modules(transformer=None)
    with pytest.raises(ValueError, match="StableDiffusion3Pipeline has no transformer"):
        apply_weights(SavedRun.open(trainer.output), other)


def leave_recipe(trainer, base) -> None:
    values = {
        "pipeline": {"pretrained": str(base), "dtype": "float32"},
        "prompts": {"train": ["a"]},
        "rewards": [{"name": "jpeg"}],
        **trainer.config.to_dict(),
    }
    Recipe.from_dict(values).save(trainer.output / "recipe.yaml")


@pytest.mark.parametrize("sharded", [False, True])
def test_full_weights_are_what_from_pretrained_loads(pipes, trained, tmp_path, monkeypatch, sharded):
    base = pipes.sd3()
    # a buffer that the class would not compute itself has to come from the base's files
    base.transformer.pos_embed.pos_embed += 0.25
    base.save_pretrained(tmp_path / "base", max_shard_size="8KB" if sharded else "10GB")
    assert (tmp_path / "base/transformer/diffusion_pytorch_model.safetensors.index.json").exists() is sharded
    monkeypatch.setattr(pipes, "sd3", lambda: base)
    trainer, _ = trained("sd3", model={"train": "full"})
    leave_recipe(trainer, tmp_path / "base")

    def no_model(*args, **kwargs):
        raise AssertionError("the base model was loaded")

    with monkeypatch.context() as patch:
        patch.setattr(SD3Transformer2DModel, "__init__", no_model)
        export_run(SavedRun.open(trainer.output), tmp_path / "out")
    loaded = SD3Transformer2DModel.from_pretrained(tmp_path / "out" / "transformer")
    expected = trainer.pipeline.transformer.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    for key, value in loaded.state_dict().items():
        assert torch.equal(value, expected[key]), key
    origin = json.loads((tmp_path / "out" / "flowdppo.json").read_text())
    assert origin == {"iteration": 1, "weights": "trained", "base": str(tmp_path / "base")}


def test_full_weights_need_their_base(trained, tmp_path):
    trainer, _ = trained("sd3", model={"train": "full"})
    with pytest.raises(ValueError, match=r"has no recipe\.yaml, which `flowdppo train` writes"):
        export_run(SavedRun.open(trainer.output), tmp_path / "out")
    (tmp_path / "base").mkdir()
    leave_recipe(trainer, tmp_path / "base")
    with pytest.raises(ValueError, match=r"has no transformer/.*index\.json, expected it there"):
        export_run(SavedRun.open(trainer.output), tmp_path / "out")


def test_an_export_replaces_an_export_and_nothing_else(pipes, trained, tmp_path):
    base = pipes.sd3()
    base.save_pretrained(tmp_path / "base")
    trainer, _ = trained("sd3", model={"train": "full"})
    leave_recipe(trainer, tmp_path / "base")
    run = SavedRun.open(trainer.output)
    before = (tmp_path / "base" / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes()
    with pytest.raises(ValueError, match=r"has model_index\.json, transformer/config\.json, which no export wrote"):
        export_run(run, tmp_path / "base")
    assert (tmp_path / "base" / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes() == before
    for folder in (trainer.output, trainer.output / "checkpoints" / "export"):
        with pytest.raises(ValueError, match=r"folder: got .*, which the run in .* writes to, expected another"):
            export_run(run, folder)
    export_run(run, tmp_path / "out")
    stale = tmp_path / "out" / "transformer" / "diffusion_pytorch_model-00001-of-00002.safetensors"
    stale.touch()
    export_run(run, tmp_path / "out")
    assert not stale.exists()
    adapter = tmp_path / "mine" / "pytorch_lora_weights.safetensors"
    adapter.parent.mkdir()
    adapter.touch()
    lora, _ = trained("sd3", model=LORA, run={"iterations": 1, "output_dir": str(tmp_path / "lora")})
    with pytest.raises(ValueError, match=r"has pytorch_lora_weights\.safetensors, which no export wrote"):
        export_run(SavedRun.open(lora.output), adapter.parent)


def make_wan() -> WanPipeline:
    def transformer(seed: int) -> WanTransformer3DModel:
        torch.manual_seed(seed)
        return WanTransformer3DModel(
            patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4,
            text_dim=16, freq_dim=16, ffn_dim=24, num_layers=1, cross_attn_norm=True, qk_norm="rms_norm_across_heads",
            rope_max_seq_len=16,
        )  # fmt: skip

    return WanPipeline(
        tokenizer=None, text_encoder=None, vae=None, scheduler=FlowMatchEulerDiscreteScheduler(),
        transformer=transformer(1), transformer_2=transformer(2), boundary_ratio=0.9,
    )  # fmt: skip


@pytest.mark.bits(across="again")
def test_two_transformers_get_a_file_each(small_config, tmp_path):
    config = small_config(model={**LORA, "lora_targets": ["to_q", "to_v"]})
    pipeline = make_wan()
    weights = {}
    for name in ("transformer", "transformer_2"):
        module = getattr(pipeline, name)
        add_lora(module, 4, 3.0, ["to_q", "to_v"], 0)
        for key, parameter in module.named_parameters():
            if "lora" in key:
                parameter.data = torch.randn_like(parameter)
                weights[f"{name}.{key}"] = parameter.data
    folder = tmp_path / "run"
    checkpoint.save_checkpoint(folder / "checkpoints", 1, {"weights": weights}, {"config": config.to_dict()}, 1)
    written = export_run(SavedRun.open(folder), tmp_path / "out")
    assert [str(path.relative_to(tmp_path / "out")) for path in written] == [
        "pytorch_lora_weights.safetensors", "transformer_2/pytorch_lora_weights.safetensors", "flowdppo.json",
    ]  # fmt: skip
    fresh = make_wan()
    fresh.load_lora_weights(tmp_path / "out")
    fresh.load_lora_weights(tmp_path / "out" / "transformer_2", load_into_transformer_2=True)
    arguments = {
        "hidden_states": torch.randn(1, 4, 2, 4, 4),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 3, 16),
        "return_dict": False,
    }
    for name in ("transformer", "transformer_2"):
        outputs = [getattr(pipe, name)(**arguments)[0] for pipe in (pipeline, fresh, make_wan())]
        assert torch.equal(outputs[0], outputs[1])
        assert not torch.equal(outputs[0], outputs[2])


def test_which_checkpoint_is_taken(pipes, small_config, tmp_path):
    config = small_config()
    folder = tmp_path / "run"
    for iteration in (1, 2):
        state = {"config": config.to_dict()}
        checkpoint.save_checkpoint(folder / "checkpoints", iteration, {"weights": {"a": torch.zeros(1)}}, state, 5)
    # half-written ones do not count
    broken = folder / "checkpoints" / "iteration-000003"
    broken.mkdir()
    (broken / "state.json").write_text(json.dumps({"iteration": 3, "files": ["weights"], "config": config.to_dict()}))
    assert SavedRun.open(folder).iteration == 2
    assert SavedRun.open(folder, iteration=1).iteration == 1
    with pytest.raises(ValueError, match="no checkpoint of iteration 3, expected one of 1, 2"):
        SavedRun.open(folder, iteration=3)
    with pytest.raises(ValueError, match="keeps no moving average"):
        SavedRun.open(folder, average=True)
    with pytest.raises(ValueError, match="has no complete checkpoint"):
        SavedRun.open(tmp_path)
