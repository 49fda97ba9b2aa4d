"""Pages of labelled images: what a pipeline returns, as one PNG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from .figures import INK, PAPER

# between the rewards of a caption
_GAP = "  "
# a caption needs room even under an image of 16 pixels
_SMALLEST_TILE, _MARGIN, _FONT_SIZE, _LINE_HEIGHT = 128, 4, 12, 15
_FRAMES_SHOWN = 8


def caption(prompt: Any, rewards: Mapping[str, float]) -> str:
    """Two paragraphs under an image: its prompt, and its rewards by name."""
    # a prompt of several lines is one paragraph too
    text = " ".join(str(prompt).splitlines())
    return f"{text}\n" + _GAP.join(f"{name} {value:.3f}" for name, value in rewards.items())


def frames_of(image: Any) -> list[Image.Image]:
    """Frames of one image (a single one) or video.

    Args:
        image: a PIL image or a list of them, a ``[C, H, W]`` or ``[T, C, H, W]`` tensor, or a ``[H, W, C]`` or
            ``[T, H, W, C]`` array; floating-point values in [0, 1], clamped, or uint8.

    Raises:
        ValueError, TypeError: something else, such as latents.
    """
    if isinstance(image, Image.Image):
        return [image]
    if isinstance(image, (list, tuple)) and image and all(isinstance(frame, Image.Image) for frame in image):
        return list(image)
    if isinstance(image, torch.Tensor):
        pixels = image.detach().movedim(-3, -1) if image.ndim in (3, 4) else image
        # numpy has no bfloat16
        array = (pixels.float() if pixels.is_floating_point() else pixels).cpu().numpy()
    elif isinstance(image, np.ndarray):
        array = image
    else:
        raise TypeError(
            f"image: got {type(image).__name__}, expected a PIL image, a list of them, a tensor or an array"
        )
    if array.ndim not in (3, 4) or array.shape[-1] not in (1, 3, 4):
        raise ValueError(
            f"image: got {type(image).__name__} of shape {list(image.shape)}, expected pixels with 1, 3 or 4 channels: "
            "[C, H, W] or [T, C, H, W] for a tensor, channels last for an array"
        )
    if array.dtype != np.uint8:
        # what is no number is shown black
        array = (np.nan_to_num(array, nan=0.0).clip(0.0, 1.0) * 255).round().astype(np.uint8)
    stack = array if array.ndim == 4 else array[None]
    return [Image.fromarray(frame[..., 0] if frame.shape[-1] == 1 else frame) for frame in stack]


def image_grid(
    images: Sequence[Any] | torch.Tensor | np.ndarray,
    captions: Sequence[str],
    *,
    tile: int | None = 256,
    columns: int | None = None,
) -> Image.Image:
    """One page of images with captions beneath them; a video is a strip of up to 8 of its frames, on a row of its own.

    Args:
        images: a batch, or a list of what :func:`frames_of` takes.
        captions: a text per image: of its first paragraph two lines are shown, the others are shown as a whole.
        tile: longest edge of an image on the page in pixels; None leaves images as large as they are. Images smaller
            than 128 pixels are shown larger, by a whole factor.
        columns: images per row; None makes the page about square.

    Raises:
        ValueError: no images, or not a caption for each.
    """
    if not len(images) or len(captions) != len(images):
        raise ValueError(f"captions: got {len(captions)} for {len(images)} images, expected one each, for at least one")
    strips = [_strip([_fit(frame, tile) for frame in _spread(frames_of(image))]) for image in images]
    is_video = any(len(frames_of(image)) > 1 for image in images[:1])
    columns = columns or (1 if is_video else math.ceil(math.sqrt(len(strips))))
    font = ImageFont.load_default(_FONT_SIZE)
    # a reward is read as a whole, even under the smallest image
    width = math.ceil(max([*(strip.width for strip in strips), *(_longest_piece(text, font) for text in captions)]))
    height = max(strip.height for strip in strips)
    texts = [_lines(text, width, font) for text in captions]
    cell_height = height + max(len(lines) for lines in texts) * _LINE_HEIGHT + 2 * _MARGIN
    rows = math.ceil(len(strips) / columns)
    page = Image.new("RGB", (columns * (width + _MARGIN) + _MARGIN, rows * cell_height + _MARGIN), PAPER)
    draw = ImageDraw.Draw(page)
    for position, (strip, lines) in enumerate(zip(strips, texts)):
        row, column = divmod(position, columns)
        left, top = _MARGIN + column * (width + _MARGIN), _MARGIN + row * cell_height
        page.paste(strip, (left, top))
        for number, line in enumerate(lines):
            draw.text((left, top + height + _MARGIN / 2 + number * _LINE_HEIGHT), line, fill=INK, font=font)
    return page


def _spread(frames: list[Image.Image]) -> list[Image.Image]:
    """Up to 8 frames, the first and the last among them."""
    if len(frames) <= _FRAMES_SHOWN:
        return frames
    return [frames[round(i * (len(frames) - 1) / (_FRAMES_SHOWN - 1))] for i in range(_FRAMES_SHOWN)]


def _fit(frame: Image.Image, tile: int | None) -> Image.Image:
    longest = max(frame.size)
    if longest < _SMALLEST_TILE:
        factor = math.ceil(_SMALLEST_TILE / longest)
        return frame.resize((frame.width * factor, frame.height * factor), Image.Resampling.NEAREST)
    if tile is not None and longest > tile:
        size = (max(1, round(edge * tile / longest)) for edge in frame.size)
        return frame.resize(tuple(size), Image.Resampling.BOX)  # type: ignore[arg-type]
    return frame


def _strip(frames: list[Image.Image]) -> Image.Image:
    gap = 2
    width = sum(frame.width + gap for frame in frames) - gap
    strip = Image.new("RGB", (width, max(frame.height for frame in frames)), PAPER)
    left = 0
    for frame in frames:
        strip.paste(frame, (left, 0))
        left += frame.width + gap
    return strip


def _lines(text: str, width: float, font: Any) -> list[str]:
    """Lines that fit ``width`` pixels: the first paragraph on at most two, of the others nothing is left out."""
    prompt, *others = text.split("\n")
    lines = _fill(prompt.split(), " ", width, font)
    if len(lines) > 2:
        lines = [lines[0], f"{lines[1]} ..."]
    shown = [_shorten(line, width, font) for line in lines]
    return shown + [line for paragraph in others for line in _fill(paragraph.split(_GAP), _GAP, width, font)]


def _fill(pieces: list[str], gap: str, width: float, font: Any) -> list[str]:
    lines = [""]
    for piece in pieces:
        longer = f"{lines[-1]}{gap}{piece}" if lines[-1] else piece
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(piece)
    return lines


def _shorten(line: str, width: float, font: Any) -> str:
    whole = line.removesuffix(" ...")
    for length in range(len(whole), 0, -1):
        short = line if length == len(whole) else f"{whole[:length].rstrip()} ..."
        if font.getlength(short) <= width:
            return short
    return line


def _longest_piece(text: str, font: Any) -> float:
    """Pixels that what must not be cut needs on a line."""
    pieces = [piece for paragraph in text.split("\n")[1:] for piece in paragraph.split(_GAP)]
    return max(map(font.getlength, pieces), default=0.0)
