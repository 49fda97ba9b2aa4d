"""Recipes: files, overrides, what is refused, and what is known of a pipeline before its weights are loaded."""

from __future__ import annotations

import copy
import importlib.metadata
import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from digits_example import EXAMPLE
from PIL import Image

from flowdppo_fast.trainer.callables import load_callable, search_working_directory
from flowdppo_fast.trainer.recipe import QuantizationConfig, Recipe
from flowdppo_fast.trainer.recipe.loading import load_pipeline, quantization_mapping
from flowdppo_fast.trainer.recipe.preflight import check_environment, inspect_pipeline
from flowdppo_fast.trainer.recipe.recipe import load_prompts

MINIMAL = {
    "pipeline": {"pretrained": "owner/name"},
    "prompts": {"train": ["a cat", "a dog"]},
    "rewards": [{"name": "jpeg"}],
    "model": {"mixed_precision": "bf16"},
}


def recipe_of(**sections) -> Recipe:
    values = copy.deepcopy(MINIMAL)
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section} if isinstance(section, dict) else section
    return Recipe.from_dict(values)


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


@pytest.fixture
def sd3_folder(pipes, tmp_path) -> Path:
    """A tiny StableDiffusion3 pipeline on the disk, without text encoders."""
    pipes.sd3().save_pretrained(tmp_path / "sd3")
    return tmp_path / "sd3"


def test_yaml_with_overrides_at_any_depth(tmp_path):
    path = write(
        tmp_path,
        "pipeline: {pretrained: owner/name, quantization: {components: [transformer]}}\n"
        "prompts: {train: [a cat]}\nrewards:\n- {name: jpeg, weight: 2}\n"
        "sampling:\n  pipeline_kwargs: {height: 512}\n",
    )
    overrides = [
        "sampling.pipeline_kwargs.width=256",
        "pipeline.quantization.backend=torchao",
        "pipeline.quantization.options.type=Int8WeightOnlyConfig",
        "optimizer.learning_rate=1e-5",
        "rewards=[{name: clip}, {callable: 'my.rewards:nice', weight: 0.5}]",
        "prompts.train=[a dog, {prompt: a bird}]",
    ]
    recipe = Recipe.from_yaml(path, overrides)
    assert recipe.config.sampling.pipeline_kwargs == {"height": 512, "width": 256}
    assert recipe.pipeline.quantization.backend == "torchao"
    assert recipe.pipeline.quantization.components == ("transformer",)
    assert recipe.config.optimizer.learning_rate == 1e-5
    assert recipe.rewards == ({"name": "clip"}, {"callable": "my.rewards:nice", "weight": 0.5})
    assert recipe.load_prompts() == (["a dog", {"prompt": "a bird"}], None)


