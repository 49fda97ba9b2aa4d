"""Recipes: one YAML file with the pipeline, its prompts and rewards, and the settings of the trainer.

Reading a recipe runs no code: YAML is read by the safe loader, and only what a key ``callable`` names is imported.
"""

from __future__ import annotations

import hashlib
import json
import re
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import StrictBool

from ..callables import check_callable
from ..config import RECIPE_SECTIONS, SECTION, FlowDPPOConfig
from ..settings import build, check, check_known, plain, read_text, read_yaml, require

# bytes of a file's beginning and of its end that stand for it
_SAMPLED = 1 << 20
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
# number format of the weights that does not go with autocast to the other half-precision format
_CLASHES = {"bf16": "float16", "fp16": "bfloat16"}


@dataclass
class QuantizationConfig:
    """> Parameters of quantised base weights, for LoRA only.

    Args:
        backend: ``"bitsandbytes_4bit"``, ``"bitsandbytes_8bit"`` or ``"torchao"``.
        components: of the pipeline, that are quantised; the transformer is the large one, then text encoders.
        options: arguments of diffusers' ``BitsAndBytesConfig`` (``bnb_4bit_quant_type: nf4``), or for torchao ``type``,
            the name of a class in ``torchao.quantization`` (``Int8WeightOnlyConfig``), with that class's arguments.
    """

    __pydantic_config__ = SECTION

    backend: Literal["bitsandbytes_4bit", "bitsandbytes_8bit", "torchao"] = "bitsandbytes_4bit"
    components: tuple[str, ...] = ("transformer",)
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class PipelineConfig:
    """> Parameters of the pipeline that is fine-tuned.

    Args:
        pretrained: name on the Hugging Face Hub (``owner/name``) or a local folder with ``model_index.json``.
        class_name: class in diffusers; None takes the one that ``model_index.json`` names.
        callable: ``package.module:Class``, a pipeline class of your own; the module is imported.
        dtype: number format in which weights are loaded; trained weights are kept in float32 in any case.
        vae_dtype: another one for the VAE (Wan's wants float32).
        revision, variant, local_files_only: as in diffusers' ``from_pretrained``.
        without: components that are not loaded (``[text_encoder_3, tokenizer_3]`` for SD3 without T5).
        quantization: see :class:`QuantizationConfig`; None leaves weights in ``dtype``.
        vae_tiling, vae_slicing: decode in tiles, or image by image, to save memory.
        attention_backend: one of diffusers' attention backends for the transformer(s); None leaves its default.
    """

    __pydantic_config__ = SECTION

    pretrained: str = ""
    class_name: str | None = None
    callable: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    vae_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    revision: str | None = None
    variant: str | None = None
    local_files_only: StrictBool = False
    without: tuple[str, ...] = ()
    quantization: QuantizationConfig | None = None
    vae_tiling: StrictBool = False
    vae_slicing: StrictBool = False
    attention_backend: str | None = None

    @property
    def is_local(self) -> bool:
        """Whether ``pretrained`` is a folder on this machine."""
        return Path(self.pretrained).expanduser().is_dir()

    @property
    def could_be_hub_name(self) -> bool:
        """Whether ``pretrained`` looks like ``owner/name``."""
        return _HUB_NAME.fullmatch(self.pretrained) is not None and not self.pretrained.startswith(".")

    @property
    def location(self) -> str:
        """``pretrained`` as ``from_pretrained`` takes it."""
        return str(Path(self.pretrained).expanduser()) if self.is_local else self.pretrained

    @property
    def source_options(self) -> dict[str, Any]:
        """Arguments of every ``from_pretrained`` and ``load_config``."""
        return {"revision": self.revision, "local_files_only": self.local_files_only}


