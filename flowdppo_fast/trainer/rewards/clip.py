"""Agreement of image and prompt by CLIP (arXiv 2103.00020), and PickScore (arXiv 2305.01569), which is such a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .images import check_texts, scored_pixels
from .models import ModelReward, from_pretrained, load_network


class CLIPScore(ModelReward):
    """Cosine of the CLIP embeddings of image and prompt, times ``scale``; float32 ``[B]`` on the model's device.

    Prompts are cut to the length that the model takes (77 tokens). Equal prompts are embedded once per call.

    Args:
        path: name on the model hub or local folder of a CLIP model with safetensors weights.
        processor: where the tokenizer and the image processor are, if not with the model.
        scale: factor on the cosine; 2.5 with negative values cut off is the CLIPScore of arXiv 2104.08718.
        revision: of the model on the hub.
        options: see :class:`~.models.ModelReward`.

    Raises:
        TypeError: a prompt that is no text. ValueError: as :class:`~.models.ModelReward` and
            :func:`~.images.scored_pixels`.
    """

    default_path = "openai/clip-vit-large-patch14"

    def __init__(
        self,
        path: str | None = None,
        *,
        processor: str | None = None,
        scale: float = 1.0,
        revision: str | None = None,
        **options: Any,
    ):
        super().__init__(**options)
        self.path = str(path or self.default_path)
        self.processor_path = str(processor or self.path)
        self.scale, self.revision = scale, revision
        self.tokenizer: Any = None

    @torch.no_grad()
    def __call__(self, images: Any, prompts: Sequence[str], metadata: Sequence[dict] | None = None) -> Tensor:
        pixels = scored_pixels(images, prompts, self.frames)
        check_texts(prompts)
        model: Any = self.load(pixels.device)
        image = self._map(lambda part: self._embed_images(model, part), pixels.flatten(0, 1))
        distinct = list(dict.fromkeys(prompts))
        text = self._map(lambda part: self._embed_texts(model, part), self._tokens(distinct))
        place = {prompt: number for number, prompt in enumerate(distinct)}
        text = text[torch.tensor([place[prompt] for prompt in prompts], device=text.device)]
        cosine = (F.normalize(image, dim=-1).unflatten(0, pixels.shape[:2]) * F.normalize(text, dim=-1)[:, None]).sum(
            -1
        )
        return self._scale(model) * cosine.mean(1)

    def _load(self) -> nn.Module:
        from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

        revision = {"revision": self.revision} if self.processor_path == self.path else {}
        self.processor = from_pretrained(AutoImageProcessor, self.processor_path, "image processor", **revision)
        self.tokenizer = from_pretrained(AutoTokenizer, self.processor_path, "tokenizer", **revision)
        model: Any = load_network(CLIPModel, self.path, "CLIP model", torch.float32, self.revision)
        # read before the weights are rounded: it is the logarithm of a factor
        self._temperature = model.logit_scale.detach().double().exp().item()
        return model.to(self.dtype)

    def _scale(self, model: nn.Module) -> float:
        return self.scale

    def _embed_images(self, model: Any, pixels: Tensor) -> Tensor:
        pooled = model.vision_model(pixel_values=self._prepare(pixels)).pooler_output
        return model.visual_projection(pooled).float()

    def _tokens(self, prompts: Sequence[str]) -> Tensor:
        """``[N, 2, length]`` token ids and attention mask; one length for all, so that no row depends on others."""
        model: Any = self._model
        length = model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        )
        return torch.stack([tokens["input_ids"], tokens["attention_mask"]], dim=1)

    def _embed_texts(self, model: Any, tokens: Tensor) -> Tensor:
        ids, mask = tokens.to(self.device).unbind(1)
        return model.text_projection(model.text_model(input_ids=ids, attention_mask=mask).pooler_output).float()


class PickScore(CLIPScore):
    """The cosine times the model's own learned factor, times ``scale``: the score of PickScore as published.

    Values of the published model are near 20; trainers divide by 26 (``scale=1 / 26``) to be near 1.

    Args:
        path: as in :class:`CLIPScore`; by default the published model, with the processor of the CLIP-H that it was
            made from.
    """

    default_path = "yuvalkirstain/PickScore_v1"

    def __init__(self, path: str | None = None, *, processor: str | None = None, **options: Any):
        if path in (None, self.default_path) and processor is None:
            processor = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
        super().__init__(path, processor=processor, **options)

    def _scale(self, model: nn.Module) -> float:
        return self.scale * self._temperature


class HPSv2Score(CLIPScore):
    """The cosine times ``scale``: the human preference score v2 (arXiv 2306.09341), about 0.2 to 0.35 as published.

    Images that are not square are put onto a black square first, as the published code does; nothing is cut off.

    Args:
        path: as in :class:`CLIPScore`, of a CLIP-H with HPSv2's weights in transformers' format; by default a
            conversion by others of version 2.0. The processor is that of the CLIP-H that it was made from.
    """

    default_path = "adams-story/HPSv2-hf"

    def __init__(self, path: str | None = None, *, processor: str | None = None, **options: Any):
        if path in (None, self.default_path) and processor is None:
            processor = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
        super().__init__(path, processor=processor, **options)

    def _prepare(self, pixels: Tensor) -> Tensor:
        height, width = pixels.shape[-2:]
        rows, columns = max(width - height, 0), max(height - width, 0)
        return super()._prepare(F.pad(pixels, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2)))