def test_round_trip_and_full_names(tmp_path, sd3_folder, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("a cat\n")
    recipe = recipe_of(
        pipeline={"pretrained": "sd3", "quantization": {"options": {"bnb_4bit_quant_type": "nf4"}}},
        prompts={"train": "prompts.txt"},
    )
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    recipe.save("saved.yaml")
    monkeypatch.chdir("/")
    saved = Recipe.from_yaml(tmp_path / "saved.yaml")
    assert saved.pipeline.location == str(sd3_folder)
    assert saved.load_prompts() == (["a cat"], None)
    assert saved.config == recipe.config
    assert saved.pipeline.quantization == recipe.pipeline.quantization


REFUSED = [
    ({"pipelines": {}}, ValueError, "section: got unknown 'pipelines'"),
    ({"pipeline": {"pretraned": "x"}}, ValueError, "pipeline: got unknown 'pretraned'"),
    ({"sampling": {"step": 3}}, ValueError, "sampling: got unknown 'step'"),
    ({"prompts": {"test": "x.txt"}}, ValueError, "prompts: got unknown 'test'"),
    ({"pipeline": {"pretrained": ""}}, ValueError, "pipeline.pretrained: got ''"),
    ({"pipeline": {"dtype": "float8"}}, ValueError, "pipeline.dtype: got 'float8'"),
    (
        {"pipeline": {"class_name": "os.system"}},
        ValueError,
        "class_name: got 'os.system', expected the name of a class",
    ),
    ({"pipeline": {"class_name": "A", "callable": "b:C"}}, ValueError, "class_name: got 'A', expected none beside"),
    ({"pipeline": {"callable": "print"}}, ValueError, "pipeline.callable: got 'print', expected package.module:attr"),
    ({"pipeline": {"quantization": {"bits": 4}}}, ValueError, "pipeline.quantization: got unknown 'bits'"),
    ({"pipeline": {"quantization": {"backend": "gguf"}}}, ValueError, "quantization.backend: got 'gguf'"),
    ({"pipeline": {"quantization": {"components": []}}}, ValueError, "quantization.components: got \\(\\)"),
    ({"pipeline": {"quantization": {"backend": "torchao"}}}, ValueError, "options.type: got None, expected the name"),
    (
        {"pipeline": {"quantization": {"backend": "torchao"}, "dtype": "float32"}},
        ValueError,
        "pipeline.dtype: got 'float32', expected 'bfloat16' with torchao",
    ),
    (
        {"pipeline": {"quantization": {"options": {"load_in_4bit": True}}}},
        ValueError,
        "options: got \\['load_in_4bit'\\]",
    ),
    (
        {"pipeline": {"quantization": {}}, "model": {"train": "full"}},
        ValueError,
        "quantization: got 'bitsandbytes_4bit', expected none with model.train='full'",
    ),
    ({"pipeline": {"quantization": {}}, "run": {"device": "cpu"}}, ValueError, "bitsandbytes needs a GPU"),
    (
        {"pipeline": {"quantization": {"components": ["vae"]}, "without": ["vae"]}},
        ValueError,
        "no component that pipeline.without leaves out",
    ),
    ({"pipeline": {"dtype": "float16"}}, ValueError, "dtype: got 'float16', expected another one with model.mixed"),
    (
        {"model": {"train": "full", "mixed_precision": "no"}},
        ValueError,
        "dtype: got 'bfloat16', expected 'float32' with",
    ),
    ({"prompts": {"train": None}}, ValueError, "prompts.train: got None"),
    ({"prompts": {"train": 3}}, TypeError, "prompts.train: got 3"),
    ({"prompts": {"train": []}}, ValueError, "prompts.train: got no prompts"),
    ({"prompts": {"train": ["a", {"image": 1}]}}, ValueError, "prompts.train\\[1\\]: got the keys \\['image'\\]"),
    ({"prompts": {"eval": ["a"]}}, ValueError, "prompts.eval: got \\['a'\\], expected none without evaluation.every"),
    ({"evaluation": {"every": 5}}, ValueError, "evaluation.every: got 5, expected none without prompts.eval"),
    ({"rewards": []}, ValueError, "rewards: got \\[\\], expected at least one"),
    ({"rewards": {"name": "jpeg"}}, TypeError, "rewards: got .* expected a list of mappings"),
    ({"rewards": [{"weight": 1}]}, ValueError, "rewards\\[0\\]: got .* expected name"),
    ({"rewards": [{"callable": "os.system('x')"}]}, ValueError, "rewards\\[0\\].callable: got"),
    (
        {"rewards": [{"name": "jpeg", "weight": 2}], "advantage": {"reward_weights": {"jpeg": 1}}},
        ValueError,
        "rewards\\[0\\].weight: got 2, expected none beside advantage.reward_weights",
    ),
]


@pytest.mark.parametrize(("sections", "error", "message"), REFUSED, ids=[message for *_, message in REFUSED])
def test_refused_recipes(sections, error, message):
    recipe_of()
    values = {**copy.deepcopy(MINIMAL)}
    for name, section in sections.items():
        values[name] = (
            {**values.get(name, {}), **section} if isinstance(section, dict) and name != "rewards" else section
        )
    with pytest.raises(error, match=message):
        Recipe.from_dict(values)


def test_rewards_are_overridden_as_a_whole(tmp_path):
    with pytest.raises(ValueError, match="rewards has no keys"):
        Recipe.from_yaml(write(tmp_path, json.dumps(MINIMAL)), ["rewards.weight=1"])


def test_a_section_in_a_section_is_checked_when_it_is_built_by_hand():
    recipe = recipe_of()
    recipe.pipeline.quantization = QuantizationConfig(backend="gguf")
    with pytest.raises(ValueError, match=r"pipeline\.quantization\.backend: got 'gguf', expected one of"):
        recipe.validate()


def test_prompt_files(tmp_path):
    texts = tmp_path / "prompts.txt"
    texts.write_text("a cat\n\n  un café  \n", encoding="utf-8")
    assert load_prompts(str(texts), "prompts.train") == ["a cat", "un café"]
    Image.new("L", (3, 2), 200).save(tmp_path / "in.png")
    lines = tmp_path / "prompts.jsonl"
    entry = {"prompt": "a cat", "metadata": {"count": 2}, "image": {"file": str(tmp_path / "in.png")}}
    lines.write_text(json.dumps(entry) + "\n\n")
    (loaded,) = load_prompts(str(lines), "prompts.train")
    assert loaded["metadata"] == {"count": 2}
    assert loaded["image"].mode == "RGB"
    assert loaded["image"].size == (3, 2)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "a", "expected a .txt file, a .jsonl file"),
        ("a.txt", " \n", "got no prompts"),
        ("a.jsonl", '"a"\n{"prompt":\n', "a.jsonl, line 2: not JSON"),
        ("a.jsonl", '"a"\n3\n', "a.jsonl, line 2: got 3, expected a text or an object"),
        ("a.jsonl", '"a"\n\n{"text": "b"}\n', "a.jsonl, line 3: got the keys"),
        ("a.jsonl", '{"image": {"file": "absent.png"}}', "line 1: absent.png does not exist"),
    ],
)
def test_refused_prompt_files(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises((ValueError, TypeError), match=message):
        load_prompts(str(tmp_path / name), "prompts.train")


def test_callables_are_found_in_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.path", [entry for entry in sys.path if entry])
    (tmp_path / "my_own_rewards.py").write_text("class Own:\n    def nice():\n        return 7\n")
    monkeypatch.chdir(tmp_path)
    search_working_directory()
    assert load_callable("my_own_rewards:Own.nice", "where")() == 7
    with pytest.raises(ValueError, match="where: got 'my_own_rewards:other', which cannot be imported"):
        load_callable("my_own_rewards:other", "where")


def test_everything_that_is_missing_is_named_at_once(monkeypatch, tmp_path):
    find = importlib.util.find_spec
    absent = ("bitsandbytes", "flash_attn")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in absent else find(name, *rest))
    recipe = recipe_of(
        pipeline={
            "pretrained": "./nowhere",
            "quantization": {"backend": "bitsandbytes_8bit"},
            "attention_backend": "flash",
        },
        prompts={"train": str(tmp_path / "absent.txt")},
    )
    with pytest.raises(ValueError, match="pip install bitsandbytes") as caught:
        check_environment(recipe, devices=False)
    lines = str(caught.value).splitlines()
    assert [line.split(":")[0].split("=")[0] for line in lines] == [
        "pipeline.quantization.backend", "pipeline.attention_backend", "prompts.train", "pipeline.pretrained",
    ]  # fmt: skip
    assert "pip install flash-attn" in lines[1]


