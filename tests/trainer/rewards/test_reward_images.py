"""One tensor from everything that a pipeline returns."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from flowdppo_fast.trainer.rewards import to_pixels
from flowdppo_fast.trainer.rewards.images import encode, scored_pixels, select_frames, to_arrays


def test_all_kinds_of_images_are_the_same_pixels(pictures, as_pil):
    expected = pictures[:, None]
    last = pictures.permute(0, 2, 3, 1).numpy()
    kinds = {
        "pt": pictures,
        "np": last,
        "pil": as_pil(pictures),
        "list of tensors": list(pictures),
        "list of arrays": list(last),
        "uint8": pictures.mul(255).round().to(torch.uint8),
    }
    for name, images in kinds.items():
        pixels = to_pixels(images)
        assert pixels.dtype == torch.float32, name
        assert torch.equal(pixels, expected), name


def test_all_kinds_of_videos_are_the_same_pixels(pictures, as_pil):
    video = pictures.unflatten(0, (2, 3))
    frames = as_pil(pictures)
    for images in (
        video,
        video.permute(0, 1, 3, 4, 2).numpy(),
        [frames[:3], frames[3:]],
        list(video),
        list(video.permute(0, 1, 3, 4, 2).numpy()),
    ):
        assert torch.equal(to_pixels(images), video)


def test_diffusers_processors_make_what_is_read_here(pictures):
    """The same decoded batch, through diffusers' own conversion to each output type."""
    from diffusers.image_processor import VaeImageProcessor
    from diffusers.video_processor import VideoProcessor

    decoded = pictures * 2 - 1
    images = VaeImageProcessor()
    for kind in ("pt", "np", "pil"):
        actual = to_pixels(images.postprocess(decoded, output_type=kind))
        # x * 2 - 1 and back is off by an ulp, except for bytes
        torch.testing.assert_close(actual, pictures[:, None], rtol=0, atol=2**-23)
    # decoders give [B, C, F, H, W]
    decoded = decoded.unflatten(0, (2, 3)).transpose(1, 2)
    videos = VideoProcessor()
    for kind in ("pt", "np", "pil"):
        actual = to_pixels(videos.postprocess_video(decoded, output_type=kind))
        torch.testing.assert_close(actual, pictures.unflatten(0, (2, 3)), rtol=0, atol=2**-23)


def test_grey_images_keep_one_channel_unless_mixed_with_colour(pictures, as_pil):
    grey = as_pil(pictures[:2, :1])
    assert torch.equal(to_pixels(grey), pictures[:2, None, :1])
    mixed = to_pixels([grey[0], as_pil(pictures)[1]])
    assert mixed.shape[2] == 3
    assert torch.equal(mixed[0, 0], pictures[0, :1].expand(3, -1, -1))


def test_half_precision_is_read_exactly(pictures):
    half = pictures.bfloat16()
    assert torch.equal(to_pixels(half)[:, 0], half.float())


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        ("text", TypeError, "got str, expected images"),
        ([], ValueError, "got an empty list"),
        (["text"], TypeError, "got a list of str"),
        (torch.zeros(2, 16, 8, 8), ValueError, r"got shape \[2, 16, 8, 8\] \(channels first\)"),
        (torch.zeros(0, 3, 8, 8), ValueError, r"got shape \[0, 3, 8, 8\]"),
        (torch.zeros(3, 8, 8), ValueError, r"got shape \[3, 8, 8\]"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.int64), TypeError, "got torch.int64"),
        ([torch.zeros(3, 8, 8), torch.zeros(3, 8, 9)], ValueError, "the same for all"),
        ([Image.new("L", (8, 8)), Image.new("L", (8, 9))], ValueError, r"got sizes \[\(8, 8\), \(8, 9\)\]"),
        ([Image.new("L", (8, 8)), "text"], TypeError, "with str"),
        ([[Image.new("L", (8, 8))] * 2, [Image.new("L", (8, 8))]], ValueError, "got videos of"),
    ],
)
def test_what_is_no_batch_of_images(images, error, message):
    with pytest.raises(error, match=message):
        to_pixels(images)


@pytest.mark.parametrize("value", [-0.01, 1.01, float("nan"), float("inf")])
def test_pixels_out_of_range_name_the_sample(value):
    images = torch.full((4, 3, 2, 2), 0.5)
    images[2, 1, 0, 1] = value
    with pytest.raises(ValueError, match=r"sample 2 \(1 of 4\) has pixels that are outside \[0, 1\] or not finite"):
        to_pixels(images)


def test_one_prompt_per_image():
    with pytest.raises(ValueError, match="prompts: got 3 for 2 images"):
        scored_pixels(torch.zeros(2, 3, 4, 4), ["a"] * 3, 1)


@pytest.mark.parametrize(
    ("total", "count", "expected"),
    [(9, 1, [4]), (8, 4, [1, 3, 5, 7]), (10, 3, [1, 5, 8]), (5, 5, [0, 1, 2, 3, 4]), (2, 4, [0, 1]), (81, 2, [20, 60])],
)
def test_frames_are_the_middles_of_equal_parts(total, count, expected):
    video = torch.arange(total)[None, :, None, None, None]
    assert select_frames(video, count).flatten().tolist() == expected
    # independently: the frame that holds the middle of each part
    if count <= total:
        assert expected == [int(np.floor((part + 0.5) * total / count)) for part in range(count)]


@pytest.mark.parametrize("channels", [1, 3])
def test_png_is_exact(pictures, channels):
    array = to_arrays(pictures[:1, None, :channels])[0, 0]
    with Image.open(io.BytesIO(encode(array, "PNG"))) as image:
        again = np.asarray(image)
    assert np.array_equal(again if channels == 3 else again[..., None], array)
