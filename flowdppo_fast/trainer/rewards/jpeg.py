"""How well images compress as JPEG: the rewards of DDPO (arXiv 2305.13301, Sec. 5.1) that need no model."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from .images import DEFAULT_FRAMES, check_all_positive, encode, scored_pixels, to_arrays


class JPEGIncompressibility:
    """Size of the image as a JPEG file in kB (1000 bytes), float32 ``[B]``; the mean over frames for videos.

    Args:
        quality: of the JPEG encoder, 1 to 100.
        threads: images that are encoded at the same time.
        frames: frames of a video that are encoded (:func:`~.images.select_frames`).

    Raises:
        ValueError: settings out of range; and as :func:`~.images.scored_pixels` when called.
    """

    sign = 1.0

    def __init__(self, quality: int = 95, *, threads: int = 4, frames: int = DEFAULT_FRAMES):
        check_all_positive(threads=threads, frames=frames)
        if not 1 <= quality <= 100:
            raise ValueError(f"quality: got {quality}, expected 1 to 100")
        self.quality, self.threads, self.frames = quality, threads, frames

    def __call__(self, images: Any, prompts: Sequence[Any], metadata: Sequence[dict] | None = None) -> Tensor:
        arrays = to_arrays(scored_pixels(images, prompts, self.frames))
        flat = arrays.reshape(-1, *arrays.shape[2:])
        with ThreadPoolExecutor(min(self.threads, len(flat))) as pool:
            sizes = list(pool.map(lambda array: len(encode(array, "JPEG", self.quality)), flat))
        kilobytes = torch.tensor(sizes, dtype=torch.float64).view(arrays.shape[:2]).mean(1) / 1000
        return (self.sign * kilobytes).float()


class JPEGCompressibility(JPEGIncompressibility):
    """Minus the size of the image as a JPEG file in kB: smooth images score higher.

    Arguments are those of :class:`JPEGIncompressibility`.
    """

    sign = -1.0
