"""Writes docs/configuration.md from the settings' dataclasses: docstrings, JSON schemas, and what is refused together.

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
from flowdppo_fast.trainer.settings import described, schema_of

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"
BLOCK = "settings"

TRAINER = typing.get_type_hints(FlowDPPOConfig)
RECIPE = {"pipeline": PipelineConfig, "pipeline.quantization": QuantizationConfig, "prompts": PromptsConfig}

# settings that contradict each other, each with the value that is named
CONFLICTS: tuple[dict[str, Any], ...] = (
    {"sampling": {"sampler": "ode"}},
    {"sampling": {"sampler": "cps", "eta": 2.5}},
    {"sampling": {"sde_fraction": 0.5, "sde_steps": [0]}},
    {"sampling": {"step_choice": "window"}},
    {"sampling": {"per_group_steps": True}},
    {"sampling": {"sde_steps": [0, 9]}},
    {"sampling": {"sde_steps_per_rollout": 6}},
    {"sampling": {"batch_size": 12}},
    {"sampling": {"pipeline_kwargs": {"prompt": "a cat"}}},
    {"sampling": {"group_size": 1}},
    {"engines": {"urls": ["10.0.0.2:30000"]}},
    {"engines": {"urls": ["http://10.0.0.2:30000"]}, "model": {"train": "full"}},
    {"engines": {"urls": ["http://10.0.0.2:30000"], "protocol": "sglang"}, "model": {"train": "lora"}},
    {"optimizer": {"updates_per_rollout": 3}},
    {"optimizer": {"updates_per_rollout": 1}},
    {"model": {"lora_targets": "attn.(to_q"}},
    {"model": {"train": "full", "lora_rank": 8}},
    {"objective": {"name": "ratio_clip", "threshold": 1e-5}},
    {"objective": {"name": "kl_penalty"}},
    {"objective": {"clip_high": 1e-4}},
    {"objective": {"clip_low": 1e-4, "penalty": 0.5}},
    {"objective": {"threshold": 1e-5, "threshold_nats": 1.0}},
    {"objective": {"reference_every": 10}},
    {"objective": {"callable": "my.module"}},
    {"objective": {"callable": "my.module:rule", "name": "unclipped"}},
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


def type_of(schema: dict[str, Any]) -> str:
    """A type as a reader of YAML thinks of it, with the range of a number."""
    kinds = [one for one in schema.get("anyOf", [schema]) if one.get("type") != "null"]
    choices, none = kinds[0].get("enum"), ", or none" if "anyOf" in schema else ""
    # what has no schema of its own is read as a prompt's source
    text = "file or list" if not {"type", "enum", "$ref"} & set(kinds[0]) else described(kinds[0])
    return (" or ".join(f"`{value}`" for value in choices) if choices else text) + none


def default_of(field: dataclasses.Field) -> str:
    value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    if value is None:
        return "none"
    # as YAML has it
    shown = value if isinstance(value, str) and value else json.dumps(value)
    return f"`{shown}`"


def table(section: str, kind: type) -> Iterator[str]:
    fields, said = schema_of(kind)["properties"], documented(kind)
    introduction = (kind.__doc__ or "").splitlines()[0].removeprefix("> Parameters ")
    yield f"### `{section}`"
    yield f"Parameters {introduction}"
    rows = ["| setting | type | default | |", "|---|---|---|---|"]
    for field in dataclasses.fields(kind):
        meaning = site_text(said[field.name])
        rows.append(f"| `{field.name}` | {type_of(fields[field.name])} | {default_of(field)} | {meaning} |")
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
