"""Minimal stand-ins of the trainers' interfaces: registries, base classes, dataclass fields and keys, no mathematics.

Each module builds the trainer's packages and puts them into ``sys.modules`` for the time of a test; what is here is
what the integrations rely on, so a name that a trainer changes has to be changed here, and then breaks a test.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import types
from collections.abc import Iterator


def module(name: str, **members) -> types.ModuleType:
    """A module object; classes and functions among ``members`` take its name."""
    made = types.ModuleType(name)
    for key, value in members.items():
        if hasattr(value, "__module__"):
            value.__module__ = name
        setattr(made, key, value)
    return made


@contextlib.contextmanager
def installed(modules: list[types.ModuleType], integration: str) -> Iterator[types.ModuleType]:
    """``integration`` freshly imported on top of ``modules``, which are importable packages meanwhile."""
    names = {made.__name__: made for made in modules}
    for name in list(names):
        parts = name.split(".")
        for depth in range(1, len(parts)):
            names.setdefault(".".join(parts[:depth]), types.ModuleType(".".join(parts[:depth])))
    before = {name: sys.modules.get(name) for name in (*names, integration)}
    package, _, leaf = integration.rpartition(".")
    for name, made in names.items():
        # a package, as far as the import system asks
        made.__path__ = []
        sys.modules[name] = made
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(names[parent], child, made)
    sys.modules.pop(integration, None)
    try:
        yield importlib.import_module(integration)
    finally:
        # from-imports look at the package before they look at sys.modules
        vars(importlib.import_module(package)).pop(leaf, None)
        for name, made in before.items():
            if made is None:
                sys.modules.pop(name, None)
            else:
                sys.modules[name] = made
