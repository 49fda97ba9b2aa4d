"""What an image processor of transformers does to PIL images, in torch, on the device that the images are on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .images import to_arrays, to_bytes

Preprocess = Literal["torch", "processor"]
# bits after the point of Pillow's weights; a weighted sum of bytes fits into 32 bits
_FRACTION_BITS = 22
# settings that would change the result and are not done here
_UNSUPPORTED = ("crop_pct", "do_pad", "do_thumbnail", "do_align_long_axis", "do_reduce_labels", "do_flip_channel_order")


class Preprocessor:
    """Resizes, crops in the centre and normalises as an image processor of transformers with Pillow does.

    Images are rounded to bytes first and resized as Pillow does it, in the same integers, so that all bytes are the
    same; the normalised numbers differ by float32 rounding. The width is resized before the height; Pillow from 13 on
    begins with the height where that shrinks far more than the width, and then bytes may differ by rounding.

    Args:
        settings: of an image processor (``processor.to_dict()``).

    Raises:
        ValueError: settings that are not supported; ``preprocess="processor"`` runs the processor itself.
    """

    def __init__(self, settings: Mapping[str, Any]):
        wrong = [key for key in _UNSUPPORTED if settings.get(key)]
        size = dict(settings.get("size") or {})
        if settings.get("do_resize") and set(size) not in ({"shortest_edge"}, {"height", "width"}):
            wrong.append(f"size={size}")
        if settings.get("do_resize") and settings.get("resample") not in _FILTERS:
            wrong.append(f"resample={settings.get('resample')}")
        if wrong:
            raise ValueError(
                f"preprocess: got an image processor with {', '.join(wrong)}, expected one that resizes (bilinear or "
                "bicubic), crops in the centre and normalises; preprocess='processor' runs it as it is, on the CPU"
            )
        self.size = size if settings.get("do_resize") else None
        self.resample = 0 if self.size is None else int(settings["resample"])
        self.crop = dict(settings["crop_size"]) if settings.get("do_center_crop") else None
        self.scale = float(settings.get("rescale_factor", 1 / 255)) if settings.get("do_rescale", True) else 1.0
        normalise = settings.get("do_normalize", True)
        self.mean = tuple(settings["image_mean"]) if normalise else (0.0,) * 3
        self.std = tuple(settings["image_std"]) if normalise else (1.0,) * 3

    def __call__(self, pixels: Tensor) -> Tensor:
        """``[N, C, H, W]`` in [0, 1] to float32 ``[N, 3, height, width]``, as a network takes it."""
        levels = to_bytes(pixels).int()
        if self.size is not None:
            levels = self._resize(levels, *self._target(*levels.shape[-2:]))
        if self.crop is not None:
            levels = _centre_crop(levels, self.crop["height"], self.crop["width"])
        levels = levels.expand(-1, 3, -1, -1)
        mean, std = (torch.tensor(v, device=levels.device).view(1, 3, 1, 1) for v in (self.mean, self.std))
        return (levels * self.scale - mean) / std

    def _target(self, height: int, width: int) -> tuple[int, int]:
        assert self.size is not None
        if "height" in self.size:
            return self.size["height"], self.size["width"]
        edge = self.size["shortest_edge"]
        if width <= height:
            return int(edge * height / width), edge
        return edge, int(edge * width / height)

    def _resize(self, levels: Tensor, height: int, width: int) -> Tensor:
        # the order matters, because each direction is rounded to bytes
        levels = _resize_last(levels, width, self.resample)
        return _resize_last(levels.transpose(-1, -2), height, self.resample).transpose(-1, -2)


def _bilinear(x: Tensor) -> Tensor:
    return (1 - x.abs()).clamp_min(0)


def _bicubic(x: Tensor) -> Tensor:
    """The cubic convolution filter of Keys (1981) with a = -1/2."""
    x = x.abs()
    inner, outer = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, inner, torch.where(x < 2, outer, 0.0))


# by Pillow's numbers: the filter and how far it reaches
_FILTERS: dict[int, tuple[Callable[[Tensor], Tensor], float]] = {2: (_bilinear, 1.0), 3: (_bicubic, 2.0)}


@lru_cache(maxsize=32)
def _weights(before: int, after: int, resample: int) -> tuple[Tensor, Tensor]:
    """Fixed-point weights ``[taps, after]`` and the pixels that they are for, of a resize that widens the filter."""
    function, reach = _FILTERS[resample]
    ratio = before / after
    stretch = max(ratio, 1.0)
    centre = (torch.arange(after, dtype=torch.float64) + 0.5) * ratio
    first = (centre - reach * stretch + 0.5).to(torch.int64).clamp_min(0)
    last = (centre + reach * stretch + 0.5).to(torch.int64).clamp_max(before)
    place = first + torch.arange(int((last - first).max()))[:, None]
    weight = torch.where(place < last, function((place - centre + 0.5) * (1 / stretch)), 0.0)
    weight = weight / weight.sum(0)
    fixed = weight * 2**_FRACTION_BITS
    # halves go away from zero
    return (fixed.abs() + 0.5).floor().copysign(fixed).to(torch.int32), place.clamp_max(before - 1)


def _resize_last(levels: Tensor, size: int, resample: int) -> Tensor:
    """int32 bytes resized along the last dimension."""
    before = levels.shape[-1]
    if before == size:
        return levels
    weight, place = (entry.to(levels.device) for entry in _weights(before, size, resample))
    total = torch.full((*levels.shape[:-1], size), 1 << (_FRACTION_BITS - 1), dtype=torch.int32, device=levels.device)
    for factor, pixel in zip(weight, place):
        total += factor * levels[..., pixel]
    return (total >> _FRACTION_BITS).clamp(0, 255)


def prepare(
    pixels: Tensor, processor: Any, preprocess: Preprocess, own: Preprocessor | None, device: torch.device
) -> Tensor:
    """``[N, C, H, W]`` pixels as the input of a network, float32 on ``device``: by ``own``, or by the processor."""
    if preprocess == "torch":
        assert own is not None
        return own(pixels.to(device))
    arrays = to_arrays(pixels.expand(-1, 3, -1, -1))
    return processor(images=list(arrays), return_tensors="pt", input_data_format="channels_last")["pixel_values"].to(
        device=device, dtype=torch.float32
    )


def _centre_crop(levels: Tensor, height: int, width: int) -> Tensor:
    """The middle ``height`` x ``width`` pixels; where there are fewer, black is put around them."""
    rows, columns = levels.shape[-2:]
    missing: Sequence[int] = (max(height - rows, 0), max(width - columns, 0))
    if any(missing):
        # the larger half of an odd rest goes to the top and to the left
        top, left = (missing[0] + 1) // 2, (missing[1] + 1) // 2
        levels = F.pad(levels, (left, missing[1] - left, top, missing[0] - top))
        rows, columns = levels.shape[-2:]
    top, left = (rows - height) // 2, (columns - width) // 2
    return levels[..., top : top + height, left : left + width]
