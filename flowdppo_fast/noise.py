"""Counter-based Gaussian noise: a seed and a stream number per row stand in for a stored noise tensor.

Definition (the same draws in the reference, C++, CUDA and Triton): element ``i`` of a row with stream ``t`` takes word
``i % 4`` of ``z0..z3``, where the four Philox4x32-7 words ``w0..w3`` for key ``(seed_lo, seed_hi)`` and counter
``(block_lo, block_hi, t_lo, t_hi)``, ``block = i // 4``, are turned into normals in two Box-Muller pairs::

    u = float32(float32(w0) * 2**-32 + 2**-33)        turns = w1 * 2**-32
    z0 = sqrt(-2 * log(u)) * cos(2*pi*turns)          z1 = sqrt(-2 * log(u)) * sin(2*pi*turns)

and ``z2, z3`` likewise from ``w2, w3``. All backends see the same ``u``, because it is rounded to float32; it goes from
2**-33 (6.76 standard deviations) to 1. Normals are within 4 float32 ulp of this on a CPU, within 4 float32 eps of the
radius on AMD GPUs, and within 1e-5 on NVIDIA's, which take approximate logarithms, sines and cosines from hardware.
Philox and its number of rounds: Salmon et al., SC 2011, where 7 are the fewest of Philox4x32 that pass BigCrush.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from .layout import expand_to_rows

if TYPE_CHECKING:
    from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 7


@dataclass(frozen=True)
class PhiloxNoise:
    """Noise that kernels regenerate instead of reading.

    Args:
        seed: 64-bit key, one per run or rollout.
        stream: which stream each row reads: an int ``t`` (row ``r`` reads stream ``t + r``) or an int64 tensor shaped
            like the rows. Use a tensor where rows are shuffled or taken apart after the rollout, so that every row
            keeps its draws.

    Raises:
        TypeError: ``seed`` is no int, or ``stream`` neither an int nor an int64 tensor.
    """

    seed: int
    stream: int | Tensor = 0

    def __post_init__(self) -> None:
        if not isinstance(self.seed, int):
            raise TypeError(f"seed: got {type(self.seed).__name__}, expected an int (the 64-bit key)")
        if isinstance(self.stream, torch.Tensor):
            if self.stream.dtype != torch.int64:
                raise TypeError(f"stream: got a {self.stream.dtype} tensor, expected torch.int64")
        elif not isinstance(self.stream, int):
            raise TypeError(f"stream: got {type(self.stream).__name__}, expected an int or an int64 tensor")

    def materialize(self, shape: tuple[int, ...], *, row_dims: int = 1, device=None, dtype=torch.float32) -> Tensor:
        """The noise as a tensor of ``shape`` whose first ``row_dims`` dims are rows (plain torch, any device)."""
        rows = math.prod(shape[:row_dims])
        if isinstance(self.stream, torch.Tensor):
            streams = self.stream.to(device).expand(shape[:row_dims]).reshape(-1)
        else:
            streams = torch.arange(self.stream, self.stream + rows, dtype=torch.int64, device=device)
        numel = math.prod(shape[row_dims:])
        return philox_normal(self.seed, streams, numel).to(dtype).reshape(shape)

    def kernel_source(self, rows: tuple[int, ...], device: torch.device) -> tuple[Tensor | None, int, int]:
        """``(streams, seed, first_stream)`` as the operators take them: ``[R]`` streams, or None and the first one.

        Raises:
            ValueError: a stream tensor on another device, or one that does not broadcast to ``rows``.
        """
        seed = _signed_seed(self.seed)
        if not isinstance(self.stream, torch.Tensor):
            return None, seed, self.stream
        if self.stream.device != device:
            raise ValueError(f"noise: got streams on {self.stream.device}, expected {device} like the latents")
        return expand_to_rows(self.stream, "noise", rows).reshape(-1).contiguous(), seed, 0


def _signed_seed(seed: int) -> int:
    # operator schemas carry signed 64-bit integers; most seeds are, and symbolic ones cannot be masked
    if -(1 << 63) <= seed < 1 << 63:
        return seed
    seed &= 0xFFFFFFFFFFFFFFFF
    return seed - (1 << 64) if seed >> 63 else seed


def _mul_hi_lo(a: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    # int64 wraps modulo 2**64, so both halves of the unsigned 32x32 product are right after masking
    product = a * multiplier
    return (product >> 32) & _MASK, product & _MASK


def philox_words(seed: int, streams: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-7 words as int64 tensors in [0, 2**32); ``streams`` and ``blocks`` broadcast against each other."""
    c0, c1, c2, c3 = torch.broadcast_tensors(
        blocks & _MASK, (blocks >> 32) & _MASK, streams & _MASK, (streams >> 32) & _MASK
    )
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(_ROUNDS):
        hi0, lo0 = _mul_hi_lo(c0, _MULTIPLIERS[0])
        hi1, lo1 = _mul_hi_lo(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def philox_normal(seed: int, streams: Tensor, numel: int) -> Tensor:
    """``[R, numel]`` float64 standard normals for ``[R]`` int64 ``streams`` (module docstring has the definition)."""
    blocks = torch.arange((numel + 3) // 4, dtype=torch.int64, device=streams.device)
    words = philox_words(seed, streams[:, None], blocks[None, :])
    normals = []
    for radius_word, angle_word in (words[:2], words[2:]):
        uniform = radius_word.float() * 2.0**-32 + 2.0**-33
        radius = torch.sqrt(-2.0 * torch.log(uniform.double()))
        angle = angle_word.double() * (2.0**-32 * 2.0 * math.pi)
        normals += [radius * torch.cos(angle), radius * torch.sin(angle)]
    return torch.stack(normals, dim=-1).flatten(1)[:, :numel]