@pytest.mark.parametrize(
    ("name", "message"),
    [("fast", "expected one of .*native"), ("flash_hub", "expected one whose code is not fetched from the Hub")],
)
def test_refused_attention_backends(name, message):
    with pytest.raises(ValueError, match=f"attention_backend: got '{name}', {message}"):
        check_environment(recipe_of(pipeline={"attention_backend": name}))


def test_a_folder_that_is_no_pipeline(tmp_path):
    with pytest.raises(ValueError, match="has no model_index"):
        check_environment(recipe_of(pipeline={"pretrained": str(tmp_path)}))


def test_bitsandbytes_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: object())
    recipe = recipe_of(pipeline={"quantization": {}})
    check_environment(recipe, devices=False)
    with pytest.raises(ValueError, match="'bitsandbytes_4bit' needs a GPU"):
        check_environment(recipe)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"sampling": {"pipeline_kwargs": {"cfg": 4}}},
            "sampling.pipeline_kwargs.cfg: got 'cfg', expected an argument of",
        ),
        ({"prompts": {"train": [{"prompts": "a"}]}}, "prompts.train: prompts: got 'prompts', expected an argument"),
        ({"pipeline": {"without": ["text_encoder_4"]}}, "pipeline.without: got \\['text_encoder_4'\\], expected comp"),
        ({"pipeline": {"without": ["transformer"]}}, "expected a pipeline with a transformer to train"),
        ({"pipeline": {"quantization": {"components": ["unet"]}}}, "quantization.components: got \\['unet'\\]"),
        ({"pipeline": {"class_name": "SD9Pipeline"}}, "pipeline.class_name: got 'SD9Pipeline', expected a pipeline"),
        (
            {"pipeline": {"class_name": "AutoencoderKL"}},
            "pipeline.class_name: got 'AutoencoderKL', expected a pipeline",
        ),
        ({"pipeline": {"callable": "json:loads"}}, "pipeline.callable: got 'json:loads', expected a pipeline class"),
        ({"pipeline": {"vae_tiling": True, "without": ["vae"]}}, "pipeline.vae_tiling: got True"),
        ({"model": {"lora_targets": ["to_x"]}}, "model.lora_targets: got \\['to_x'\\]"),
    ],
)
def test_what_does_not_fit_the_pipeline(sd3_folder, sections, message):
    pipeline = {"pretrained": str(sd3_folder), **sections.pop("pipeline", {})}
    with pytest.raises(ValueError, match=message):
        inspect_pipeline(recipe_of(pipeline=pipeline, **sections))


