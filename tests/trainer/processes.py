"""Runs of the trainer in processes of their own: forked from a server that has imported everything already."""

from __future__ import annotations

import contextlib
import importlib.util
import multiprocessing
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

_WARM = (
    "deepspeed",
    "diffusers.models.transformers.transformer_sd3",
    "diffusers.models.transformers.transformer_flux",
    "diffusers.models.transformers.dit_transformer_2d",
    "diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3",
    "diffusers.pipelines.flux.pipeline_flux",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "pytest",
    "flowdppo_fast.trainer.trainer",
)

# what a launcher sets
SHARDINGS = {
    "whole": {},
    "fsdp2": {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"},
    **{
        f"zero{stage}": {
            "ACCELERATE_USE_DEEPSPEED": "true",
            "ACCELERATE_DEEPSPEED_ZERO_STAGE": f"{stage}",
            "ACCELERATE_DEEPSPEED_ZERO3_INIT": "false",
        }
        for stage in (1, 2, 3)
    },
}


def start(function: Callable[..., None], *args: Any, env: Mapping[str, str] | None = None) -> Any:
    """A process that runs ``function(*args)``; it is importable from a module of this folder."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(_WARM))
    process = context.Process(target=_child, args=(function, args, dict(env or {})), daemon=True)
    process.start()
    return process


def start_all(function: Callable[..., None], *args: Any, count: int, sharding: str = "whole") -> list[Any]:
    """``count`` processes of one run that holds its weights in a way of :data:`SHARDINGS`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count), "GLOO_SOCKET_IFNAME": "lo"}
    env |= SHARDINGS[sharding]
    return [start(function, *args, env=env | {"RANK": str(r), "LOCAL_RANK": str(r)}) for r in range(count)]


def join(processes: Sequence[Any], seconds: float = 90) -> list[int | None]:
    """Exit codes; None for a process that had to be killed after ``seconds``."""
    end = time.monotonic() + seconds
    codes: list[int | None] = []
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
        codes.append(process.exitcode)
        if process.exitcode is None:
            process.kill()
            process.join()
    return codes


def run(function: Callable[..., None], *args: Any, count: int = 1, sharding: str = "whole") -> None:
    """Runs ``function`` in ``count`` processes, which must all succeed."""
    processes = start_all(function, *args, count=count, sharding=sharding) if count > 1 else [start(function, *args)]
    codes = join(processes)
    assert codes == [0] * count, f"exit codes {codes}; see what the processes printed"


def builders() -> Any:
    """The pipelines of this folder's ``conftest.py``."""
    spec = importlib.util.spec_from_file_location("trainer_builders", Path(__file__).with_name("conftest.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with contextlib.suppress(ValueError):
        sys.path.remove(str(module.EXAMPLE))
    sys.path.insert(0, str(module.EXAMPLE))
    return module


def _child(function: Callable[..., None], args: tuple, env: dict[str, str]) -> None:
    import torch

    os.environ.update(env)
    torch.set_num_threads(1)
    try:
        function(*args)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        # no waiting for other processes at exit
        os._exit(1)
    sys.stdout.flush()
    os._exit(0)
