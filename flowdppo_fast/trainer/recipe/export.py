"""Trained weights of a run folder: into a pipeline, or into files that diffusers loads."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from .. import checkpoint
from ..config import FlowDPPOConfig
from ..run_folder import CHECKPOINTS, RECIPE_FILE, check_elsewhere
from ..weights.adapters import LORA_FILE, add_lora, as_targets, release, save_lora_file, with_name, write_lora
from ..weights.layouts import kohya
from ..weights.names import bare, plain_name
from ..weights.precision import autocast, computes_in
from .recipe import PipelineConfig, Recipe

ORIGIN_FILE = "flowdppo.json"
LAYOUTS = ("diffusers", "kohya")
_WEIGHTS_FILE = "diffusion_pytorch_model"


@dataclass(frozen=True)
class SavedRun:
    """A checkpoint of a run folder.

    Attributes:
        folder: of the run.
        checkpoint: folder of the checkpoint.
        iteration: finished iterations.
        config: settings of the run.
        kind: ``"ema"`` or ``"weights"``, which of the checkpoint's weights are meant.
        classes: of the transformers, by name; empty where an older version wrote the checkpoint.
    """

    folder: Path
    checkpoint: Path
    iteration: int
    config: FlowDPPOConfig
    kind: str
    classes: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: str | Path, *, iteration: int | None = None, average: bool | None = None) -> SavedRun:
        """The newest complete checkpoint of a run.

        Args:
            folder: of the run.
            iteration: take the checkpoint of that iteration instead.
            average: the moving average of the weights (True), the weights themselves (False), or the average if there
                is one (None).

        Raises:
            ValueError: no such run or checkpoint, or an average is wanted and there is none.
        """
        folder = Path(folder).expanduser()
        found = checkpoint.checkpoints(folder / CHECKPOINTS)
        if not found:
            raise ValueError(f"run: {folder} has no complete checkpoint, expected the output folder of a training run")
        states = {path: json.loads((path / "state.json").read_text()) for path in found}
        chosen = [path for path in found if iteration in (None, states[path]["iteration"])]
        if not chosen:
            there = ", ".join(str(state["iteration"]) for state in states.values())
            raise ValueError(f"iteration: {folder} has no checkpoint of iteration {iteration}, expected one of {there}")
        state = states[chosen[-1]]
        has_average = "ema" in state["files"]
        if average and not has_average:
            raise ValueError(f"average: {folder} keeps no moving average, expected a run with model.ema_decay")
        kind = "ema" if (has_average if average is None else average) else "weights"
        config = FlowDPPOConfig.from_dict(state["config"])
        return cls(folder, chosen[-1], state["iteration"], config, kind, state.get("classes", {}))

    @property
    def recipe_file(self) -> Path:
        return self.folder / RECIPE_FILE

    def recipe(self) -> Recipe:
        """The recipe that ``flowdppo train`` left in the folder.

        Raises:
            ValueError: there is none, the run was started from Python.
        """
        if not self.recipe_file.is_file():
            raise ValueError(
                f"run: {self.folder} has no {RECIPE_FILE}, which `flowdppo train` writes and which names its pipeline; "
                "of a run that was started from Python only LoRA adapters can be exported"
            )
        return Recipe.from_yaml(self.recipe_file)

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Trained weights on the CPU, by transformer and then by the name of the parameter."""
        named: dict[str, dict[str, Tensor]] = {}
        for name, value in load_file(self.checkpoint / f"{self.kind}.safetensors").items():
            module, _, parameter = name.partition(".")
            named.setdefault(module, {})[parameter] = value
        return named


