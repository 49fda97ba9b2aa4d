"""What reward client and server say to each other: JSON, with images as base64 files. No pickle on either side."""

from __future__ import annotations

import base64
import binascii
import io
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .images import encode, to_arrays, to_pixels

VERSION = 1
Format = Literal["png", "jpeg", "npy"]
_NPY_DTYPES = ("float32", "uint8")


def encode_request(
    pixels: Tensor, prompts: Sequence[Any], metadata: Sequence[Mapping], format: Format, quality: int
) -> bytes:
    """The body of a request.

    Args:
        pixels: ``[B, F, C, H, W]`` in [0, 1]; with one frame they are sent as images, else as videos.

    Raises:
        TypeError: prompts or metadata that JSON cannot hold.
    """
    if format == "npy":
        arrays = pixels.movedim(-3, -1).float().cpu().numpy()
        files = [[_to_npy(frame) for frame in video] for video in arrays]
    else:
        files = [[encode(frame, format.upper(), quality) for frame in video] for video in to_arrays(pixels)]
    texts = [[base64.b64encode(frame).decode("ascii") for frame in video] for video in files]
    content = {
        "version": VERSION,
        "format": format,
        "prompts": list(prompts),
        "metadata": [dict(entry) for entry in metadata],
        "images": [video[0] for video in texts] if pixels.shape[1] == 1 else texts,
    }
    try:
        return json.dumps(content, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise TypeError(f"prompts, metadata: cannot be sent to a reward server as JSON ({error})") from error


def decode_request(body: bytes) -> tuple[Tensor, list[Any], list[dict]]:
    """Images ``[B, C, H, W]`` or videos ``[B, F, C, H, W]`` in [0, 1], prompts and metadata of a request.

    Raises:
        ValueError: anything that is not what :func:`encode_request` makes.
    """
    content = parse_json(body)
    if not isinstance(content, dict) or content.get("version") != VERSION:
        raise ValueError(f'request: expected an object with "version": {VERSION}')
    missing = [key for key in ("format", "prompts", "metadata", "images") if key not in content]
    if missing:
        raise ValueError(f"request: got no {', '.join(missing)}")
    format, lists = content["format"], [content[key] for key in ("prompts", "metadata", "images")]
    if format not in ("png", "jpeg", "npy"):
        raise ValueError(f"request: got format {format!r}, expected png, jpeg or npy")
    if not all(isinstance(entry, list) for entry in lists) or len({len(entry) for entry in lists}) > 1 or not lists[0]:
        raise ValueError("request: expected prompts, metadata and images as lists of the same length, at least 1")
    prompts, metadata, images = lists
    if not all(isinstance(entry, dict) for entry in metadata):
        raise ValueError("request: expected metadata as a list of objects")
    return _decode_images(images, format), prompts, metadata


def parse_rewards(body: bytes, count: int) -> dict[str, Tensor] | Tensor:
    """Rewards in an answer: ``{"rewards": [...]}`` or ``{"rewards": {name: [...]}}``, float32 ``[count]`` each.

    Raises:
        ValueError: anything else, another count, or numbers that are not finite in float32.
    """
    content = parse_json(body)
    if not isinstance(content, dict) or not isinstance(content.get("rewards"), (list, dict)):
        raise ValueError(f'expected {{"rewards": [...]}} or {{"rewards": {{name: [...]}}}}, got {excerpt(body)}')
    rewards = content["rewards"]
    if isinstance(rewards, list):
        return parse_numbers(rewards, count, "rewards")
    if not rewards:
        raise ValueError("got no rewards, expected at least one name")
    return {name: parse_numbers(values, count, repr(name)) for name, values in rewards.items()}


def parse_json(body: bytes) -> Any:
    """JSON as the standard has it: NaN and Infinity are errors.

    Raises:
        ValueError: no such JSON.
    """

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON number")

    try:
        return json.loads(body, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"expected JSON, got {excerpt(body)} ({error or type(error).__name__})") from error


def excerpt(body: bytes, length: int = 200) -> str:
    """The beginning of what a server said, on one line and without control characters."""
    text = body[: 4 * length].decode("utf-8", errors="replace")
    shown = "".join(letter if letter.isprintable() else " " for letter in text)
    return f"'{shown}'" if len(body) <= length else f"'{shown[:length]}...'"


def parse_numbers(values: Any, count: int, name: str) -> Tensor:
    """Numbers of an answer as float32 ``[count]``; ``null`` is an abstention, which is NaN.

    Raises:
        ValueError: another count, or something that is no finite number.
    """
    if not isinstance(values, list) or len(values) != count:
        got = f"{len(values)} numbers" if isinstance(values, list) else type(values).__name__
        raise ValueError(f"got {got} for {name}, expected a list of {count}, one per image")
    for place, value in enumerate(values):
        if value is None:
            continue
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise ValueError(f"got {value!r:.50} for {name} of sample {place}, expected a number")
        # the largest float32; integers of any size can be compared
        if not abs(value) <= 3.4028234663852886e38 or (isinstance(value, float) and math.isnan(value)):
            raise ValueError(f"got {value!r:.50} for {name} of sample {place}, expected a finite float32")
    return torch.tensor([math.nan if value is None else value for value in values], dtype=torch.float32)


def _to_npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(array), allow_pickle=False)
    return buffer.getvalue()


def _decode_images(images: list, format: Format) -> Tensor:
    is_video = isinstance(images[0], list)
    videos = images if is_video else [[image] for image in images]
    if any(not isinstance(video, list) or len(video) != len(videos[0]) or not video for video in videos):
        raise ValueError("request: expected images as texts, or videos as lists of texts of the same length")
    decode = _from_npy if format == "npy" else _from_file
    arrays = [[decode(_from_base64(frame), format) for frame in video] for video in videos]
    shapes = {frame.shape for video in arrays for frame in video}
    if len(shapes) > 1:
        raise ValueError(f"request: got images of shapes {sorted(shapes)}, expected the same for all")
    pixels = to_pixels(np.stack([np.stack(video) for video in arrays]))
    return pixels if is_video else pixels[:, 0]


def _from_base64(text: Any) -> bytes:
    if not isinstance(text, str):
        raise ValueError(f"request: got {type(text).__name__} as an image, expected base64 text")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"request: an image is no base64 ({error})") from error


def _from_file(data: bytes, format: Format) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(data), formats=[format.upper()]) as image:
            array = np.asarray(image.convert("L" if image.mode in ("1", "L") else "RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"request: an image is no {format} file ({type(error).__name__})") from error
    return array[..., None] if array.ndim == 2 else array


def _from_npy(data: bytes, format: Format) -> np.ndarray:
    buffer = io.BytesIO(data)
    try:
        if np.lib.format.read_magic(buffer) != (1, 0):
            raise ValueError("expected version 1.0 of the format")
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(buffer)
        rest = data[buffer.tell() :]
        # the header is believed only as far as there are bytes for it
        if (
            dtype.name not in _NPY_DTYPES
            or fortran
            or len(shape) != 3
            or math.prod(shape) * dtype.itemsize != len(rest)
        ):
            raise ValueError(f"expected [H, W, C] of {' or '.join(_NPY_DTYPES)} in C order, with all its bytes")
    except ValueError as error:
        raise ValueError(f"request: an image is no npy file ({error})") from error
    return np.frombuffer(rest, dtype).reshape(shape)
