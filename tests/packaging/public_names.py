"""Every name that users rely on, with its signature: Python names, commands, config keys, metrics, operators.

    python tests/packaging/public_names.py            # what differs from public_names.json
    python tests/packaging/public_names.py --write    # accept it, after docs/releasing.md

Annotations are left out: a wider type breaks nobody. The integrations with verl-omni, UniRL and Flow-Factory are read
as text, since those trainers need not be here.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import importlib
import inspect
import json
import re
import sys
import typing
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
LIST = Path(__file__).with_suffix(".json")
PACKAGE = "flowdppo_fast"
MODULES = (PACKAGE, f"{PACKAGE}.trainer", f"{PACKAGE}.trainer.rewards")
INTEGRATIONS = ("flow_grpo", "dance_grpo", "mix_grpo")
NEED_THEIR_TRAINER = ("verl_omni", "unirl", "flow_factory")
_ENVIRONMENT = re.compile(r'"(FLOWDPPO_[A-Z_]*[A-Z])"')
# where the keys of the lines that a run writes are set, besides those of a loss
_WRITERS = {
    "metrics.jsonl": (
        ("trainer/metrics", "read_iteration"),
        ("trainer/trainer", "_read"),
        ("trainer/trainer", "_iterate"),
    ),
    "rows.jsonl": (("runs/row_log", "row_lines"),),
}

Names = dict[str, str]


def public_names() -> Names:
    """Signature, value or kind by name."""
    found: Names = {}
    for name in (*MODULES, *(f"{PACKAGE}.integrations.{name}" for name in INTEGRATIONS)):
        module = importlib.import_module(name)
        for public in module.__all__:
            found |= described(f"{name}.{public}", getattr(module, public))
    for name in NEED_THEIR_TRAINER:
        found |= written(name)
    found |= rewards() | commands() | config_keys() | metrics() | operators() | environment()
    vague = [name for name, text in found.items() if " at 0x" in text]
    if vague:
        raise ValueError(
            f"{', '.join(vague)}: got a default that prints as an address, expected one that can be compared"
        )
    return dict(sorted(found.items()))


def described(name: str, thing: Any) -> Names:
    """A function, the entries of a collection, or a class with all that it has of its own."""
    if inspect.isclass(thing):
        return {name: constructor(thing)} | members(name, thing)
    if callable(thing):
        return {name: signature(thing)}
    return {name: type(thing).__name__} | {f"{name}: {entry}": "entry" for entry in thing}


def constructor(kind: type) -> str:
    """What a class takes; only where its constructor is the package's, not a base's of another version."""
    if hasattr(kind, "__total__"):
        return "keys"
    own = [base for base in kind.__mro__ if base.__module__.startswith(PACKAGE)]
    made = any("__init__" in vars(base) or hasattr(base, "_fields") for base in own)
    return f"class{signature(kind)}" if made and not is_protocol(kind) else f"class of {kind.__base__.__name__}"


def is_protocol(kind: type) -> bool:
    return getattr(kind, "_is_protocol", False)


def members(name: str, kind: type) -> Names:
    if hasattr(kind, "__total__"):
        return {f"{name}: {key}": "key" for key in kind.__annotations__}
    # these are in the signature
    fields = {*getattr(kind, "_fields", ()), *getattr(kind, "__dataclass_fields__", ())}
    found: Names = {}
    for base in reversed(kind.__mro__):
        if not base.__module__.startswith(PACKAGE):
            continue
        for member, value in vars(base).items():
            if member not in fields and (member == "__call__" or not member.startswith("_")):
                value = value.__func__ if isinstance(value, (classmethod, staticmethod)) else value
                found[f"{name}.{member}"] = signature(value) if inspect.isfunction(value) else "attribute"
    return found


def signature(thing: Any) -> str:
    """Names, kinds and defaults of the parameters."""
    if hasattr(thing, "_fields"):
        defaults = thing._field_defaults
        return (
            f"({', '.join(f'{field}={defaults[field]!r}' if field in defaults else field for field in thing._fields)})"
        )
    found = inspect.signature(thing)
    bare = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in found.parameters.values()]
    return str(found.replace(parameters=bare, return_annotation=inspect.Signature.empty))


def written(module: str) -> Names:
    """The names of a module of the integrations, from its text."""
    tree = ast.parse((ROOT / PACKAGE / "integrations" / f"{module}.py").read_text())
    by_name: dict[str, Any] = {}
    listed: list[str] = []
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            by_name[node.name] = node
        elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            listed = ast.literal_eval(node.value)
    if not listed:
        raise ValueError(f"{module}: got no __all__, expected a list of its public names")
    found: Names = {}
    for name in listed:
        node, full = by_name[name], f"{PACKAGE}.integrations.{module}.{name}"
        if isinstance(node, ast.FunctionDef):
            found[full] = parameters_of(node)
            continue
        found[full] = f"class({', '.join(ast.unparse(base) for base in node.bases)})"
        for part in node.body:
            if isinstance(part, ast.FunctionDef) and not part.name.startswith("_"):
                found[f"{full}.{part.name}"] = parameters_of(part)
            elif isinstance(part, ast.AnnAssign):
                found[f"{full}.{ast.unparse(part.target)}"] = ast.unparse(part.value) if part.value else "required"
    return found


def parameters_of(node: ast.FunctionDef) -> str:
    for argument in ast.walk(node.args):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    return f"({ast.unparse(node.args)})"


def rewards() -> Names:
    from flowdppo_fast.trainer.rewards.registry import BUILT_IN

    return {f"reward {name}": signature(kind) for name, kind in BUILT_IN.items()}


def commands() -> Names:
    from flowdppo_fast.cli import COMMANDS
    from flowdppo_fast.cli.doctor import doctor_report

    found: Names = {f"flowdppo doctor --json: {key}": "key" for key in doctor_report()}
    for command, (module, _) in COMMANDS.items():
        parser = argparse.ArgumentParser(add_help=False)
        importlib.import_module(module).add_arguments(parser)
        found[f"flowdppo {command}"] = "command"
        for action in parser._actions:
            said = {"default": action.default, "nargs": action.nargs, "choices": action.choices}
            for option in action.option_strings or [action.dest]:
                given = [f"{key}={value!r}" for key, value in said.items() if value is not None]
                found[f"flowdppo {command} {option}"] = " ".join(["required"] * action.required + given) or "option"
    return found


def config_keys() -> Names:
    """Keys of a recipe's YAML, with type and default."""
    from flowdppo_fast.trainer import FlowDPPOConfig
    from flowdppo_fast.trainer.recipe import PipelineConfig, PromptsConfig, QuantizationConfig

    sections = {"pipeline": PipelineConfig, "pipeline.quantization": QuantizationConfig, "prompts": PromptsConfig}
    sections |= {
        section.name: type(getattr(FlowDPPOConfig(), section.name)) for section in dataclasses.fields(FlowDPPOConfig)
    }
    found: Names = {"config rewards": "list"}
    for section, kind in sections.items():
        values, hints = kind(), typing.get_type_hints(kind)
        for field in dataclasses.fields(kind):
            found[f"config {section}.{field.name}"] = (
                f"{type_text(hints[field.name])} = {getattr(values, field.name)!r}"
            )
    return found


