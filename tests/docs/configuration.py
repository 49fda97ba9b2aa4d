"""Writes docs/configuration.md from the settings' dataclasses and from what their checks refuse.

``python -m tests.docs.configuration`` writes the part between the marks; ``--check`` compares it.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.pages import put
from flowdppo_fast.trainer.config import FlowDPPOConfig
from flowdppo_fast.trainer.recipe import PipelineConfig, PromptsConfig, QuantizationConfig, Recipe

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"
BLOCK = "settings"

TRAINER = typing.get_type_hints(FlowDPPOConfig)
RECIPE = {"pipeline": PipelineConfig, "pipeline.quantization": QuantizationConfig, "prompts": PromptsConfig}

# numbers at which a range may end; what a setting refuses of them is its range
_PROBES = (-1, 0, 0.5, 1, 1.5, 2)
# settings that contradict each other, each with the value that is named
CONFLICTS: tuple[dict[str, Any], ...] = (
    {"sampling": {"num_steps": 1}},
    {"sampling": {"sampler": "cps", "eta": 1.5}},
    {"sampling": {"sde_fraction": 0.5, "sde_steps": [0]}},
    {"sampling": {"step_choice": "window"}},
    {"sampling": {"per_group_steps": True}},
    {"sampling": {"sde_steps": [0, 9]}},
    {"sampling": {"sde_steps_per_rollout": 6}},
    {"sampling": {"batch_size": 12}},
    {"sampling": {"pipeline_kwargs": {"prompt": "a cat"}}},
    {"sampling": {"group_size": 1}},
    {"optimizer": {"updates_per_rollout": 3}},
    {"optimizer": {"betas": [0.9, 1.0]}},
    {"optimizer": {"weight_decay": -1}},
    {"optimizer": {"max_skipped_updates": -1}},
    {"model": {"ema_decay": 1.0}},
    {"model": {"train": "full", "lora_rank": 8}},
    {"objective": {"name": "ratio_clip", "threshold": 1e-5}},
    {"objective": {"clip_low": 1e-4}},
    {"objective": {"threshold": -1.0}},
    {"objective": {"name": "ratio_clip", "clip_low": 1.0}},
    {"objective": {"kl_weight": -1.0}},
)
RECIPE_CONFLICTS: tuple[dict[str, Any], ...] = (
    {"pipeline": {"pretrained": ""}},
    {"pipeline": {"class_name": "my.module"}},
    {"pipeline": {"class_name": "FluxPipeline", "callable": "my.module:Class"}},
    {"pipeline": {"callable": "my.module"}},
    {"pipeline": {"dtype": "float16"}, "model": {"mixed_precision": "bf16"}},
    {"pipeline": {"dtype": "bfloat16"}, "model": {"train": "full"}},
    {"pipeline": {"quantization": {}, "dtype": "float32"}, "model": {"train": "full"}},
    {"pipeline": {"quantization": {"components": []}}},
    {"pipeline": {"quantization": {}, "without": ["transformer"]}},
    {"pipeline": {"quantization": {}}, "run": {"device": "cpu"}},
    {"pipeline": {"quantization": {"options": {"load_in_4bit": True}}}},
    {"pipeline": {"quantization": {"backend": "torchao"}, "dtype": "float16"}},
    {"pipeline": {"quantization": {"backend": "torchao"}}},
    {"prompts": {}},
    {"evaluation": {"every": 1}},
    {"prompts": {"train": ["a cat"], "eval": ["a dog"]}},
    {"rewards": []},
    {"rewards": [{"weight": 1.0}]},
    {"rewards": [{"name": "clip", "weight": 1.0}], "advantage": {"reward_weights": {"clip": 1.0}}},
)
_SMALLEST = {"pipeline": {"pretrained": "owner/name"}, "prompts": {"train": ["a cat"]}, "rewards": [{"name": "clip"}]}


def documented(kind: type) -> dict[str, str]:
    """What the docstring says of each field; fields that share an entry share its text."""
    text = (kind.__doc__ or "").split("Args:\n", 1)[1]
    entries = re.findall(r"^        (\w[\w, ]*): (.*(?:\n {12}.*)*)", text, re.MULTILINE)
    return {name: " ".join(body.split()) for names, body in entries for name in names.split(", ")}


def refusal(values: dict[str, Any], *, recipe: bool = False) -> str | None:
    """The message with which settings are refused, None if they are not."""
    try:
        if recipe:
            # what a recipe must have, where it is not given; a section that is given empty stays empty
            sections = {
                name: {**_SMALLEST.get(name, {}), **given} if given and isinstance(given, dict) else given
                for name, given in values.items()
            }
            Recipe.from_dict({**_SMALLEST, **sections})
        else:
            FlowDPPOConfig.from_dict(values)
    except (ValueError, TypeError) as error:
        return str(error)
    return None


def allowed(section: str, key: str, hint: Any) -> str:
    """The range of a number, in the words of the check that refuses what is outside of it."""
    kinds = {float, int} & {hint, *typing.get_args(hint)}
    if not kinds:
        return ""
    for value in _PROBES if float in kinds else [probe for probe in _PROBES if isinstance(probe, int)]:
        found = re.match(rf"{section}\.{key}: got \S+, expected (.*)", refusal({section: {key: value}}) or "")
        if found and re.match(r"an? (number|integer)\b", found[1]):
            return found[1].removeprefix("an integer ").removeprefix("a number ")
    return ""


def type_of(hint: Any, bound: str = "") -> str:
    """A type as a reader of YAML thinks of it, with the range of a number."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if type(None) in arguments:
        return type_of(next(one for one in arguments if one is not type(None)), bound) + ", or none"
    if origin is tuple:
        return f"list of {type_of(arguments[0])}"
    if origin is dict:
        return "mapping"
    names = {int: "integer", float: "number", bool: "true or false", str: "text", QuantizationConfig: "section"}
    return f"{names.get(hint, 'file or list')} {bound}".strip()


