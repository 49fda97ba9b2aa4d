"""JPEG sizes against Pillow called by hand."""

from __future__ import annotations

import io

import pytest
import torch

from flowdppo_fast.trainer.rewards import JPEGCompressibility, JPEGIncompressibility


def size_in_kilobytes(image, quality=95) -> float:
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=quality)
    return buffer.tell() / 1000


@pytest.mark.parametrize("quality", [95, 40])
@pytest.mark.parametrize("threads", [1, 3])
def test_against_pillow(pictures, as_pil, quality, threads):
    expected = torch.tensor([size_in_kilobytes(image, quality) for image in as_pil(pictures)])
    prompts = [""] * len(pictures)
    assert torch.equal(JPEGIncompressibility(quality, threads=threads)(pictures, prompts), expected)
    assert torch.equal(JPEGCompressibility(quality, threads=threads)(as_pil(pictures), prompts, None), -expected)
    # noise is what does not compress
    assert expected.argmax() == len(pictures) - 1


def test_grey_images_are_grey_files(pictures, as_pil):
    grey = pictures[:, :1]
    expected = torch.tensor([size_in_kilobytes(image) for image in as_pil(grey)])
    assert torch.equal(JPEGIncompressibility()(grey, [""] * 6), expected)


def test_videos_are_the_mean_over_chosen_frames(pictures):
    sizes = JPEGIncompressibility()(pictures, [""] * 6)
    video = pictures[None]
    torch.testing.assert_close(JPEGIncompressibility(frames=2)(video, [""]), sizes[[1, 4]].mean()[None])
    torch.testing.assert_close(JPEGIncompressibility(frames=9)(video, [""]), sizes.mean()[None])


@pytest.mark.parametrize(("settings", "name"), [({"quality": 0}, "quality"), ({"threads": 0}, "threads")])
def test_settings_are_checked(settings, name):
    with pytest.raises(ValueError, match=f"^{name}: got 0"):
        JPEGIncompressibility(**settings)
