"""OpenMP settings that keep timings honest; they must be there before torch is imported."""

from __future__ import annotations

import os
import sys

# idle workers sleep instead of spinning: on a machine with a busy neighbour a spinning team turns every parallel
# region into a multiple of the scheduler's time slice
SETTINGS = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}


def quiet() -> bool:
    """Whether this process runs, or will run, under :data:`SETTINGS`."""
    return all(os.environ.get(name, "").upper() == value for name, value in SETTINGS.items())


def prepare() -> None:
    """Sets :data:`SETTINGS` for this process.

    Raises:
        RuntimeError: torch is loaded already, so its OpenMP runtime has read other settings.
    """
    # the profiler greets every session on stderr
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    if quiet():
        return
    if "torch" in sys.modules:
        wanted = " ".join(f"{name}={value}" for name, value in SETTINGS.items())
        raise RuntimeError(
            f"torch was imported before the benchmark could set {wanted}; its timings would be of waiting threads. "
            f"Start the process with these settings: {wanted} python ..."
        )
    os.environ.update(SETTINGS)
