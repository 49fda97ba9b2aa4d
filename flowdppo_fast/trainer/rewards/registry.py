"""Rewards by name, with weights: from the plain mappings of a YAML file to one callable."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from typing_extensions import Self

from ..callables import load_callable
from .aesthetic import AestheticScore
from .classifier import ClassifierReward
from .clip import CLIPScore, HPSv2Score, PickScore
from .http import HTTPReward
from .imagereward import ImageRewardScore
from .jpeg import JPEGCompressibility, JPEGIncompressibility
from .ocr import OCRReward
from .protocol import Reward, move_reward
from .vlm_judge import VLMJudge

BUILT_IN: dict[str, Callable[..., Reward]] = {
    "aesthetic": AestheticScore,
    "classifier": ClassifierReward,
    "clip": CLIPScore,
    "hpsv2": HPSv2Score,
    "http": HTTPReward,
    "imagereward": ImageRewardScore,
    "jpeg": JPEGCompressibility,
    "jpeg_compressibility": JPEGCompressibility,
    "jpeg_incompressibility": JPEGIncompressibility,
    "ocr": OCRReward,
    "pickscore": PickScore,
    "vlm_judge": VLMJudge,
}

# keys of an entry that are not arguments of the reward
_ENTRY_KEYS = ("name", "callable", "arguments", "label", "weight")


@dataclass(frozen=True)
class _Term:
    label: str
    reward: Reward
    weight: float | Mapping[str, float]


class CombinedReward:
    """Several rewards under one name each, on the same images.

    A reward that returns a mapping appears as ``label/name``; its weight is then a mapping of these names.

    Args:
        terms: label, reward and weight of each.
    """

    def __init__(self, terms: Sequence[_Term]):
        self._terms = tuple(terms)

    @property
    def rewards(self) -> dict[str, Reward]:
        """The rewards by label."""
        return {term.label: term.reward for term in self._terms}

    @property
    def weights(self) -> dict[str, float]:
        """Weight of every name that a call returns, for ``advantage.reward_weights``."""
        weights: dict[str, float] = {}
        for term in self._terms:
            if isinstance(term.weight, Mapping):
                weights |= {f"{term.label}/{name}": weight for name, weight in term.weight.items()}
            else:
                weights[term.label] = term.weight
        return weights

    @property
    def may_abstain(self) -> frozenset[str]:
        """Names whose rewards may be NaN."""
        names: set[str] = set()
        for term in self._terms:
            returned = term.weight if isinstance(term.weight, Mapping) else ()
            allowed = getattr(term.reward, "may_abstain", False)
            chosen = returned if allowed is True else [name for name in returned if allowed and name in allowed]
            names |= {f"{term.label}/{name}" for name in chosen}
            if allowed is True and not returned:
                names.add(term.label)
        return frozenset(names)

    def __call__(self, images: Any, prompts: Sequence[Any], metadata: Sequence[dict]) -> dict[str, Any]:
        named: dict[str, Any] = {}
        for term in self._terms:
            result = term.reward(images, prompts, metadata)
            if isinstance(result, Mapping) != isinstance(term.weight, Mapping):
                got = f"the names {sorted(result)}" if isinstance(result, Mapping) else "one tensor"
                raise ValueError(
                    f"rewards: {term.label!r} returns {got}, expected what its weight {term.weight!r} says; the "
                    "weight of a reward that returns several names is a mapping of these names"
                )
            if isinstance(result, Mapping) and isinstance(term.weight, Mapping):
                if set(result) != set(term.weight):
                    raise ValueError(
                        f"rewards: {term.label!r} returns the names {sorted(result)}, expected {sorted(term.weight)} "
                        "as in its weight; 0 keeps a reward in the logs only"
                    )
                named |= {f"{term.label}/{name}": value for name, value in result.items()}
            else:
                named[term.label] = result
        return named

    def to(self, device: torch.device | str) -> Self:
        """Moves all rewards that can be moved."""
        for term in self._terms:
            move_reward(term.reward, device)
        return self


def build_rewards(specs: Mapping[str, Any] | Sequence[Any]) -> tuple[CombinedReward, dict[str, float]]:
    """Rewards from settings: one callable that returns them all by name, and the weight of each name.

    Args:
        specs: built-in names to weights, ``{"clip": 1.0, "jpeg": 0.2}``, or a list of names and mappings. A mapping has
            ``name`` (of a built-in reward) or ``callable`` (``"package.module:attribute"``, own code that is imported
            and run), and if wanted ``weight`` (1.0; 0 only logs it; negative punishes; a mapping of names for a reward
            that returns several), ``label`` (its name in metrics, by default the name of the reward) and the
            arguments of a built-in reward, or under ``arguments`` those of ``callable``, which is then called with
            them once and must return the reward. A ``callable`` that is a class is always called.

    Raises:
        TypeError: entries of another kind, or arguments that the reward does not take.
        ValueError: unknown names or keys, labels that are used twice, or weights that are not finite numbers.
    """
    if isinstance(specs, Mapping):
        entries: list[Any] = [{"name": name, "weight": weight} for name, weight in specs.items()]
    elif isinstance(specs, Sequence) and not isinstance(specs, (str, bytes)):
        entries = [{"name": entry} if isinstance(entry, str) else entry for entry in specs]
    else:
        raise TypeError(f"rewards: got {type(specs).__name__}, expected a mapping of names to weights or a list")
    if not entries:
        raise ValueError("rewards: got none, expected at least one")
    terms = [_build(place, entry) for place, entry in enumerate(entries)]
    labels = [term.label for term in terms]
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise ValueError(
            f"rewards: got {', '.join(map(repr, twice))} more than once, expected a different 'label' each"
        )
    combined = CombinedReward(terms)
    return combined, combined.weights


def _build(place: int, entry: Any) -> _Term:
    where = f"rewards[{place}]"
    if not isinstance(entry, Mapping):
        raise TypeError(f"{where}: got {type(entry).__name__}, expected a name or a mapping with 'name' or 'callable'")
    name, path = entry.get("name"), entry.get("callable")
    if (name is None) == (path is None):
        raise ValueError(f"{where}: got the keys {sorted(entry)}, expected either 'name' or 'callable'")
    options = {key: value for key, value in entry.items() if key not in _ENTRY_KEYS}
    if path is not None:
        if options:
            raise ValueError(f"{where}: got unknown {_listed(options)}, expected {_listed(_ENTRY_KEYS)}")
        reward = _own(where, path, entry.get("arguments"))
        label = entry.get("label", str(path).rpartition(":")[2])
    else:
        if name not in BUILT_IN:
            raise ValueError(
                f"{where}: got unknown name {name!r}, expected one of {_listed(BUILT_IN)}; own code goes under "
                "'callable' as 'package.module:attribute'"
            )
        if "arguments" in entry:
            raise ValueError(f"{where}: got 'arguments' with 'name', expected the arguments of {name!r} beside it")
        _check_options(where, name, options)
        try:
            reward = BUILT_IN[name](**options)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{where} ({name}): {error}") from error
        label = entry.get("label", name)
    if not isinstance(label, str) or not label or "/" in label:
        raise ValueError(f"{where}: got label {label!r}, expected a text without '/'")
    return _Term(label, reward, _weight(where, entry.get("weight", 1.0)))


def _own(where: str, path: Any, arguments: Any) -> Reward:
    found = load_callable(path, f"{where}.callable")
    if arguments is not None and not isinstance(arguments, Mapping):
        raise TypeError(f"{where}: got {type(arguments).__name__} for 'arguments', expected a mapping")
    if arguments is not None or inspect.isclass(found):
        found = found(**(arguments or {}))
    if not callable(found):
        raise TypeError(f"{where}: {path!r} gives {type(found).__name__}, expected something that can be called")
    return found


def _check_options(where: str, name: str, options: Mapping[str, Any]) -> None:
    """Unknown keys, with what exists: the arguments of the class and, where it passes them on, of its bases."""
    kind: Any = BUILT_IN[name]
    known: list[str] = []
    for base in inspect.getmro(kind):
        if "__init__" not in vars(base) or base is object:
            continue
        parameters = inspect.signature(vars(base)["__init__"]).parameters.values()
        known += [p.name for p in parameters if p.kind is not p.VAR_KEYWORD and p.name not in ("self", *known)]
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    unknown = [key for key in options if key not in known]
    if unknown:
        raise ValueError(
            f"{where}: got unknown {_listed(unknown)} for {name!r}, expected some of {_listed(known)}, or weight, label"
        )


def _weight(where: str, weight: Any) -> float | Mapping[str, float]:
    if isinstance(weight, Mapping):
        if not weight:
            raise ValueError(f"{where}: got an empty weight, expected a number per name")
        return {str(name): _number(f"{where} weight of {name!r}", value) for name, value in weight.items()}
    return _number(f"{where} weight", weight)


def _number(where: str, value: Any) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
        raise ValueError(f"{where}: got {value!r}, expected a finite number")
    return float(value)


def _listed(names: Any) -> str:
    return ", ".join(names)