def default_of(field: dataclasses.Field) -> str:
    value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    if value is None:
        return "none"
    # as YAML has it
    shown = value if isinstance(value, str) and value else json.dumps(value)
    return f"`{shown}`"


def table(section: str, kind: type) -> Iterator[str]:
    hints, said = typing.get_type_hints(kind), documented(kind)
    introduction = (kind.__doc__ or "").splitlines()[0].removeprefix("> Parameters ")
    yield f"### `{section}`"
    yield f"Parameters {introduction}"
    rows = ["| setting | type | default | |", "|---|---|---|---|"]
    for field in dataclasses.fields(kind):
        meaning = site_text(said[field.name])
        bound = allowed(section, field.name, hints[field.name]) if kind in TRAINER.values() else ""
        kind_text = type_of(hints[field.name], bound)
        rows.append(f"| `{field.name}` | {kind_text} | {default_of(field)} | {meaning} |")
    yield "\n".join(rows)


def site_text(text: str) -> str:
    """Docstring text as markdown in a cell."""
    text = re.sub(r":\w+:`~?\.?([\w.]+)`", r"`\1`", text)
    return text.replace("``", "`").replace("|", "\\|")


def conflicts() -> Iterator[str]:
    for values, recipe in ((v, r) for group, r in ((CONFLICTS, False), (RECIPE_CONFLICTS, True)) for v in group):
        message = refusal(values, recipe=recipe)
        if message is None:
            raise AssertionError(f"{values} was not refused")
        yield f"- `{message}`"


def generated() -> str:
    parts = [part for section, kind in {**RECIPE, **TRAINER}.items() for part in table(section, kind)]
    heading = "### What is refused together"
    return "\n\n".join([*parts, heading, "\n".join(conflicts())])


def main() -> int:
    return put(PAGE, {BLOCK: generated()}, check="--check" in sys.argv[1:], program="tests.docs.configuration")


if __name__ == "__main__":
    sys.exit(main())
