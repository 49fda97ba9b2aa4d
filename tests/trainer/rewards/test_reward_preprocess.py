"""Image processors in torch against Pillow and against transformers' own processors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from flowdppo_fast.trainer.rewards.preprocess import Preprocessor

BILINEAR, BICUBIC = 2, 3


def noise(height: int, width: int) -> torch.Tensor:
    """Two images, the second one hard on ties: a ramp."""
    images = torch.rand(2, 3, height, width).mul(255).round()
    images[1] = torch.linspace(0, 255, width).round()
    return images / 255


def by_processor(processor, images: torch.Tensor) -> torch.Tensor:
    arrays = images.mul(255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return processor([Image.fromarray(array) for array in arrays], return_tensors="pt")["pixel_values"].float()


def levels(values: torch.Tensor, settings: dict) -> torch.Tensor:
    """Normalised numbers back as bytes."""
    mean, std = (torch.tensor(settings[key]).view(3, 1, 1) for key in ("image_mean", "image_std"))
    return (values * std + mean) * 255


def rounding(settings: dict) -> float:
    """Largest difference of the normalised numbers from the same bytes: four float32 operations on |x| <= 3."""
    return 4 * 2**-24 * (1 + max(settings["image_mean"])) / min(settings["image_std"])


@pytest.mark.parametrize("resample", [BILINEAR, BICUBIC])
@pytest.mark.parametrize("size", [(33, 31), (64, 64), (20, 50), (90, 37), (16, 24)])
@pytest.mark.parametrize("target", [(32, 34), (16, 16), (24, 70)])
def test_resized_bytes_are_those_of_pillow(size, target, resample):
    images = noise(*size)
    processor = ViTImageProcessorPil(size=dict(zip(("height", "width"), target)), resample=resample)
    actual = levels(Preprocessor(processor.to_dict())(images), processor.to_dict())
    for image, mine in zip(images, actual):
        array = image.mul(255).round().to(torch.uint8).permute(1, 2, 0).numpy()
        # in two calls, because which direction comes first depends on the version of Pillow
        wide = Image.fromarray(array).resize((target[1], size[0]), resample)
        expected = np.asarray(wide.resize((target[1], target[0]), resample)).transpose(2, 0, 1)
        assert np.array_equal(mine.round().numpy(), expected)


@pytest.mark.parametrize("edge", [8, 32, 48])
@pytest.mark.parametrize("size", [(64, 64), (30, 47), (53, 29), (32, 32)])
def test_clip_processor(size, edge):
    """The aspect ratio is kept, so that the order of the directions is the same in all versions of Pillow."""
    images = noise(*size)
    processor = CLIPImageProcessorPil(size={"shortest_edge": edge}, crop_size={"height": edge, "width": edge})
    settings = processor.to_dict()
    actual, expected = Preprocessor(settings)(images), by_processor(processor, images)
    assert actual.shape == expected.shape == (2, 3, edge, edge)
    torch.testing.assert_close(actual, expected, rtol=0, atol=rounding(settings))


@pytest.mark.parametrize("crop", [(20, 13), (41, 70), (70, 20)])
def test_crops_and_black_borders(crop):
    images = noise(40, 29)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 29}, crop_size=dict(zip(("height", "width"), crop)))
    actual, expected = Preprocessor(processor.to_dict())(images), by_processor(processor, images)
    torch.testing.assert_close(actual, expected, rtol=0, atol=rounding(processor.to_dict()))


@pytest.mark.parametrize("size", [(33, 33), (20, 90), (90, 20)])
def test_classifier_processor(size):
    """Bilinear to a square. Rounding after the first direction moves a byte by at most 1/2, in either order, and
    bilinear weights are positive and sum to 1: results differ by at most one level whichever direction comes first."""
    images = noise(*size)
    processor = ViTImageProcessorPil(size={"height": 32, "width": 32})
    settings = processor.to_dict()
    difference = levels(Preprocessor(settings)(images), settings) - levels(by_processor(processor, images), settings)
    assert difference.abs().max() <= 1 + 255 * rounding(settings)


def test_without_resize_crop_and_normalisation():
    processor = CLIPImageProcessorPil(do_resize=False, do_center_crop=False, do_normalize=False)
    images = noise(9, 11)
    torch.testing.assert_close(
        Preprocessor(processor.to_dict())(images), by_processor(processor, images), rtol=0, atol=2**-23
    )


def test_grey_images_become_colour():
    settings = CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}).to_dict()
    grey = noise(12, 12)[:, :1]
    assert torch.equal(Preprocessor(settings)(grey), Preprocessor(settings)(grey.expand(-1, 3, -1, -1)))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"resample": 1}, "resample=1"),
        ({"size": {"longest_edge": 8}}, "longest_edge"),
        ({"do_pad": True}, "do_pad"),
        ({"crop_pct": 0.9}, "crop_pct"),
    ],
)
def test_processors_that_do_something_else_are_refused(change, named):
    with pytest.raises(ValueError, match=rf"{named}.*preprocess='processor' runs it as it is"):
        Preprocessor({**CLIPImageProcessorPil().to_dict(), **change})
