"""Images of any kind that a diffusers pipeline returns, as one tensor; frames of videos; encoded files."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

# frames of a video that are scored when nothing else is said
DEFAULT_FRAMES = 4

_EXPECTED = (
    "expected images [B, C, H, W] or videos [B, F, C, H, W] as tensors, [B, H, W, C] or [B, F, H, W, C] as numpy "
    "arrays, or PIL images, with 1 or 3 channels"
)


def to_pixels(images: Any) -> Tensor:
    """Images or videos as a float32 tensor ``[B, F, C, H, W]`` in [0, 1]; F is 1 for images.

    Args:
        images: what a pipeline returns for ``output_type`` ``"pt"`` (channels first), ``"np"`` (channels last) or
            ``"pil"``: a tensor, an array, or a list of tensors, arrays, PIL images or (videos) lists of PIL images.
            Floating point in [0, 1], or uint8 in 0..255. PIL images are RGB unless all of them are grey.

    Returns:
        A tensor on the images' device. One pass over the pixels checks their range, which waits for the device.

    Raises:
        TypeError: something else. ValueError: another shape, or pixels that are outside [0, 1] or not finite.
    """
    if isinstance(images, (list, tuple)):
        images = _stack(images)
    if isinstance(images, np.ndarray):
        if images.ndim in (4, 5):
            images = np.moveaxis(images, -1, -3)
        images = torch.from_numpy(np.ascontiguousarray(images))
    if not isinstance(images, Tensor):
        raise TypeError(f"images: got {type(images).__name__}, {_EXPECTED}")
    if images.ndim not in (4, 5) or images.shape[-3] not in (1, 3) or 0 in images.shape:
        raise ValueError(f"images: got shape {list(images.shape)} (channels first), {_EXPECTED}")
    pixels = images.detach()
    if pixels.dtype == torch.uint8:
        pixels = pixels.float() / 255
    elif pixels.is_floating_point():
        pixels = pixels.float()
        _check_range(pixels)
    else:
        raise TypeError(f"images: got {pixels.dtype}, expected floating point in [0, 1] or uint8")
    return pixels if pixels.ndim == 5 else pixels.unsqueeze(1)


def scored_pixels(images: Any, prompts: Sequence[Any], frames: int) -> Tensor:
    """:func:`to_pixels` with one prompt per image, and at most ``frames`` frames of each video.

    Raises:
        ValueError: not one prompt per image; and as :func:`to_pixels`.
    """
    pixels = to_pixels(images)
    if len(prompts) != len(pixels):
        raise ValueError(f"prompts: got {len(prompts)} for {len(pixels)} images, expected one per image")
    return select_frames(pixels, frames)


def select_frames(pixels: Tensor, count: int) -> Tensor:
    """The middle frames of ``count`` equal parts of each video; all frames of a shorter one.

    Args:
        pixels: ``[B, F, C, H, W]``.

    Returns:
        ``[B, min(F, count), C, H, W]``.
    """
    total = pixels.shape[1]
    if total <= count:
        return pixels
    chosen = [(2 * part + 1) * total // (2 * count) for part in range(count)]
    return torch.stack([pixels[:, frame] for frame in chosen], dim=1)


def to_bytes(pixels: Tensor) -> Tensor:
    """Pixels in [0, 1] as uint8, rounded as diffusers does for PIL images."""
    return (pixels * 255).round().to(torch.uint8)


def to_arrays(pixels: Tensor) -> np.ndarray:
    """``[B, F, C, H, W]`` pixels as uint8 ``[B, F, H, W, C]`` on the host."""
    return np.ascontiguousarray(to_bytes(pixels).movedim(-3, -1).cpu().numpy())


def encode(array: np.ndarray, kind: str, quality: int = 95) -> bytes:
    """A uint8 ``[H, W, C]`` array as a ``"PNG"`` or ``"JPEG"`` file; grey for one channel.

    Args:
        quality: of a JPEG file, 1 to 100; colours are subsampled 4:2:0, Pillow's default.
    """
    image = Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)
    buffer = io.BytesIO()
    # level 1 is several times faster than Pillow's default; the pixels are the same
    options = {"quality": quality} if kind == "JPEG" else {"compress_level": 1}
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def check_texts(prompts: Sequence[Any]) -> None:
    """Raises TypeError for the first of ``prompts`` that is no text."""
    wrong = next((place for place, prompt in enumerate(prompts) if not isinstance(prompt, str)), None)
    if wrong is not None:
        raise TypeError(
            f"prompts: got {type(prompts[wrong]).__name__} for sample {wrong}, expected a text; a prompt that is "
            "given as embeddings takes one under 'text'"
        )


def check_all_positive(**values: int | float) -> None:
    """Raises ValueError for the first of ``values`` that is not > 0."""
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{name}: got {value!r}, expected a number > 0")


def _check_range(pixels: Tensor) -> None:
    low, high = torch.stack(torch.aminmax(pixels)).tolist()
    # NaN fails both comparisons
    if low >= 0 and high <= 1:
        return
    bad = (~((pixels >= 0) & (pixels <= 1))).flatten(1).any(1).nonzero().flatten().tolist()
    raise ValueError(
        f"images: sample {bad[0]} ({len(bad)} of {len(pixels)}) has pixels that are outside [0, 1] or not finite "
        f"(smallest {low:g}, largest {high:g}), expected values in [0, 1], NaN for none of them; "
        "a pipeline's images in [-1, 1] are x / 2 + 0.5"
    )


def _stack(images: Sequence[Any]) -> np.ndarray | Tensor:
    if not len(images):
        raise ValueError(f"images: got an empty list, {_EXPECTED}")
    first = images[0]
    if isinstance(first, Image.Image):
        return _stack_pil(images, [len(images)])
    if isinstance(first, (list, tuple)) and first and all(isinstance(video, (list, tuple)) for video in images):
        lengths = {len(video) for video in images}
        if len(lengths) > 1:
            raise ValueError(f"images: got videos of {sorted(lengths)} frames, expected the same number in each")
        return _stack_pil([frame for video in images for frame in video], [len(images), len(first)])
    kinds = {type(image) for image in images}
    if kinds not in ({np.ndarray}, {Tensor}):
        raise TypeError(f"images: got a list of {', '.join(sorted(kind.__name__ for kind in kinds))}, {_EXPECTED}")
    shapes = {tuple(image.shape) for image in images}
    if len(shapes) > 1:
        raise ValueError(f"images: got shapes {sorted(shapes)}, expected the same for all")
    return torch.stack(list(images)) if isinstance(first, Tensor) else np.stack(list(images))


def _stack_pil(images: Sequence[Any], leading: list[int]) -> np.ndarray:
    wrong = next((image for image in images if not isinstance(image, Image.Image)), None)
    if wrong is not None:
        raise TypeError(f"images: got a list with {type(wrong).__name__}, expected PIL images only")
    sizes = {image.size for image in images}
    if len(sizes) > 1:
        raise ValueError(f"images: got sizes {sorted(sizes)}, expected the same for all")
    mode = "L" if all(image.mode in ("1", "L") for image in images) else "RGB"
    stacked = np.stack([np.asarray(image.convert(mode)) for image in images])
    stacked = stacked[..., None] if mode == "L" else stacked
    return stacked.reshape(*leading, *stacked.shape[1:])
