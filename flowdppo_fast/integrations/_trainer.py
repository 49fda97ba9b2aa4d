"""Imports a trainer's module, or says in one sentence which trainer is missing."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any


def module_of(module: str, trainer: str, source: str) -> Any:
    """The imported ``module`` of ``trainer``.

    Raises:
        ImportError: the trainer is not installed, or its tree has no such module. A package that the trainer itself
            misses is reported by the trainer's own error.
    """
    root = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if missing == root:
            raise ImportError(
                f"this integration extends {trainer}, which is not installed (no package {root!r}); install it from "
                f"{source}, or use flowdppo_fast without an integration"
            ) from error
        if module == missing or module.startswith(missing + "."):
            raise ImportError(
                f"the installed {trainer} has no module {missing!r}, which this integration extends; install a tree "
                f"that has it from {source}"
            ) from error
        raise