def test_a_pipeline_that_cannot_be_read(sd3_folder):
    (sd3_folder / "transformer" / "config.json").unlink()
    with pytest.raises(ValueError, match="cannot read the config of transformer in"):
        inspect_pipeline(recipe_of(pipeline={"pretrained": str(sd3_folder)}))


def test_loading(sd3_folder, monkeypatch):
    recipe = recipe_of(
        pipeline={
            "pretrained": str(sd3_folder), "vae_dtype": "float32", "vae_tiling": True, "vae_slicing": True,
            "attention_backend": "_native_math",
        }
    )  # fmt: skip
    chosen = []
    plan = inspect_pipeline(recipe)
    from diffusers import SD3Transformer2DModel

    monkeypatch.setattr(SD3Transformer2DModel, "set_attention_backend", lambda self, name: chosen.append(name))
    pipeline = load_pipeline(recipe, plan)
    assert pipeline.transformer.dtype == torch.bfloat16
    assert pipeline.vae.dtype == torch.float32
    assert pipeline.vae.use_tiling
    assert pipeline.vae.use_slicing
    assert chosen == ["_native_math"]
    without = recipe_of(pipeline={"pretrained": str(sd3_folder), "without": ["vae"]})
    assert load_pipeline(without, inspect_pipeline(without)).vae is None


def test_weights_that_are_pickled_are_refused(sd3_folder):
    recipe = recipe_of(pipeline={"pretrained": str(sd3_folder)})
    (weights,) = (sd3_folder / "transformer").glob("*.safetensors")
    weights.unlink()
    torch.save({}, weights.with_suffix(".bin"))
    with pytest.raises((OSError, ValueError), match="safetensors"):
        load_pipeline(recipe, inspect_pipeline(recipe))


def test_quantised_components_get_the_config_of_their_library(monkeypatch):
    version = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: "0.49.0" if name == "bitsandbytes" else version(name)
    )
    options = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "bfloat16"}
    recipe = recipe_of(pipeline={"quantization": {"components": ["transformer", "text_encoder_2"], "options": options}})
    plan = SimpleNamespace(
        components={
            "transformer": SimpleNamespace(library="diffusers"),
            "text_encoder_2": SimpleNamespace(library="transformers"),
        }
    )
    mapping = quantization_mapping(recipe.pipeline.quantization, plan)
    assert {name: type(config).__module__.split(".")[0] for name, config in mapping.items()} == {
        "transformer": "diffusers",
        "text_encoder_2": "transformers",
    }
    for config in mapping.values():
        assert config.load_in_4bit
        assert config.bnb_4bit_quant_type == "nf4"
        assert config.bnb_4bit_compute_dtype == torch.bfloat16
    recipe.pipeline.quantization.options["bnb_4bit_type"] = "nf4"
    with pytest.raises(ValueError, match=r"options: got unknown \['bnb_4bit_type'\], expected some of .*quant_type"):
        quantization_mapping(recipe.pipeline.quantization, plan)


def test_the_quantisation_reaches_from_pretrained(sd3_folder, monkeypatch):
    """The packages are not needed to see what diffusers is given."""
    recipe = recipe_of(pipeline={"pretrained": str(sd3_folder), "quantization": {}})
    plan = inspect_pipeline(recipe)
    given = {}
    monkeypatch.setattr(plan.kind, "from_pretrained", classmethod(lambda cls, *args, **kwargs: given.update(kwargs)))
    version = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: "0.49.0" if name == "bitsandbytes" else version(name)
    )
    load_pipeline(recipe, plan)
    assert list(given["quantization_config"].quant_mapping) == ["transformer"]
    assert given["use_safetensors"] is True
    assert given["torch_dtype"] is torch.bfloat16


def test_digits_example_is_readable_as_a_recipe():
    recipe = recipe_of(
        pipeline={"pretrained": str(EXAMPLE / "checkpoint"), "callable": "pipeline:DigitsPipeline", "dtype": "float32"}
    )
    assert inspect_pipeline(recipe).components["transformer"].class_name == "SD3Transformer2DModel"
