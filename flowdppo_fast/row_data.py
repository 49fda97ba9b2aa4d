"""A run's row log as arrays, and what clipping and masking make of the same rows.

A *row* is one sample at one denoising step in one update: its log-ratio ``L`` and its exact KL ``D`` to the policy
that drew it, here in nats over the whole latent. For noise that is independent of the change of the policy, ``L`` is
normal with the mean ``-D`` and the standard deviation ``sqrt(2*D)``; per element, as trainers log it,
``std(log r) = sqrt(2*D/N)`` (Flow-DPPO, arXiv 2606.11025, Sec. 3.2).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Rows:
    """All rows of a row log as flat arrays of one length.

    Attributes:
        iteration, update, step: integers; ``update`` counts the optimizer steps since the rollout.
        advantage: of the sample.
        log_ratio, kl: in nats over the whole latent (the logged means times N).
        kept: False where the bound removed the gradient.
        elements: N, latent elements per row.
    """

    iteration: np.ndarray
    update: np.ndarray
    step: np.ndarray
    advantage: np.ndarray
    log_ratio: np.ndarray
    kl: np.ndarray
    kept: np.ndarray
    elements: int

    def __len__(self) -> int:
        return len(self.kl)

    def where(self, chosen: np.ndarray) -> Rows:
        """The rows at which ``chosen`` is True."""
        return Rows(**{name: getattr(self, name)[chosen] for name in _ARRAYS}, elements=self.elements)

    @property
    def moved(self) -> Rows:
        """Rows after the first update of their rollout: before it the policies are one, with nothing to decide."""
        return self.where((self.update > 0) & (self.kl > 0))

    @property
    def noise(self) -> np.ndarray:
        """``(L + D) / sqrt(2*D)``: standard normal where the noise knows nothing of the change of the policy."""
        return (self.log_ratio + self.kl) / np.sqrt(2 * self.kl)

    @property
    def away(self) -> np.ndarray:
        """Where advantage and log-ratio have one sign: the next step would lead further from the old policy."""
        return self.advantage * self.log_ratio > 0


_ARRAYS = tuple(field.name for field in fields(Rows) if field.name != "elements")


def read_rows(path: Path) -> Rows:
    """The row log at ``path``.

    Raises:
        ValueError: no such file, an empty one, or lines that are no row log.
    """
    if not path.exists():
        raise ValueError(f"{path}: no row log there; a run writes one with run.row_log=true")
    columns: dict[str, list] = {name: [] for name in _ARRAYS}
    elements = 0
    for number, text in enumerate(path.read_text().splitlines(), 1):
        try:
            line = json.loads(text)
            elements, steps, samples = int(line["elements"]), line["steps"], len(line["advantage"])
            shape = (samples, len(steps))
            parts = (
                np.full(shape, line["iteration"]),
                np.full(shape, line["update"]),
                np.broadcast_to(steps, shape),
                np.broadcast_to(np.asarray(line["advantage"], float)[:, None], shape),
                np.asarray(line["log_ratio"], float).reshape(shape) * elements,
                np.asarray(line["kl"], float).reshape(shape) * elements,
                np.asarray(line["kept"], bool).reshape(shape),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}, line {number}: {error!r}, expected a line of a row log") from None
        for name, part in zip(_ARRAYS, parts):
            columns[name].append(part.reshape(-1))
    if not elements:
        raise ValueError(f"{path}: got no rows, expected a run of at least one iteration")
    return Rows(**{name: np.concatenate(columns[name]) for name in _ARRAYS}, elements=elements)


def clip_against_mask(rows: Rows, clip: float) -> dict[str, float] | None:
    """What a clip range (nats over the whole latent) drops, against the mask that drops as many of the same rows.

    Both rules only drop rows that move away; the clip where the log-ratio is large, the mask where the KL is. None if
    the clip drops nothing.

    Returns:
        ``dropped`` share of rows; ``threshold`` the KL (nats) with which the mask drops as many; ``spurious`` share of
        the dropped rows that are nearer than that by their exact KL (with equal numbers, as many farther rows are
        missed); ``kl_of_clipped_median`` and ``kl_of_masked_median``.
    """
    away = rows.away
    clipped = away & (np.abs(rows.log_ratio) > clip)
    count = int(clipped.sum())
    if count == 0:
        return None
    threshold = float(np.sort(rows.kl[away])[-count])
    masked = away & (rows.kl >= threshold)
    return {
        "dropped": count / len(rows),
        "threshold": threshold,
        "spurious": float((clipped & ~masked).sum() / count),
        "kl_of_clipped_median": float(np.median(rows.kl[clipped])),
        "kl_of_masked_median": float(np.median(rows.kl[masked])),
    }