@dataclass
class PromptsConfig:
    """> Parameters of the prompts.

    Args:
        train: a ``.txt`` file (a prompt per line), a ``.jsonl`` file (per line a text, or an object with arguments of
            the pipeline's call, and ``text`` and ``metadata`` for the reward), or a list of such entries. An argument
            ``{file: picture.png}`` is read as an image.
        eval: the same for evaluation, None for none.
    """

    __pydantic_config__ = SECTION

    train: Any = None
    eval: Any = None


@dataclass
class Recipe:
    """What ``flowdppo train`` needs to know.

    Attributes:
        config: sections of :class:`FlowDPPOConfig`.
        pipeline, prompts: the sections above.
        rewards: mappings as :func:`~flowdppo_fast.trainer.rewards.build_rewards` takes them: ``name`` (built in) or
            ``callable`` (``package.module:function``), ``weight``, options.

    Raises:
        ValueError: an unknown key, a value out of range, or settings that contradict each other.
        TypeError: a value of the wrong type.
    """

    config: FlowDPPOConfig
    pipeline: PipelineConfig
    prompts: PromptsConfig
    rewards: tuple[dict[str, Any], ...]

    def __post_init__(self) -> None:
        self.validate()

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Recipe:
        """Sections as nested mappings, as in the YAML file."""
        trainer = typing.get_type_hints(FlowDPPOConfig)
        if values and not any(name in values for name in RECIPE_SECTIONS):
            raise ValueError(
                f"section: got {', '.join(map(str, values))}, expected {', '.join(RECIPE_SECTIONS)} as well; "
                "FlowDPPOConfig.from_yaml and FlowDPPOConfig.from_dict read the trainer's sections alone"
            )
        check_known("section", values, [*trainer, *RECIPE_SECTIONS])
        rewards = values.get("rewards")
        if not isinstance(rewards, (list, tuple)) or not all(isinstance(entry, Mapping) for entry in rewards):
            raise TypeError(f"rewards: got {rewards!r}, expected a list of mappings such as {{name: pickscore}}")
        return cls(
            FlowDPPOConfig.from_dict({name: values[name] for name in values if name in trainer}),
            build(PipelineConfig, "pipeline", values.get("pipeline") or {}),
            build(PromptsConfig, "prompts", values.get("prompts") or {}),
            tuple(dict(entry) for entry in rewards),
        )

    @classmethod
    def from_yaml(cls, path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
        """A YAML file with ``section.key=value`` overrides on top, at any depth; values are read as YAML."""
        return cls.from_dict(read_yaml(path, overrides))

    def to_dict(self) -> dict[str, Any]:
        """Nested dictionaries of plain values; :meth:`from_dict` is the inverse."""
        own = {"pipeline": self.pipeline, "prompts": self.prompts}
        return plain({**own, "rewards": list(self.rewards), **self.config.to_dict()})

    def portable(self) -> dict[str, Any]:
        """Like :meth:`to_dict`, with local folders and files by their full names, so it means the same anywhere."""
        values = self.to_dict()
        if self.pipeline.is_local:
            values["pipeline"]["pretrained"] = _full_name(self.pipeline.pretrained)
        for key, source in values["prompts"].items():
            if isinstance(source, str):
                values["prompts"][key] = _full_name(source)
        return values

    def save(self, path: str | Path) -> None:
        """Writes :meth:`portable` as YAML."""
        text = yaml.safe_dump(self.portable(), sort_keys=False, allow_unicode=True)
        Path(path).write_text(text, encoding="utf-8")

    def validate(self) -> None:
        """Checks everything that needs neither files nor packages; called at construction."""
        self.config.validate()
        check(self.pipeline, "pipeline")
        check(self.prompts, "prompts")
        self._check_pipeline()
        self._check_precision()
        self._check_prompts_and_rewards()

    def prompt_files(self) -> dict[str, Path]:
        """Prompt files by setting."""
        sources = {"prompts.train": self.prompts.train, "prompts.eval": self.prompts.eval}
        return {name: Path(source).expanduser() for name, source in sources.items() if isinstance(source, str)}

    def inputs(self) -> dict[str, str]:
        """Digests of each prompt file, and of the model where it is a folder, by setting: a run that continues must
        read the same ones, wherever they are."""
        read = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in self.prompt_files().items()}
        return {**read, **({"pipeline.pretrained": _digest(self.pipeline.location)} if self.pipeline.is_local else {})}

    def load_prompts(self) -> tuple[list[str | dict[str, Any]], list[str | dict[str, Any]] | None]:
        """Prompts for training and for evaluation (None without).

        Raises:
            ValueError: a file that does not exist or is not what its suffix says; the message has its line.
        """
        evaluation = None if self.prompts.eval is None else load_prompts(self.prompts.eval, "prompts.eval")
        return load_prompts(self.prompts.train, "prompts.train"), evaluation

    def _check_pipeline(self) -> None:
        p, quantization = self.pipeline, self.pipeline.quantization
        require(bool(p.pretrained), "pipeline.pretrained", p.pretrained, "a name on the Hub or a local folder")
        require(
            p.class_name is None or p.class_name.isidentifier(), "pipeline.class_name", p.class_name,
            "the name of a class in diffusers; a class of your own is named by pipeline.callable",
        )  # fmt: skip
        if p.callable is not None:
            require(p.class_name is None, "pipeline.class_name", p.class_name, "none beside pipeline.callable")
            check_callable(p.callable, "pipeline.callable")
        if quantization is not None:
            require(
                self.config.model.train == "lora", "pipeline.quantization", quantization.backend,
                f"none with model.train={self.config.model.train!r}: only LoRA adapters train on quantised weights",
            )  # fmt: skip
            where = "pipeline.quantization"
            require(len(quantization.components) > 0, f"{where}.components", (), "at least one component")
            both = sorted(set(quantization.components) & set(p.without))
            require(not both, f"{where}.components", both, "no component that pipeline.without leaves out")
            require(
                quantization.backend == "torchao" or self.config.run.device != "cpu", f"{where}.backend",
                quantization.backend, "torchao with run.device='cpu': bitsandbytes needs a GPU",
            )  # fmt: skip
            fixed = sorted(key for key in quantization.options if key.startswith("load_in_"))
            require(not fixed, f"{where}.options", fixed, "no load_in_*: the backend's name says it")
            if quantization.backend == "torchao":
                require(p.dtype == "bfloat16", "pipeline.dtype", p.dtype, "'bfloat16' with torchao, as diffusers asks")
                kind = quantization.options.get("type")
                require(
                    isinstance(kind, str) and kind.isidentifier(), f"{where}.options.type", kind,
                    "the name of a class in torchao.quantization, such as Int8WeightOnlyConfig",
                )  # fmt: skip

    def _check_precision(self) -> None:
        p, precision = self.pipeline, self.config.model.mixed_precision
        clash = _CLASHES.get(precision)
        require(p.dtype != clash, "pipeline.dtype", p.dtype, f"another one with model.mixed_precision={precision!r}")
        # full weights are trained in float32, and the rest of the pipeline hands them its own dtype
        require(
            not (self.config.model.train == "full" and precision == "no" and p.dtype != "float32"),
            "pipeline.dtype", p.dtype,
            "'float32' with model.train='full' and model.mixed_precision='no'; or choose mixed precision",
        )  # fmt: skip

    def _check_prompts_and_rewards(self) -> None:
        require(self.prompts.train is not None, "prompts.train", None, "a .txt or .jsonl file, or a list")
        # inline prompts are checked here, files when they are read
        for name, source in (("prompts.train", self.prompts.train), ("prompts.eval", self.prompts.eval)):
            if source is not None and not isinstance(source, str):
                load_prompts(source, name)
        every, held_out = self.config.evaluation.every, self.prompts.eval
        require(every is None or held_out is not None, "evaluation.every", every, "none without prompts.eval")
        require(held_out is None or every is not None, "prompts.eval", held_out, "none without evaluation.every")
        require(len(self.rewards) > 0, "rewards", [], "at least one")
        for position, entry in enumerate(self.rewards):
            where = f"rewards[{position}]"
            require(("name" in entry) or ("callable" in entry), where, entry, "name (built in) or callable (your own)")
            if "callable" in entry:
                check_callable(entry["callable"], f"{where}.callable")
            require(
                not ("weight" in entry and self.config.advantage.reward_weights), f"{where}.weight",
                entry.get("weight"), "none beside advantage.reward_weights: weights stand in one place",
            )  # fmt: skip