def apply_weights(run: SavedRun, pipeline: Any) -> None:
    """Puts the trained weights of ``run`` into the transformer(s) of its pipeline.

    LoRA adapters are added in float32 as the trainer keeps them, full weights are cast to what the module has.

    Raises:
        ValueError: the pipeline is not the one that was trained: a module or parameter is missing or has another shape.
    """
    for name, tensors in run.tensors().items():
        module = pipeline.components.get(name)
        if not isinstance(module, nn.Module):
            raise ValueError(
                f"pipeline: {type(pipeline).__name__} has no {name}, which the run in {run.folder} trained"
            )
        module = bare(module)
        if run.config.model.train == "lora":
            model = run.config.model
            adapter = add_lora(module, model.rank, model.alpha, model.lora_targets, 0)
            # it is the pipeline's from now on, to be drawn with or trained further
            release(module)
            # the pipeline may have adapters of its own, then and now
            tensors = {with_name(key, adapter): value for key, value in tensors.items()}
        parameters = {plain_name(key): parameter for key, parameter in module.named_parameters()}
        for key, value in tensors.items():
            if key not in parameters or parameters[key].shape != value.shape:
                there = list(parameters[key].shape) if key in parameters else "no such parameter"
                raise ValueError(f"pipeline: {name}.{key} is {list(value.shape)} in {run.folder}, here it is {there}")
            parameter = parameters[key]
            dtype = value.dtype if run.config.model.train == "lora" else parameter.dtype
            parameter.data = value.to(device=parameter.device, dtype=dtype)


