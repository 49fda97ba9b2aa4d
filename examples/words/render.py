"""Words drawn with the fonts that matplotlib ships: the data of pre-training."""

from __future__ import annotations

import functools
import random
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from pipeline import TYPEFACES

HEIGHT, WIDTH = 24, 72
LARGEST = 15
# pixels that are free on the left and on the right of the longest words
MARGIN = 2
# what is drawn at random: how much smaller than the largest size that fits, and shifts in pixels
SIZES, LEFT, DOWN = (0, 1), (0, 1), (0, 1)


@functools.cache
def font(typeface: str, size: int) -> ImageFont.FreeTypeFont:
    """A font by its name in prompts."""
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    return ImageFont.truetype(str(folder / TYPEFACES[typeface]), size, layout_engine=ImageFont.Layout.BASIC)


@functools.lru_cache(maxsize=1 << 16)
def fitting_size(word: str, typeface: str) -> int:
    """The largest font size at which ``word`` fits, at most ``LARGEST``."""
    room = WIDTH - 2 * MARGIN - max(LEFT)
    return next(size for size in range(LARGEST, 0, -1) if font(typeface, size).getlength(word) <= room)


def render(word: str, typeface: str, rng: random.Random) -> np.ndarray:
    """A page ``[HEIGHT, WIDTH]``, uint8, 255 = ink, with the word at a random size and place."""
    face = font(typeface, fitting_size(word, typeface) - rng.choice(SIZES))
    page = Image.new("L", (WIDTH, HEIGHT), 0)
    # letters stand on one line whatever they are
    place = (MARGIN + rng.choice(LEFT), 17 + rng.choice(DOWN))
    ImageDraw.Draw(page).text(place, word, font=face, fill=255, anchor="ls")
    return np.asarray(page)