def _digest(folder: str) -> str:
    """Of a model's folder: names, sizes, and of each file its beginning and its end, which is a config as a whole and
    of weights the names and shapes and the last numbers."""
    found = hashlib.sha256()
    for path in sorted(Path(folder).rglob("*")):
        name, size = path.relative_to(folder), path.stat().st_size
        # what a download keeps for itself
        if not path.is_file() or any(part.startswith(".") for part in name.parts):
            continue
        found.update(f"{name} {size}\n".encode())
        with open(path, "rb") as file:
            found.update(file.read(_SAMPLED))
            file.seek(max(size - _SAMPLED, 0))
            found.update(file.read(_SAMPLED))
    return found.hexdigest()


def load_prompts(source: Any, where: str) -> list[str | dict[str, Any]]:
    """Prompts from a file name or an inline list, see :class:`PromptsConfig`.

    Args:
        source: file name or list.
        where: setting that is named in errors.

    Raises:
        ValueError, TypeError: no such file, another suffix, a line that is no prompt, different keys, or no prompts.
    """
    if isinstance(source, str):
        entries = _read_prompt_file(Path(source).expanduser(), where)
    elif isinstance(source, (list, tuple)):
        entries = [(f"{where}[{position}]", entry) for position, entry in enumerate(source)]
    else:
        raise TypeError(f"{where}: got {source!r}, expected a .txt or .jsonl file, or a list of prompts")
    if not entries:
        raise ValueError(f"{where}: got no prompts, expected at least one")
    prompts: list[str | dict[str, Any]] = []
    first: set[str] = set()
    for place, entry in entries:
        if not isinstance(entry, (str, Mapping)) or not entry:
            raise TypeError(
                f"{place}: got {entry!r}, expected a text or an object with arguments of the pipeline's call"
            )
        keys = {"prompt"} if isinstance(entry, str) else set(entry)
        first = first or keys
        if keys != first:
            raise ValueError(f"{place}: got the keys {sorted(keys)}, expected {sorted(first)} like the first prompt")
        prompts.append(entry if isinstance(entry, str) else {key: _image(value, place) for key, value in entry.items()})
    return prompts


