"""What the benchmarks' command lines share."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .ops.devices import Device


def open_named(kind: str) -> Device:
    """The device of ``--device``; ``auto`` is a GPU if there is one."""
    import torch

    from .ops.devices import open_device

    return open_device(("cuda" if torch.cuda.is_available() else "cpu") if kind == "auto" else kind)


def recorded(program: str, arguments: list[str]) -> str:
    """The command line for the record, without where its output went."""
    kept, skip = [], False
    for argument in arguments:
        if skip or argument.startswith("--output"):
            skip = argument == "--output"
            continue
        kept.append(argument)
    return shlex.join(["python", "-m", program, *kept])
