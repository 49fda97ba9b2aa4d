"""What can be wrong with a recipe and be known before weights are loaded: files, packages, the pipeline's configs."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from torch import nn

from ..callables import load_callable, search_working_directory
from ..prompts import REWARD_KEYS
from ..record.sampling import FlowMatchSDEScheduler
from ..settings import require
from ..weights.adapters import as_targets, is_target
from .recipe import PipelineConfig, Recipe

_PACKAGES = {"bitsandbytes_4bit": "bitsandbytes", "bitsandbytes_8bit": "bitsandbytes", "torchao": "torchao"}
# first word of an attention backend's name: what it imports, and what pip calls it
_ATTENTION_PACKAGES = {
    "flash": ("flash_attn", "flash-attn"),
    "sage": ("sageattention", "sageattention"),
    "xformers": ("xformers", "xformers"),
}


_HUB_HINT = (
    " (without a network it has to be a folder or in the Hub's cache; a gated model wants its licence accepted on its "
    "page, and a token in HF_TOKEN or by hf auth login)"
)


@dataclass(frozen=True)
class Component:
    """A component as the configs describe it; ``linear`` counts the entries of weights of linear layers among
    ``parameters``, ``adapted`` those of its LoRA adapters. All three are 0 for what has no weights."""

    name: str
    library: str
    class_name: str
    parameters: int = 0
    linear: int = 0
    adapted: int = 0


@dataclass(frozen=True)
class PipelinePlan:
    """The pipeline of a recipe before its weights are loaded; ``absent`` components were saved as None."""

    kind: type
    components: dict[str, Component]
    absent: tuple[str, ...] = ()


def check_environment(recipe: Recipe, *, devices: bool = True) -> None:
    """Checks files and packages that the recipe names.

    Args:
        devices: also that there is a GPU where one is needed; False for a look at a recipe on another machine.

    Raises:
        ValueError: everything that is missing, a line each.
    """
    problems = [*_missing_packages(recipe), *_file_problems(recipe)]
    quantization = recipe.pipeline.quantization
    if devices and quantization is not None and quantization.backend != "torchao" and not torch.cuda.is_available():
        problems.append(f"pipeline.quantization.backend: {quantization.backend!r} needs a GPU, and torch sees none")
    if problems:
        raise ValueError("\n".join(problems))


def inspect_pipeline(recipe: Recipe) -> PipelinePlan:
    """Reads the pipeline's configs, not its weights, and checks the recipe against them.

    Raises:
        ValueError: no such pipeline, or a setting, prompt or component that does not fit it.
    """
    settings = recipe.pipeline
    index = _load_index(settings)
    _refuse_code(settings, index)
    kind = _pipeline_class(settings, index)
    listed = {name: tuple(e) for name, e in index.items() if isinstance(e, (list, tuple)) and len(e) == 2}
    absent = tuple(name for name, (library, _) in listed.items() if library is None)
    entries = {name: entry for name, entry in listed.items() if name not in (*absent, *settings.without)}
    for name, names in (
        ("pipeline.without", settings.without),
        ("pipeline.quantization.components", settings.quantization.components if settings.quantization else ()),
    ):
        unknown = [entry for entry in names if entry not in listed]
        require(not unknown, name, unknown, f"components of {kind.__name__}: {', '.join(sorted(entries))}")
    trained = [name for name in entries if name.startswith("transformer")]
    require(bool(trained), "pipeline.pretrained", settings.pretrained, "a pipeline with a transformer to train")
    if settings.vae_tiling or settings.vae_slicing:
        require("vae" in entries, "pipeline.vae_tiling", True, f"False: {kind.__name__} has no VAE")
    _check_scheduler(settings, entries)
    _check_call(recipe, kind)
    targets = recipe.config.model.lora_targets
    components = {
        name: _measure(settings, name, library, class_name, targets, recipe.config.model.rank)
        for name, (library, class_name) in entries.items()
    }
    if recipe.config.model.train == "lora":
        empty = [name for name in trained if not components[name].adapted]
        require(
            not empty, "model.lora_targets", as_targets(targets), f"names of linear layers; {empty} have none of them"
        )
    return PipelinePlan(kind, components, absent)


def _missing_packages(recipe: Recipe) -> list[str]:
    wanted: list[tuple[str, str, str]] = []
    quantization, backend = recipe.pipeline.quantization, recipe.pipeline.attention_backend
    if quantization is not None:
        package = _PACKAGES[quantization.backend]
        wanted.append((f"pipeline.quantization.backend={quantization.backend}", package, package))
    # packages and trackers have the same names
    wanted += [(f"run.trackers={tracker}", tracker, tracker) for tracker in recipe.config.run.trackers]
    # what comes from the hub is refused as a whole
    fetched = backend is not None and backend.endswith("_hub")
    if backend is not None and not fetched and backend.lstrip("_").split("_")[0] in _ATTENTION_PACKAGES:
        module, package = _ATTENTION_PACKAGES[backend.lstrip("_").split("_")[0]]
        wanted.append((f"pipeline.attention_backend={backend}", module, package))
    return [
        f"{setting} needs {package}, which is not installed: pip install {package}"
        for setting, module, package in wanted
        if importlib.util.find_spec(module) is None
    ]


def _file_problems(recipe: Recipe) -> list[str]:
    problems = []
    for tracker in recipe.config.run.trackers:
        if tracker not in LOGGER_TYPE_TO_CLASS:
            problems.append(f"run.trackers: got {tracker!r}, expected some of {', '.join(LOGGER_TYPE_TO_CLASS)}")
    for name, path in recipe.prompt_files().items():
        if not path.is_file():
            problems.append(f"{name}: {path} does not exist, expected a .txt or .jsonl file with prompts")
    settings = recipe.pipeline
    folder = Path(settings.pretrained).expanduser()
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            problems.append(f"pipeline.pretrained: {folder} has no model_index.json, expected a diffusers pipeline")
    elif not settings.could_be_hub_name:
        problems.append(f"pipeline.pretrained: {folder} does not exist, expected a folder or a name on the Hub")
    if settings.attention_backend is not None:
        problems += _attention_problems(settings.attention_backend)
    return problems


def _attention_problems(name: str) -> list[str]:
    from diffusers.models.attention_dispatch import AttentionBackendName

    known = [backend.value for backend in AttentionBackendName]
    if name not in known:
        return [f"pipeline.attention_backend: got {name!r}, expected one of {', '.join(known)}"]
    if name.endswith("_hub"):
        return [f"pipeline.attention_backend: got {name!r}, expected one whose code is not fetched from the Hub"]
    return []


def _load_index(settings: PipelineConfig) -> dict[str, Any]:
    from diffusers import DiffusionPipeline

    try:
        return DiffusionPipeline.load_config(settings.location, **settings.source_options)
    except OSError as error:
        hint = "" if settings.is_local else _HUB_HINT
        raise ValueError(f"pipeline.pretrained: cannot read {settings.pretrained}{hint}: {_one_line(error)}") from error


def _refuse_code(settings: PipelineConfig, index: dict[str, Any]) -> None:
    """Some versions of diffusers run modules that lie in a local model's folder, named by its ``model_index.json``."""
    folder, own = Path(settings.location), index.get("_class_name")
    files = [f"{own[0]}.py"] if isinstance(own, (list, tuple)) and own else []
    entries = {name: e[0] for name, e in index.items() if isinstance(e, (list, tuple)) and e and name != "_class_name"}
    files += [f"{name}/{module}.py" for name, module in entries.items()]
    found = [file for file in files if (folder / file).is_file()]
    expected = "weights and configs alone; code of your own is named by pipeline.callable"
    require(not found, "pipeline.pretrained", found, expected)


