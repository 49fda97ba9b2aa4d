"""Own code that settings name: ``package.module:attribute``, and nothing else."""

from __future__ import annotations

import os
import pkgutil
import re
import sys
from typing import Any

# narrower than pkgutil's own form, in which a module alone is a name too
_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


def check_callable(name: Any, where: str) -> None:
    """Raises ``ValueError`` where ``name`` is not of the form ``package.module:attribute``; nothing is imported."""
    if not (isinstance(name, str) and _NAME.fullmatch(name)):
        raise ValueError(f"{where}: got {name!r}, expected package.module:attribute")


def load_callable(name: Any, where: str = "callable") -> Any:
    """What ``package.module:attribute`` names; its module is imported.

    Raises:
        ValueError: not of that form, or nothing there; ``where`` is the setting that is named.
    """
    check_callable(name, where)
    try:
        return pkgutil.resolve_name(name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{where}: got {name!r}, which cannot be imported ({error})") from error


def search_working_directory() -> None:
    """Makes modules in the working directory importable, as ``python -m`` does."""
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.insert(0, os.getcwd())
