"""A tiny CLIP model with its tokenizer and image processor, saved as a user has it on disk; images to score."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from reward_support import IMAGE_SIZE, WIDTH
from transformers import CLIPConfig, CLIPModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.utils import logging as transformers_logging

# that it takes the Pillow processors without torchvision is known
transformers_logging.set_verbosity_error()

LETTERS = [chr(code) for code in range(ord("a"), ord("z") + 1)]


def save_tokenizer(folder: Path) -> int:
    """A byte-pair tokenizer without merges: one token per letter; returns the size of its vocabulary."""
    words = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer"}))
    return len(words)


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory) -> Path:
    """A CLIP model of random weights whose embeddings differ clearly from image to image."""
    folder = tmp_path_factory.mktemp("clip")
    words = save_tokenizer(folder)
    torch.manual_seed(11)
    text = {
        "vocab_size": words, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 2, "max_position_embeddings": 12, "bos_token_id": words - 2, "eos_token_id": words - 1,
    }  # fmt: skip
    vision = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
        "image_size": IMAGE_SIZE, "patch_size": 4,
    }  # fmt: skip
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTH)
    model = CLIPModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.3)
        model.logit_scale.fill_(2.3456789)
    model.save_pretrained(folder)
    edge = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    CLIPImageProcessorPil(size={"shortest_edge": IMAGE_SIZE}, crop_size=edge).save_pretrained(folder)
    return folder


@pytest.fixture
def pictures() -> torch.Tensor:
    """``[6, 3, 24, 36]`` in [0, 1], whole numbers of 1/255: smooth ones and noise."""
    generator = np.random.default_rng(3)
    coarse = torch.from_numpy(generator.random((6, 3, 4, 6), dtype=np.float32))
    smooth = torch.nn.functional.interpolate(coarse, size=(24, 36), mode="bilinear")
    noise = torch.from_numpy(generator.random((6, 3, 24, 36), dtype=np.float32))
    share = torch.linspace(0, 1, 6)[:, None, None, None]
    return ((1 - share) * smooth + share * noise).mul(255).round() / 255


@pytest.fixture
def as_pil():
    def convert(pictures: torch.Tensor) -> list[Image.Image]:
        arrays = pictures.mul(255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
        return [Image.fromarray(array if array.shape[-1] == 3 else array[..., 0]) for array in arrays]

    return convert
