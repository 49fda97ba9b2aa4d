"""A small convolutional classifier that says how readable a digit image is.

It is trained by ``pretrain.py`` on distorted real digits (slanted, shifted, bolder, thinner, noisy), so that a
change of style alone does not cost a digit its readability, and on images that are no digit or two digits at
once, for which it learns to be unsure.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

CONFIG_NAME = "judge.json"
WEIGHTS_NAME = "judge.safetensors"


class Judge(nn.Module):
    """Digit classifier for one-channel images.

    Args:
        image_size: height and width of the images, a multiple of 4.
        width: channels of the first convolution; the others have twice as many.
        num_classes: number of classes.

    Raises:
        ValueError: ``image_size`` is not a positive multiple of 4.
    """

    def __init__(self, image_size: int = 16, width: int = 16, num_classes: int = 10):
        super().__init__()
        if image_size < 4 or image_size % 4:
            raise ValueError(f"image_size: got {image_size}, expected a positive multiple of 4")
        self.config = {"image_size": image_size, "width": width, "num_classes": num_classes}
        self.features = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1),
            nn.GELU(),
            nn.MaxPool2d(2),
            nn.Conv2d(width, 2 * width, 3, padding=1),
            nn.GELU(),
            nn.MaxPool2d(2),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1),
            nn.GELU(),
        )
        self.head = nn.Linear(2 * width * (image_size // 4) ** 2, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Log-probabilities of the classes.

        Args:
            images: ``[B, 1, H, W]``, floating point, in [0, 1] (0 = paper, 1 = ink).

        Returns:
            ``[B, num_classes]`` in the parameters' dtype, natural logarithm.

        Raises:
            ValueError: another shape.
        """
        size = self.config["image_size"]
        if images.ndim != 4 or tuple(images.shape[1:]) != (1, size, size):
            raise ValueError(f"images: got shape {list(images.shape)}, expected [B, 1, {size}, {size}]")
        weight = self.head.weight
        hidden = self.features(images.to(device=weight.device, dtype=weight.dtype) * 2 - 1)
        return F.log_softmax(self.head(hidden.flatten(1)), dim=-1)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``judge.json`` and ``judge.safetensors`` into ``folder`` (made if absent)."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG_NAME).write_text(json.dumps(self.config, indent=2) + "\n")
        state = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        save_file(state, folder / WEIGHTS_NAME)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Judge:
        """Load a judge, in evaluation mode and without gradients on its parameters.

        Raises:
            ValueError: ``folder`` holds no judge.
        """
        folder = Path(folder)
        for name in (CONFIG_NAME, WEIGHTS_NAME):
            if not (folder / name).is_file():
                raise ValueError(
                    f"folder: got {folder} without {name}, expected a folder written by Judge.save_pretrained "
                    "(examples/digits/pretrain.py makes one)"
                )
        judge = cls(**json.loads((folder / CONFIG_NAME).read_text()))
        judge.load_state_dict(load_file(folder / WEIGHTS_NAME))
        return judge.eval().requires_grad_(False)
