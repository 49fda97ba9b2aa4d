"""Reading settings: YAML files with overrides, types and ranges as the fields declare them, and errors that name what
was got and what was expected.

Sections are dataclasses. pydantic checks them, and its JSON schema of a section is what messages and the reference page
of all settings are written from.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import hashlib
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
import yaml
from pydantic import BeforeValidator, ConfigDict, Field, Strict, TypeAdapter, ValidationError
from pydantic_core import PydanticKnownError

Section = TypeVar("Section")


def _no_truth_value(value: Any) -> Any:
    if isinstance(value, bool):
        raise PydanticKnownError("float_type")
    return value


# what a section does not know is refused, and sections in sections are checked again
SECTION = ConfigDict(extra="forbid", revalidate_instances="always")
# text is a number too: YAML 1.1 reads 1e-5 as text; True is none
NUMBER = BeforeValidator(_no_truth_value)
Number = Annotated[float, NUMBER]
Positive = Annotated[float, Field(gt=0), NUMBER]
NotNegative = Annotated[float, Field(ge=0), NUMBER]
BetweenZeroAndOne = Annotated[float, Field(gt=0, lt=1), NUMBER]
Decay = Annotated[float, Field(ge=0, lt=1), NUMBER]
Count = Annotated[int, Field(ge=1), Strict()]
# what a section does not know is refused, and sections in sections are checked again
SECTION = ConfigDict(extra="forbid", revalidate_instances="always")
# package.module:attribute, imported when it is used
OF_MODULE = re.compile(r"\w+(\.\w+)*:\w+(\.\w+)*")


def read_yaml(path: str | Path, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """Sections of a YAML file with ``section.key=value`` overrides on top, at any depth; values are read as YAML.

    Raises:
        ValueError: no such file, no YAML, a key that is given twice, or an override that fits nowhere.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise ValueError(f"config: {path} does not exist, expected a YAML file")
    try:
        # a subclass of the safe loader
        values = yaml.load(read_text(path, "config"), Loader=_UniqueKeyLoader) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: no valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: got {type(values).__name__}, expected sections with settings")
    for override in overrides:
        _override(values, override)
    return values


def read_text(path: Path, where: str) -> str:
    """A text file, without the byte order mark that some editors leave and with ``\\n`` for every kind of newline.

    Raises:
        ValueError: it is not UTF-8.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where}: {path} is not UTF-8 ({error.reason} at byte {error.start}), expected UTF-8"
        ) from None
    if "\0" in text:
        raise ValueError(f"{where}: {path} has NUL characters, as UTF-16 without a byte order mark, expected UTF-8")
    return text


def build(kind: type[Section], name: str, entries: Any) -> Section:
    """The section ``name`` from a mapping.

    Raises:
        ValueError: unknown keys or values out of range, a line each. TypeError: values of the wrong type.
    """
    if not isinstance(entries, Mapping):
        raise TypeError(f"{name}: got {type(entries).__name__}, expected settings of that section")
    try:
        values = {key: _value(entry) for key, entry in entries.items()}
        return _adapter(kind).validate_python(_numbers(values))  # type: ignore[arg-type]
    except ValidationError as error:
        raise _refusal(kind, name, error) from None


def check(section: Any, name: str) -> None:
    """Checks a section that was built or changed by hand, and converts its values in place; raises as :func:`build`."""
    vars(section).update(vars(build(type(section), name, vars(section))))


def check_known(where: str, keys: Iterable[str], known: Iterable[str]) -> None:
    """Raises ``ValueError`` for ``keys`` that are not among those ``known``."""
    unknown = [key for key in keys if key not in set(known)]
    if unknown:
        raise ValueError(_unknown(where, unknown, known))


def require(condition: bool, name: str, value: Any, expected: str) -> None:
    """Raises ``ValueError`` in the words of all settings where ``condition`` does not hold."""
    if not condition:
        raise ValueError(f"{name}: got {value!r}, expected {expected}")


def plain(value: Any) -> Any:
    """``value`` as a file can hold it, at any depth: lists for tuples, and a few words for what is no setting but an
    object, such as a callback or a tensor among the arguments of a pipeline."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    value = _numbers(value)
    return value if isinstance(value, (str, int, float, type(None))) else _words(value)


def _words(value: Any) -> str:
    """What an object is, with enough of it to tell another one."""
    kind = type(value)
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        numbers = np.asarray(value.detach().float().cpu() if hasattr(value, "detach") else value)
        digest = hashlib.blake2b(np.ascontiguousarray(numbers).tobytes(), digest_size=4).hexdigest()
        return f"<{kind.__name__} {list(value.shape)} {value.dtype} {digest}>"
    name = getattr(value, "__qualname__", None)
    return f"<{kind.__name__}>" if name is None else f"<{kind.__name__} {value.__module__}.{name}>"


def _value(entry: Any) -> Any:
    """A setting as Python gives it: paths are texts; arrays, tensors and ranges are lists."""
    if isinstance(entry, os.PathLike):
        return os.fspath(entry)
    return list(entry) if isinstance(entry, range) else entry.tolist() if hasattr(entry, "tolist") else entry