def _read_prompt_file(path: Path, where: str) -> list[tuple[str, Any]]:
    if path.suffix not in (".txt", ".jsonl"):
        raise ValueError(f"{where}: got {path}, expected a .txt file, a .jsonl file or a list of prompts")
    if not path.is_file():
        raise ValueError(f"{where}: {path} does not exist, expected a file with prompts")
    entries = []
    # lines end at newlines alone: str.splitlines also cuts at characters that belong to a prompt
    for number, line in enumerate(read_text(path, where).split("\n"), start=1):
        if not line.strip():
            continue
        place = f"{where}: {path}, line {number}"
        if path.suffix == ".txt":
            entries.append((place, line.strip()))
            continue
        try:
            entries.append((place, json.loads(line)))
        except json.JSONDecodeError as error:
            raise ValueError(f"{place}: not JSON ({error})") from None
    return entries


def _image(value: Any, place: str) -> Any:
    if not (isinstance(value, Mapping) and set(value) == {"file"}):
        return value
    from PIL import Image

    path = Path(str(value["file"])).expanduser()
    if not path.is_file():
        raise ValueError(f"{place}: {path} does not exist, expected an image")
    with Image.open(path) as image:
        return image.convert("RGB")


def _full_name(path: str) -> str:
    return str(Path(path).expanduser().resolve())
