"""ImageReward (arXiv 2304.05977): BLIP reads image and prompt together, a small head scores them."""

from __future__ import annotations

import json
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .aesthetic import AestheticHead
from .images import check_texts, scored_pixels
from .models import ModelReward, from_pretrained
from .preprocess import Preprocessor

# of the scores over the authors' data, as published
_MEAN, _STD = 0.16717362830052426, 1.0333394966054072
_LENGTH = 35
_WEIGHTS, _TEXT_CONFIG = ("ImageReward.safetensors", "ImageReward.pt"), "med_config.json"
_TEXT_SETTINGS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings",
    "hidden_act", "layer_norm_eps",
)  # fmt: skip
# where the published file has the parts that transformers has under other names
_RENAMED = (
    ("blip.visual_encoder.patch_embed.proj.", "vision.embeddings.patch_embedding."),
    ("blip.visual_encoder.pos_embed", "vision.embeddings.position_embedding"),
    ("blip.visual_encoder.cls_token", "vision.embeddings.class_embedding"),
    ("blip.visual_encoder.norm.", "vision.post_layernorm."),
    ("blip.visual_encoder.blocks.", "vision.encoder.layers."),
    (".attn.proj.", ".self_attn.projection."),
    (".attn.", ".self_attn."),
    (".norm1.", ".layer_norm1."),
    (".norm2.", ".layer_norm2."),
    ("blip.text_encoder.", "text."),
    ("mlp.", "head."),
)