def _numbers(value: Any) -> Any:
    """numpy's numbers as Python's, at any depth."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, dict):
        return {key: _numbers(entry) for key, entry in value.items()}
    return type(value)(map(_numbers, value)) if type(value) in (list, tuple) else value


def schema_of(kind: type) -> dict[str, Any]:
    """JSON schema of a section."""
    return _adapter(kind).json_schema()


def described(schema: Mapping[str, Any]) -> str:
    """What a value of a JSON schema is, as ``integer >= 1``; of what may be left out, what it is otherwise."""
    schema = next(one for one in schema.get("anyOf", [schema]) if one.get("type") != "null")
    kind, one_each = schema.get("type"), schema.get("prefixItems")
    if "enum" in schema:
        return f"one of {', '.join(map(repr, schema['enum']))}"
    if one_each:
        bounds = _range(one_each[0])
        return f"{len(one_each)} {one_each[0]['type']}s{bounds}"
    if kind in ("integer", "number"):
        return kind + _range(schema)
    if kind == "array":
        return f"list of {described(schema['items'])}"
    return {"boolean": "true or false", "string": "text", "object": "mapping", None: "section"}[kind]


def _range(schema: Mapping[str, Any]) -> str:
    low, above = schema.get("minimum"), schema.get("exclusiveMinimum")
    high, below = schema.get("maximum"), schema.get("exclusiveMaximum")
    if high is None and below is None:
        return "" if low is above is None else f" >= {low}" if above is None else f" > {above}"
    start = f"[{low}" if above is None else f"({above}"
    return f" in {start}, {f'{high}]' if below is None else f'{below})'}"


@functools.cache
def _adapter(kind: Any) -> TypeAdapter:
    return TypeAdapter(kind)


def _refusal(kind: type, name: str, error: ValidationError) -> Exception:
    """All that is wrong with a section, a line each."""
    schema = schema_of(kind)
    unknown: dict[str, list[str]] = {}
    lines, of_types = {}, True
    for found in error.errors():
        *way, last = found["loc"]
        if found["type"] == "unexpected_keyword_argument":
            unknown.setdefault(".".join([name, *map(str, way)]), []).append(str(last))
            continue
        # a list that is too short lacks entries
        loc = way if found["type"] == "missing" else found["loc"]
        field, where = _at(schema, loc)
        words = described(field)
        bare = words[0].isdigit() or words.startswith(("one of", "true"))
        article = "" if bare else "an " if words.startswith("integer") else "a "
        lines[f"{name}{where}"] = f"{name}{where}: got {found['input']!r}, expected {article}{words}"
        of_types &= found["type"].endswith(("_type", "_parsing"))
    for where, keys in unknown.items():
        known = _at(schema, where.split(".")[name.count(".") + 1 :])[0]["properties"]
        lines[where] = _unknown(where, keys, known)
    return (TypeError if of_types and not unknown else ValueError)("\n".join(lines.values()))


def _at(schema: dict[str, Any], loc: Iterable[str | int]) -> tuple[dict[str, Any], str]:
    """The schema at a place, and how the place is written."""
    definitions, here, where = schema.get("$defs", {}), schema, ""
    for key in loc:
        if key == "[key]":
            return {"type": "string"}, where
        if "properties" in here:
            here = here["properties"][key]
        elif "prefixItems" in here:
            here = here["prefixItems"][key]
        else:
            here = here.get("items") or here["additionalProperties"]
        here = next(one for one in here.get("anyOf", [here]) if one.get("type") != "null")
        here = definitions[here["$ref"].rpartition("/")[2]] if "$ref" in here else here
        where += f"[{key}]" if isinstance(key, int) else f".{key}"
    return here, where


def _unknown(where: str, keys: list[str], known: Iterable[str]) -> str:
    known = list(known)
    near = [close for key in keys for close in difflib.get_close_matches(str(key), known, n=1)]
    hint = f"; did you mean {', '.join(map(repr, near))}?" if near else ""
    return f"{where}: got unknown {', '.join(map(repr, keys))}, expected some of {', '.join(known)}{hint}"


class _UniqueKeyLoader(yaml.SafeLoader):
    """The safe loader, for which a key that is given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
            if key_node.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key_node.value!r} is given twice", key_node.start_mark
                )
            seen.add(key_node.value if isinstance(key_node.value, str) else str(key_node.value))
        return super().construct_mapping(node, deep)


def _override(values: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    keys = name.strip().split(".")
    if not (equals and all(keys) and (len(keys) > 1 or keys == ["rewards"])):
        raise ValueError(f"override: got {override!r}, expected section.key=value, as in sampling.eta=0.5")
    try:
        value = yaml.load(text, Loader=_UniqueKeyLoader)
    except yaml.YAMLError:
        raise ValueError(f"override: got {override!r}, whose value is no valid YAML") from None
    place = values
    for depth, key in enumerate(keys[:-1]):
        inner = place.get(key)
        if inner is None:
            inner = {}
        if not isinstance(inner, dict):
            raise ValueError(f"override: got {override!r}, but {'.'.join(keys[: depth + 1])} has no keys: {inner!r}")
        place[key] = inner = dict(inner)
        place = inner
    place[keys[-1]] = value
