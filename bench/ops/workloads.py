"""Latent sizes of the models people train, by name."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Workload:
    """Rows of latents.

    Args:
        name: model and resolution.
        rows: ``(B,)``, or ``(B, S)`` for several denoising steps replayed together.
        latent: shape of one row.
        core: also measured where time is short (``--quick`` on a GPU, slow compile modes, ratio clipping compiled).
        cpu_default: part of a default CPU run; the others take minutes per contender on a small machine.
    """

    name: str
    rows: tuple[int, ...]
    latent: tuple[int, ...]
    core: bool = False
    cpu_default: bool = True

    @property
    def key(self) -> str:
        return f"{self.name}/{'x'.join(map(str, self.rows))}"

    @property
    def row_count(self) -> int:
        return math.prod(self.rows)

    @property
    def elements_per_row(self) -> int:
        return math.prod(self.latent)

    @property
    def elements(self) -> int:
        return self.row_count * self.elements_per_row


# so few elements that a call costs what its bookkeeping costs: it stands for host time on a CPU, where a GPU run
# measures that at every size
OVERHEAD = Workload("overhead", (8,), (16, 8, 8))

WORKLOADS: tuple[Workload, ...] = (
    OVERHEAD,
    Workload("sd3-512", (8,), (16, 64, 64)),
    Workload("sd3-512", (16,), (16, 64, 64), core=True),
    Workload("sd3-1024", (8,), (16, 128, 128)),
    Workload("flux-1024", (16,), (4096, 64), core=True),
    Workload("flux2-1024", (8,), (4096, 128)),
    Workload("wan-480p", (4,), (16, 21, 60, 104)),
    Workload("wan-480p", (8,), (16, 21, 60, 104), core=True, cpu_default=False),
    Workload("hunyuan-720p", (4,), (16, 33, 90, 160), cpu_default=False),
    Workload("hunyuan-720p", (16,), (16, 33, 90, 160), cpu_default=False),
    Workload("stacked", (8, 3), (16, 64, 64)),
)

# ragged sizes for a memory and race checker, far too small to time
SMOKE = (
    Workload("smoke", (3,), (5, 7, 11)),
    Workload("smoke", (2, 3), (4, 33, 33)),
    Workload("smoke", (9,), (16, 16, 16)),
)

CPU_QUICK = ("overhead/8", "sd3-512/8", "sd3-1024/8")


def select(names: Sequence[str], device_type: str, quick: bool) -> list[Workload]:
    """Workloads by key (``sd3-512/8``), by name (``sd3-512``: all its row counts), ``all`` or ``default``.

    Raises:
        ValueError: an unknown name.
    """
    if list(names) == ["all"]:
        return list(WORKLOADS)
    if list(names) == ["default"]:
        if device_type == "cpu":
            return [w for w in WORKLOADS if (w.key in CPU_QUICK if quick else w.cpu_default)]
        return [w for w in WORKLOADS if w is not OVERHEAD and (w.core or not quick)]
    chosen = []
    for name in names:
        found = [w for w in WORKLOADS if name in (w.name, w.key)]
        if not found:
            known = ", ".join(w.key for w in WORKLOADS)
            raise ValueError(f"workloads: got {name!r}, expected 'default', 'all' or any of {known}")
        chosen += [w for w in found if w not in chosen]
    return chosen