def type_text(hint: Any) -> str:
    """A type as it is written, without the range of a number: a wider one breaks nobody."""
    text = hint.__name__ if isinstance(hint, type) else re.sub(r"\w[\w.]*\.(\w+)", r"\1", str(hint))
    return re.sub(r"^Optional\[(.*)\]$", r"\1 | None", text)


def metrics() -> Names:
    """Metrics of a loss call by objective, and the keys of the files that a run writes."""
    from flowdppo_fast import DPPO, DRPO, GRPOGuard, KLPenalty, LogHinge, RatioClip, Unclipped
    from flowdppo_fast.objectives import SUMMARY
    from flowdppo_fast.runs.row_log import _FIELDS
    from flowdppo_fast.trainer.metrics import _DROPPED, METRICS

    found: Names = {f"metric {name}": "of a loss" for name in SUMMARY}
    for kind in (DPPO, RatioClip, GRPOGuard, KLPenalty, DRPO, LogHinge, Unclipped):
        found |= {f"metric {name} of {kind.__name__}": "of a loss" for name in kind.metrics}
    for file, writers in _WRITERS.items():
        found |= {f"{file}: {key}": "key" for writer in writers for key in keys_set_in(*writer)}
    found |= {f"metrics.jsonl: {name}": "key" for name in METRICS if name not in _DROPPED}
    found |= {f"rows.jsonl: {name}": "key" for name in _FIELDS}
    return found


def keys_set_in(module: str, function: str) -> set[str]:
    """Keys that a function of the trainer returns, yields or gives to ``metrics``, from its text."""
    tree = ast.parse((ROOT / PACKAGE / f"{module}.py").read_text())
    bodies = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == function]
    if len(bodies) != 1:
        raise ValueError(f"{module}.py: got {len(bodies)} functions {function}, expected one")
    (body,) = bodies
    # what updates collect is written nowhere
    internal = [node.value for node in ast.walk(body) if isinstance(node, ast.AnnAssign)]
    keys: set[str] = set()
    for node in ast.walk(body):
        if isinstance(node, ast.Dict) and node not in internal:
            keys |= {key.value for key in node.keys if isinstance(key, ast.Constant)}
        if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store) and isinstance(node.slice, ast.Constant):
            keys.add(node.slice.value)
    return keys


def operators() -> Names:
    from flowdppo_fast.ops import SCHEMAS

    return {
        f"torch.ops.{space}.{name}": text for space in ("flowdppo", "flowdppo_cuda") for name, text in SCHEMAS.items()
    }


def environment() -> Names:
    """Variables that the build, the package and its libraries read."""
    sources = [ROOT / "setup.py", *(ROOT / PACKAGE).rglob("*.py"), *(ROOT / "csrc").rglob("*.cpp")]
    return {
        f"environment {name}": "variable" for source in sources for name in _ENVIRONMENT.findall(source.read_text())
    }


def differences(listed: Names, found: Names) -> list[str]:
    """What has changed, and what has to be done about it."""
    gone = [f"gone: {name}" for name in listed if name not in found]
    changed = [
        f"changed: {name}: was {listed[name]}, is {found[name]}"
        for name in listed
        if name in found and listed[name] != found[name]
    ]
    added = [f"new: {name}: {found[name]}" for name in found if name not in listed]
    lines = gone + changed + added
    if gone or changed:
        lines.append("Users rely on these: put it back, or raise the major version as docs/releasing.md says.")
    if lines:
        lines.append(
            "If it is meant: an entry under Unreleased in CHANGELOG.md, then "
            "`python tests/packaging/public_names.py --write`."
        )
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"replace {LIST.name}")
    options = parser.parse_args()
    found = public_names()
    lines = differences(json.loads(LIST.read_text()) if LIST.exists() else {}, found)
    print("\n".join(lines) or "nothing has changed")
    if options.write:
        LIST.write_text(json.dumps(found, indent=0, ensure_ascii=False) + "\n")
        return 0
    return int(bool(lines))


if __name__ == "__main__":
    sys.exit(main())
