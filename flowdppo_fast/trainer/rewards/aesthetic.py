"""The aesthetic score of LAION: a small head on CLIP image embeddings."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .images import scored_pixels
from .models import ModelReward, from_pretrained, load_network


class AestheticHead(nn.Module):
    """Five linear layers without activations between them, as published; dropout does nothing in evaluation.

    Args:
        width: of the embedding.
    """

    def __init__(self, width: int = 768):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, 1024), nn.Dropout(0.2), nn.Linear(1024, 128), nn.Dropout(0.2), nn.Linear(128, 64),
            nn.Dropout(0.1), nn.Linear(64, 16), nn.Linear(16, 1),
        )  # fmt: skip

    def forward(self, embedding: Tensor) -> Tensor:
        """``[N, width]`` unit embeddings to ``[N]`` scores."""
        return self.layers(embedding).squeeze(-1)


class AestheticScore(ModelReward):
    """How much people like the look of the image, about 1 to 10; float32 ``[B]``; prompts are not read.

    Args:
        head: local file with the head's weights, ``.safetensors``, or ``.pth``, which is read with
            ``torch.load(weights_only=True)``. The published one is ``sac+logos+ava1-l14-linearMSE.pth`` of the
            GitHub repository christophschuhmann/improved-aesthetic-predictor, for the default ``path``.
        path: the CLIP model that the head was trained on: name on the hub, or local folder.
        revision: of that model on the hub.
        options: see :class:`~.models.ModelReward`; the head runs in float32 whatever ``dtype`` is.

    Raises:
        ValueError: a file that holds no such head, or one for another embedding width.
    """

    def __init__(
        self,
        head: str | Path,
        path: str = "openai/clip-vit-large-patch14",
        *,
        revision: str | None = None,
        **options: Any,
    ):
        super().__init__(**options)
        self.head_path, self.path, self.revision = Path(head).expanduser(), str(path), revision
        if not self.head_path.is_file():
            raise ValueError(f"head: got {str(head)!r}, which is no file, expected the head's weights")

    @torch.no_grad()
    def __call__(self, images: Any, prompts: Sequence[Any], metadata: Sequence[dict] | None = None) -> Tensor:
        pixels = scored_pixels(images, prompts, self.frames)
        model: Any = self.load(pixels.device)
        embedding = self._map(lambda part: self._embed(model, part), pixels.flatten(0, 1))
        return model["head"](F.normalize(embedding, dim=-1)).unflatten(0, pixels.shape[:2]).mean(1)

    def _load(self) -> nn.Module:
        from transformers import AutoImageProcessor, CLIPModel

        self.processor = from_pretrained(AutoImageProcessor, self.path, "image processor", revision=self.revision)
        clip: Any = load_network(CLIPModel, self.path, "CLIP model", self.dtype, self.revision)
        head = load_head(self.head_path, clip.config.projection_dim)
        # the text half is let go
        return nn.ModuleDict({"vision": clip.vision_model, "projection": clip.visual_projection, "head": head})

    def _embed(self, model: Any, pixels: Tensor) -> Tensor:
        return model["projection"](model["vision"](pixel_values=self._prepare(pixels)).pooler_output)


def load_head(path: Path, width: int) -> AestheticHead:
    """The head in ``path`` for embeddings of ``width`` numbers, float32.

    Raises:
        ValueError: another kind of file, or other weights in it.
    """
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            weights = load_file(path)
        except SafetensorError as error:
            raise ValueError(f"head: {path} is no safetensors file ({error})") from error
    elif path.suffix in (".pth", ".pt"):
        try:
            weights = torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise ValueError(f"head: {path} holds more than tensors, or is damaged; it was not loaded") from error
    else:
        raise ValueError(f"head: got {path.name}, expected a file that ends in .safetensors, .pth or .pt")
    head = AestheticHead(width)
    expected = {name: list(value.shape) for name, value in head.state_dict().items()}
    found = (
        {name: list(value.shape) for name, value in weights.items() if isinstance(value, Tensor)}
        if isinstance(weights, dict)
        else {}
    )
    if found != expected:
        raise ValueError(
            f"head: {path} holds {found or 'no weights by name'}, expected {expected} for embeddings of width {width}"
        )
    head.load_state_dict(weights)
    return head.float()