class ImageRewardScore(ModelReward):
    """How well people think an image fits its prompt, about -2 to 2; float32 ``[B]`` on the model's device.

    Prompts are cut to 35 tokens, as published.

    Args:
        path: name on the model hub or local folder with ``ImageReward.safetensors`` or the published
            ``ImageReward.pt`` (read with ``torch.load(weights_only=True)``), and ``med_config.json``.
        tokenizer: name on the hub or local folder of BERT's tokenizer.
        revision: of ``path`` on the hub.
        vision_heads: attention heads of the vision tower, which no file says; None means one per 64 numbers.
        dtype, batch_size, frames: see :class:`~.models.ModelReward`; the head runs in float32 whatever ``dtype`` is.

    Raises:
        TypeError: a prompt that is no text. ValueError: a folder without these files, or other weights in them.
    """

    default_path = "THUDM/ImageReward"

    def __init__(
        self,
        path: str | Path | None = None,
        *,
        tokenizer: str = "google-bert/bert-base-uncased",
        revision: str | None = None,
        vision_heads: int | None = None,
        dtype: str | torch.dtype = "float32",
        batch_size: int = 32,
        frames: int = 4,
    ):
        super().__init__(dtype=dtype, batch_size=batch_size, frames=frames)
        self.path, self.tokenizer_path, self.revision = str(path or self.default_path), str(tokenizer), revision
        self.vision_heads = vision_heads
        self.tokenizer: Any = None

    @torch.no_grad()
    def __call__(self, images: Any, prompts: Sequence[str], metadata: Sequence[dict] | None = None) -> Tensor:
        pixels = scored_pixels(images, prompts, self.frames)
        check_texts(prompts)
        model: Any = self.load(pixels.device)
        tokens = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=_LENGTH, return_tensors="pt"
        )
        pairs = torch.stack([tokens["input_ids"], tokens["attention_mask"]], dim=1).to(self.device)
        rows = pairs.repeat_interleave(pixels.shape[1], dim=0)
        images_rows = pixels.flatten(0, 1)
        scores = [
            self._score(model, part, text)
            for part, text in zip(images_rows.split(self.batch_size), rows.split(self.batch_size))
        ]
        return ((torch.cat(scores) - _MEAN) / _STD).unflatten(0, pixels.shape[:2]).mean(1)

    def _score(self, model: Any, pixels: Tensor, text: Tensor) -> Tensor:
        seen = model["vision"](pixel_values=self._prepare(pixels)).last_hidden_state
        ids, mask = text.unbind(1)
        read = model["text"](
            input_ids=ids,
            attention_mask=mask,
            encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:-1], dtype=torch.long, device=seen.device),
        ).last_hidden_state
        return model["head"](read[:, 0].float())

    def _load(self) -> nn.Module:
        from transformers import AutoTokenizer
        from transformers.models.blip.modeling_blip import BlipVisionConfig, BlipVisionModel
        from transformers.models.blip.modeling_blip_text import BlipTextConfig, BlipTextModel

        self.tokenizer = from_pretrained(AutoTokenizer, self.tokenizer_path, "tokenizer")
        weights = {_renamed(name): value for name, value in self._weights().items()}
        text = json.loads(self._file(_TEXT_CONFIG).read_text())
        try:
            words = weights["text.embeddings.word_embeddings.weight"].shape[0]
            width, _, patch, _ = weights["vision.embeddings.patch_embedding.weight"].shape
            places = weights["vision.embeddings.position_embedding"].shape[1]
            blocks = {name.split(".")[3] for name in weights if name.startswith("vision.encoder.layers.")}
            side = patch * round((places - 1) ** 0.5)
            vision = BlipVisionConfig(
                hidden_size=width, intermediate_size=weights["vision.encoder.layers.0.mlp.fc1.weight"].shape[0],
                num_hidden_layers=len(blocks), num_attention_heads=self.vision_heads or max(1, width // 64),
                image_size=side, patch_size=patch, layer_norm_eps=1e-6,
            )  # fmt: skip
        except KeyError as error:
            raise ValueError(
                f"path: {self.path} holds no weight {error}, expected those of ImageReward as published (blip.*, mlp.*)"
            ) from error
        settings = {name: text[name] for name in _TEXT_SETTINGS if name in text}
        reads = BlipTextConfig(vocab_size=words, encoder_hidden_size=width, is_decoder=True, **settings)
        model = nn.ModuleDict(
            {
                "vision": BlipVisionModel(vision),
                "text": BlipTextModel(reads, add_pooling_layer=False),
                "head": AestheticHead(reads.hidden_size),
            }
        )
        expected = {name: list(value.shape) for name, value in model.state_dict().items()}
        found = {name: list(value.shape) for name, value in weights.items() if name in expected}
        if found != expected:
            wrong = sorted(name for name in expected if found.get(name) != expected[name])
            raise ValueError(
                f"path: {self.path} holds {found.get(wrong[0], 'nothing')} for {wrong[0]} (and {len(wrong) - 1} more that "  # noqa: E501
                f"do not fit), expected {expected[wrong[0]]}, as {_TEXT_CONFIG} and the vision tower say"
            )
        model.load_state_dict({name: weights[name] for name in expected})
        self._own = Preprocessor(
            {
                "do_resize": True, "size": {"shortest_edge": side}, "resample": 3, "do_center_crop": True,
                "crop_size": {"height": side, "width": side}, "image_mean": (0.48145466, 0.4578275, 0.40821073),
                "image_std": (0.26862954, 0.26130258, 0.27577711),
            }
        )  # fmt: skip
        for part in ("vision", "text"):
            model[part].to(self.dtype)
        model["head"].float()
        return model

    def _weights(self) -> dict[str, Tensor]:
        path = self._file(*_WEIGHTS)
        if path.suffix == ".safetensors":
            from safetensors import SafetensorError
            from safetensors.torch import load_file

            try:
                return load_file(path)
            except SafetensorError as error:
                raise ValueError(f"path: {path} is no safetensors file ({error})") from error
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise ValueError(f"path: {path} holds more than tensors, or is damaged; it was not loaded") from error

    def _file(self, *names: str) -> Path:
        """The first of ``names`` that is there, in the local folder or on the hub."""
        if Path(self.path).is_dir():
            found = next((Path(self.path) / name for name in names if (Path(self.path) / name).is_file()), None)
            if found is not None:
                return found
            raise ValueError(f"path: {self.path} has no {' or '.join(names)}, expected the files of ImageReward")
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError

        reason: Exception | None = None
        for name in names:
            try:
                return Path(hf_hub_download(self.path, name, revision=self.revision))
            except EntryNotFoundError as error:
                reason = error
            except (HfHubHTTPError, HFValidationError, OSError) as error:
                reason = error
                break
        raise ValueError(
            f"path: got {self.path!r}, which gives no {' or '.join(names)} ({reason}); expected a local folder or a "
            "name on the model hub"
        ) from reason


def _renamed(name: str) -> str:
    for old, new in _RENAMED:
        # those without a dot in front are beginnings: "mlp." is also a part of every block
        if old.startswith(".") or name.startswith(old):
            name = name.replace(old, new, 1)
    return name