def _pipeline_class(settings: PipelineConfig, index: dict[str, Any]) -> type:
    import diffusers

    if settings.callable is not None:
        name, where = settings.callable, "pipeline.callable"
        search_working_directory()
        kind: Any = load_callable(name, where)
    else:
        name, where = settings.class_name or str(index.get("_class_name")), "pipeline.class_name"
        kind = getattr(diffusers, name, None)
    expected = "a pipeline class of diffusers; pipeline.callable=package.module:Class names one of your own"
    require(inspect.isclass(kind) and issubclass(kind, diffusers.DiffusionPipeline), where, name, expected)
    return kind


def _check_scheduler(settings: PipelineConfig, entries: Mapping[str, tuple]) -> None:
    """The recorder takes its place, which it can only of some."""
    kind = class_of(*entries["scheduler"]) if "scheduler" in entries else None
    if kind is None:
        return
    own = kind.from_pretrained(settings.location, subfolder="scheduler", **settings.source_options)
    try:
        FlowMatchSDEScheduler.from_config(own)
    except ValueError as error:
        raise ValueError(f"pipeline.pretrained: the scheduler of {settings.pretrained}: {error}") from None


def _check_call(recipe: Recipe, kind: type) -> None:
    known = inspect.signature(kind.__call__).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values()):
        return
    given = {
        name: f"{section}.pipeline_kwargs.{name}"
        for section, options in (
            ("sampling", recipe.config.sampling.pipeline_kwargs),
            ("evaluation", recipe.config.evaluation.pipeline_kwargs),
        )
        for name in options
    }
    train, evaluation = recipe.load_prompts()
    for source, prompts in (("prompts.train", train), ("prompts.eval", evaluation or [])):
        keys: Iterable[str] = ["prompt"] if prompts and isinstance(prompts[0], str) else prompts[0] if prompts else []
        given |= {name: f"{source}: {name}" for name in keys if name not in REWARD_KEYS}
    for name, setting in given.items():
        require(name in known, setting, name, f"an argument of {kind.__name__}'s call: {', '.join(known)}")


def _measure(
    settings: PipelineConfig, name: str, library: str, class_name: str, targets: Sequence[str] | str | None, rank: int
) -> Component:
    kind = class_of(library, class_name)
    if not (inspect.isclass(kind) and issubclass(kind, nn.Module)):
        return Component(name, library, class_name)
    module = on_meta(kind, settings, name)
    linear = adapted = 0
    for path, layer in module.named_modules():
        if isinstance(layer, nn.Linear):
            linear += layer.weight.numel()
            if is_target(path, targets):
                adapted += rank * (layer.in_features + layer.out_features)
    parameters = sum(parameter.numel() for parameter in module.parameters())
    return Component(name, library, class_name, parameters, linear, adapted)


_LIBRARIES = ("diffusers", "transformers")


def class_of(library: str, class_name: str) -> Any:
    """The class of a component, None where it is of another library: an index may name any."""
    return getattr(importlib.import_module(library), class_name, None) if library in _LIBRARIES else None


def on_meta(kind: Any, settings: PipelineConfig, name: str) -> nn.Module:
    """The component ``name`` of ``kind`` without memory for its weights."""
    try:
        if hasattr(kind, "load_config"):
            config = kind.load_config(settings.location, subfolder=name, **settings.source_options)
            with torch.device("meta"):
                return kind.from_config(config)
        config = kind.config_class.from_pretrained(settings.location, subfolder=name, **settings.source_options)
        with torch.device("meta"):
            return kind(config)
    except OSError as error:
        raise ValueError(
            f"pipeline.pretrained: cannot read the config of {name} in {settings.pretrained}: {_one_line(error)}"
        ) from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
