"""Checkpoints that are complete or absent: written to a temporary folder, synced, then renamed. No pickle anywhere."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.logging import get_logger
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

logger = get_logger(__name__)

_PREFIX, _STATE, _SEAL = "iteration-", "state.json", "sha256"
# what a state file may name: files beside it
_NAME = re.compile(r"[a-z]+(-\d+)?")
# names of folders that are being written, removed, or were replaced by one of the same iteration
_WRITING, _REMOVING, _REPLACED = ".writing-", ".removing-", ".replaced-"


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

    Raises:
        RuntimeError: the files cannot be written (disk full, folder read-only); earlier checkpoints are as they were.
    """
    final = checkpoint_path(folder, iteration)
    temporary = folder / f"{_WRITING}{final.name}"
    try:
        remove_leftovers(folder)
        temporary.mkdir(parents=True)
        files = {}
        for name, named in tensors.items():
            path = temporary / f"{name}.safetensors"
            save_file({key: value.detach().cpu().contiguous() for key, value in named.items()}, path)
            files[name] = {"bytes": path.stat().st_size, "sha256": _digest(path)}
            _sync(path)
        path = temporary / _STATE
        path.write_text(_sealed({**state, "iteration": iteration, "files": files}))
        _sync(path)
        _sync(temporary)
        if final.exists():
            final.rename(folder / f"{_REPLACED}{final.name}")
        os.replace(temporary, final)
        _sync(folder)
        remove_old(final, keep)
    except (OSError, SafetensorError) as cause:
        shutil.rmtree(temporary, ignore_errors=True)
        kept = checkpoints(folder)
        raise RuntimeError(
            f"run.output_dir: the checkpoint of iteration {iteration} could not be written to {folder} ({cause}); the "
            f"last complete one is {kept[-1].name if kept else 'none'}; make room and continue with resume=True"
        ) from cause
    return final


def checkpoint_path(folder: Path, iteration: int) -> Path:
    """Where :func:`save_checkpoint` puts the checkpoint of ``iteration``."""
    return folder / f"{_PREFIX}{iteration:06d}"


def remove_leftovers(folder: Path) -> None:
    """Removes what a killed process left; a checkpoint that was about to be replaced comes back."""
    for leftover in folder.glob(f"{_REPLACED}*"):
        original = folder / leftover.name.removeprefix(_REPLACED)
        if original.exists():
            shutil.rmtree(leftover)
        else:
            leftover.rename(original)
    for prefix in (_WRITING, _REMOVING):
        for leftover in folder.glob(f"{prefix}*"):
            shutil.rmtree(leftover)


def remove_old(newest: Path, keep: int) -> None:
    """Removes what is older than ``newest`` and the ``keep - 1`` checkpoints before it."""
    # one that is newer is damaged, and no reason to remove a good one
    for old in [path for path in checkpoints(newest.parent) if path.name <= newest.name][:-keep]:
        old.rename(old.with_name(f"{_REMOVING}{old.name}"))
    remove_leftovers(newest.parent)


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoints that have all their files in their full size, oldest first."""
    return [path for path in sorted(folder.glob(f"{_PREFIX}*")) if _state_and_fault(path)[1] is None]


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint whose files are what was written, down to the last bit; None where there is none at all.

    Damaged ones are passed over with a warning.

    Raises:
        RuntimeError: all are damaged.
    """
    found = sorted(folder.glob(f"{_PREFIX}*"), reverse=True)
    for path in found:
        state, fault = _state_and_fault(path)
        for name, file in state["files"].items() if fault is None else ():
            if _digest(path / f"{name}.safetensors") != file["sha256"]:
                fault = f"{name}.safetensors is not what was written"
        if fault is None:
            return path
        logger.warning("checkpoint %s is damaged and passed over: %s", path, fault)
    if found:
        raise RuntimeError(
            f"run.output_dir: all {len(found)} checkpoints in {folder} are damaged, expected a complete one; restore "
            "them from a copy, or start a new run in another folder"
        )
    return None


def load_checkpoint(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """What :func:`save_checkpoint` was given: tensors on the CPU, and the state with its ``iteration``.

    Raises:
        RuntimeError: a file is not of the safetensors format.
    """
    state = load_state(path)
    try:
        return {name: load_file(path / f"{name}.safetensors") for name in state["files"]}, state
    except SafetensorError as error:
        raise RuntimeError(f"run.output_dir: {path} cannot be read ({error}), expected safetensors files") from None


def load_state(path: Path) -> dict[str, Any]:
    """The state alone, without tensors.

    Raises:
        OSError: there is none. ValueError: it is no JSON, or not what was written.
    """
    state = json.loads((path / _STATE).read_text())
    # a state of an older version has none
    digest = state.pop(_SEAL, None)
    if digest is not None and digest != hashlib.sha256(json.dumps(state).encode()).hexdigest():
        raise ValueError(f"{path / _STATE} is not what was written")
    return state


def _sealed(state: dict[str, Any]) -> str:
    """The state as JSON, with a digest of the rest of it."""
    read_back = json.loads(json.dumps(state))
    return json.dumps({**read_back, _SEAL: hashlib.sha256(json.dumps(read_back).encode()).hexdigest()})


def _state_and_fault(path: Path) -> tuple[dict[str, Any], str | None]:
    """The state, and what is missing; the contents of the tensors are not read."""
    try:
        state = load_state(path)
        for name, file in state["files"].items():
            if not _NAME.fullmatch(name):
                return state, f"{_STATE} names {name!r}, which is no file of a checkpoint"
            size = (path / f"{name}.safetensors").stat().st_size
            if size != file["bytes"]:
                return state, f"{name}.safetensors has {size} bytes, expected {file['bytes']}"
    except OSError as error:
        return {}, str(error)
    except (ValueError, KeyError, AttributeError, TypeError):
        return {}, f"{_STATE} cannot be read, or is not what was written"
    return state, None


def optimizer_values(optimizer: torch.optim.Optimizer) -> dict[str, list[Tensor]]:
    """State of ``optimizer`` by entry, one value for each of its parameters, in order; empty before its first step."""
    state = optimizer.state_dict()["state"]
    return {key: [torch.as_tensor(state[index][key]) for index in sorted(state)] for key in state.get(0, {})}


def load_optimizer(optimizer: torch.optim.Optimizer, values: dict[str, list[Tensor]]) -> None:
    """The inverse of :func:`optimizer_values`; hyper-parameters stay as the optimizer was built."""
    count = len(next(iter(values.values()), ()))
    state = {index: {key: entries[index] for key, entries in values.items()} for index in range(count)}
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


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    """Returns when a file or the entries of a folder are on the disk, as far as the file system has a call for it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # some network and FUSE mounts have none for folders
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF)):
            raise
    finally:
        os.close(descriptor)
