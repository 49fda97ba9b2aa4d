"""Checkpoints that are complete or absent: written to a temporary folder, synced, then renamed. No pickle anywhere."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

_PREFIX, _TEMPORARY, _STATE = "iteration-", ".writing-", "state.json"


def save_checkpoint(
    folder: Path, iteration: int, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any], keep: int
) -> Path:
    """Writes ``folder/iteration-XXXXXX`` and removes all but the newest ``keep`` checkpoints.

    Args:
        folder: where checkpoints live; made if absent.
        iteration: number of finished iterations.
        tensors: file name (without suffix) to named tensors, one safetensors file each.
        state: JSON-serialisable rest.
        keep: how many checkpoints stay, >= 1.
    """
    final = folder / f"{_PREFIX}{iteration:06d}"
    temporary = folder / f"{_TEMPORARY}{final.name}"
    for leftover in folder.glob(f"{_TEMPORARY}*"):
        shutil.rmtree(leftover)
    temporary.mkdir(parents=True)
    for name, named in tensors.items():
        path = temporary / f"{name}.safetensors"
        save_file({key: value.detach().cpu().contiguous() for key, value in named.items()}, path)
        _sync(path)
    path = temporary / _STATE
    path.write_text(json.dumps({**state, "iteration": iteration, "files": sorted(tensors)}))
    _sync(path)
    if final.exists():
        shutil.rmtree(final)
    os.replace(temporary, final)
    _sync(folder)
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return final


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first; folders without all their files are left out."""
    found = []
    for path in sorted(folder.glob(f"{_PREFIX}*")):
        state = path / _STATE
        if state.is_file() and all(
            (path / f"{n}.safetensors").is_file() for n in json.loads(state.read_text())["files"]
        ):
            found.append(path)
    return found


def load_checkpoint(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """What :func:`save_checkpoint` was given: tensors on the CPU, and the state with its ``iteration``."""
    state = json.loads((path / _STATE).read_text())
    return {name: load_file(path / f"{name}.safetensors") for name in state["files"]}, state


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: Iterable[str]) -> dict[str, Tensor]:
    """State of ``optimizer`` as ``parameter/entry`` tensors; ``names`` are its parameters', in order."""
    state = optimizer.state_dict()["state"]
    return {
        f"{name}/{key}": torch.as_tensor(value)
        for index, name in enumerate(names)
        for key, value in state.get(index, {}).items()
    }


def load_optimizer(optimizer: torch.optim.Optimizer, names: Iterable[str], tensors: dict[str, Tensor]) -> None:
    """The inverse of :func:`optimizer_tensors`; hyper-parameters stay as the optimizer was built."""
    index = {name: position for position, name in enumerate(names)}
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        parameter, _, key = name.rpartition("/")
        state.setdefault(index[parameter], {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def random_state() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """States of torch's, numpy's and python's global generators (a pipeline or reward may draw from them)."""
    tensors = {"torch": torch.get_rng_state()}
    tensors |= {f"cuda{index}": state for index, state in enumerate(torch.cuda.get_rng_state_all())}
    kind, keys, *rest = np.random.get_state(legacy=True)
    version, internal, gauss = random.getstate()
    return tensors, {"numpy": [kind, np.asarray(keys).tolist(), *rest], "python": [version, list(internal), gauss]}


def load_random_state(tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Restores what :func:`random_state` returned."""
    torch.set_rng_state(tensors["torch"])
    for index in range(torch.cuda.device_count()):
        if f"cuda{index}" in tensors:
            torch.cuda.set_rng_state(tensors[f"cuda{index}"], index)
    np.random.set_state(tuple(state["numpy"]))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