def drawing(run: SavedRun, pipeline: Any, device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Within this context a pipeline with the run's weights computes as in the run's own rollouts."""
    model, modules = run.config.model, [pipeline.components[name] for name in run.classes]
    half = model.autocast_dtype
    own = model.train == "lora" and computes_in(modules, half)
    for key, parameter in (pair for module in modules for pair in module.named_parameters()):
        if own and ".lora_" in key:
            parameter.data = parameter.data.to(half)
    return autocast(device.type, half, modules, own=own)


def export_run(
    run: SavedRun,
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    fold_alpha: bool = False,
    layout: str = "diffusers",
) -> list[Path]:
    """Writes the trained weights as diffusers loads them, without loading the base model.

    LoRA: ``pytorch_lora_weights.safetensors`` for ``pipeline.load_lora_weights(folder)``, and for a further transformer
    the same in a folder with its name. Full weights: a folder per transformer for its class's ``from_pretrained``;
    buffers, which are not trained, are copied from the base's files.

    Args:
        run: what to export.
        folder: made if absent.
        dtype: of the written weights; None keeps float32.
        fold_alpha: multiply LoRA weights by ``alpha / rank`` and say alpha = rank, for programs that do not read the
            alpha that diffusers keeps in the file's metadata.
        layout: of LoRA files: ``"diffusers"``, or ``"kohya"``, the published checkpoint's names of layers with an alpha
            each (:mod:`..weights.layouts`).

    Returns:
        The files that were written.

    Raises:
        ValueError: full weights of a run without recipe, or whose base cannot be read; a layout that does not fit.
    """
    _check_layout(layout, run, fold_alpha)
    folder = Path(folder).expanduser()
    check_elsewhere(folder, "folder")
    named = run.tensors()
    _check_folder(folder, named if run.config.model.train == "full" else ())
    written = []
    for name, tensors in named.items():
        if run.config.model.train == "lora":
            target = folder if name == "transformer" else folder / name
            written.append(_export_lora(run, tensors, target, dtype, fold_alpha, layout, run.classes.get(name)))
        else:
            written += _export_full(run, tensors, name, folder / name, dtype)
    origin = {
        "iteration": run.iteration,
        "weights": "moving average" if run.kind == "ema" else "trained",
        "base": run.recipe().pipeline.pretrained if run.recipe_file.is_file() else None,
    }
    (folder / ORIGIN_FILE).write_text(json.dumps(origin, indent=2) + "\n")
    return [*written, folder / ORIGIN_FILE]


def _check_folder(folder: Path, components: Iterable[str]) -> None:
    """An export is replaced by another one, a model or adapter from elsewhere by none."""
    files = (folder / LORA_FILE, folder / "model_index.json", *(folder / name / "config.json" for name in components))
    there = [str(path.relative_to(folder)) for path in files if path.exists()]
    if there and not (folder / ORIGIN_FILE).exists():
        raise ValueError(
            f"folder: {folder} has {', '.join(there)}, which no export wrote, expected another folder or an export's"
        )


def _check_layout(layout: str, run: SavedRun, fold_alpha: bool) -> None:
    if layout not in LAYOUTS:
        raise ValueError(f"layout: got {layout!r}, expected one of {', '.join(LAYOUTS)}")
    if layout == "kohya" and run.config.model.train != "lora":
        raise ValueError(f"layout: got 'kohya' for full weights in {run.folder}, expected a run with model.train=lora")
    if layout == "kohya" and fold_alpha:
        raise ValueError("fold_alpha: got True with layout 'kohya', whose files have an alpha per layer; leave it out")


def _export_lora(
    run: SavedRun,
    tensors: Mapping[str, Tensor],
    folder: Path,
    dtype: torch.dtype | None,
    fold_alpha: bool,
    layout: str,
    kind: str | None,
) -> Path:
    from peft import LoraConfig

    model = run.config.model
    if layout == "kohya":
        plain = {with_name(key, ""): value.to(dtype or value.dtype) for key, value in tensors.items()}
        return save_lora_file(kohya(plain, model.alpha, kind), folder)
    targets = as_targets(model.lora_targets)
    if isinstance(targets, str):
        # loaders want names
        targets = sorted({key.partition(".lora_")[0] for key in tensors})
    settings = LoraConfig(r=model.rank, lora_alpha=model.alpha, target_modules=targets)  # type: ignore[arg-type]
    return write_lora(tensors, settings, folder, dtype=dtype, fold_alpha=fold_alpha)


def _export_full(
    run: SavedRun, tensors: Mapping[str, Tensor], name: str, folder: Path, dtype: torch.dtype | None
) -> list[Path]:
    from huggingface_hub import save_torch_state_dict

    base = run.recipe().pipeline
    state = {**_base_tensors(base, name, without=tensors), **tensors}
    folder.mkdir(parents=True, exist_ok=True)
    # of an earlier export, which may have had more of them
    for old in folder.glob(f"{_WEIGHTS_FILE}*"):
        old.unlink()
    shutil.copyfile(_base_file(base, name, "config.json"), folder / "config.json")
    width = dtype or torch.float32
    save_torch_state_dict(
        {key: value.to(width) if value.is_floating_point() else value for key, value in state.items()},
        folder,
        filename_pattern=_WEIGHTS_FILE + "{suffix}.safetensors",
        max_shard_size="10GB",
    )
    return sorted(folder.iterdir())


def _base_tensors(base: PipelineConfig, name: str, without: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the base's files hold of a component besides ``without``: buffers."""
    variant = f".{base.variant}" if base.variant else ""
    files = {_base_file(base, name, f"{_WEIGHTS_FILE}{variant}.safetensors", required=False)}
    if files == {None}:
        index = _base_file(base, name, f"{_WEIGHTS_FILE}.safetensors.index{variant}.json")
        shards = json.loads(index.read_text())["weight_map"]
        # only shards with something that is not trained are fetched
        wanted = {shard for key, shard in shards.items() if key not in without}
        files = {_base_file(base, name, shard) for shard in wanted}
    found: dict[str, Tensor] = {}
    for path in files:
        with safe_open(path, "pt") as stored:
            found |= {key: stored.get_tensor(key) for key in stored.keys() if key not in without}  # noqa: SIM118
    return found


def _base_file(base: PipelineConfig, component: str, filename: str, *, required: bool = True) -> Any:
    if base.is_local:
        path = Path(base.location) / component / filename
        if path.is_file():
            return path
    else:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError

        with contextlib.suppress(EntryNotFoundError):
            return Path(
                hf_hub_download(
                    base.pretrained,
                    filename,
                    subfolder=component,
                    revision=base.revision,
                    local_files_only=base.local_files_only,
                )
            )
    if required:
        raise ValueError(f"pipeline.pretrained: {base.pretrained} has no {component}/{filename}, expected it there")
    return None
