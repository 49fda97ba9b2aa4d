"""Does a local image classifier see the class that was asked for?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .images import scored_pixels
from .models import ModelReward, from_pretrained, load_network


class ClassifierReward(ModelReward):
    """Log-probability (or probability) of the asked class; float32 ``[B]``; the mean over frames for videos.

    Args:
        classifier: name on the model hub or local folder of an image classifier of transformers, or a module or
            function that maps float32 pixels ``[N, C, H, W]`` in [0, 1] to ``[N, classes]`` logits or
            log-probabilities. A module is put into evaluation mode and without gradients.
        key: where a sample's metadata has the class; None takes the prompt as the class.
        labels: names of the classes to their numbers; by default those of the transformers model. A class is given by
            its number, by its name, or by its number as text.
        output: ``"log_prob"`` in (-inf, 0] or ``"prob"`` in [0, 1].
        revision: of the model on the hub.
        options: see :class:`~.models.ModelReward`; ``preprocess`` counts for transformers models only, modules
            get the pixels as they are, and a function (no module) runs in float32 on the images' device.

    Raises:
        ValueError: a sample without a class, an unknown class, or an answer of another shape.
    """

    def __init__(
        self,
        classifier: str | nn.Module | Callable[[Tensor], Tensor],
        *,
        key: str | None = "class",
        labels: Mapping[str, int] | None = None,
        output: Literal["log_prob", "prob"] = "log_prob",
        revision: str | None = None,
        **options: Any,
    ):
        super().__init__(**options)
        if output not in ("log_prob", "prob"):
            raise ValueError(f"output: got {output!r}, expected 'log_prob' or 'prob'")
        self.classifier, self.key, self.output, self.revision = classifier, key, output, revision
        self.labels = dict(labels or {})

    @torch.no_grad()
    def __call__(self, images: Any, prompts: Sequence[Any], metadata: Sequence[dict]) -> Tensor:
        pixels = scored_pixels(images, prompts, self.frames)
        network = self.load(pixels.device)
        logits = self._map(lambda part: self._classify(network, part), pixels.flatten(0, 1))
        if logits.ndim != 2 or len(logits) != pixels.shape[:2].numel():
            raise ValueError(f"classifier: got shape {list(logits.shape)}, expected [images, classes]")
        classes = [self._class(place, prompts, metadata, logits.shape[1]) for place in range(len(prompts))]
        # of log-probabilities this is the identity
        log_prob = F.log_softmax(logits, dim=-1).unflatten(0, pixels.shape[:2])
        asked = torch.tensor(classes, device=logits.device)[:, None, None].expand(-1, log_prob.shape[1], 1)
        chosen = log_prob.gather(-1, asked)[..., 0]
        return (chosen.exp() if self.output == "prob" else chosen).mean(1)

    def _load(self) -> nn.Module:
        if isinstance(self.classifier, nn.Module):
            return self.classifier.to(self.dtype)
        if not isinstance(self.classifier, str):
            return _Function(self.classifier)
        from transformers import AutoImageProcessor, AutoModelForImageClassification

        self.processor = from_pretrained(AutoImageProcessor, self.classifier, "image processor", revision=self.revision)
        network: Any = load_network(
            AutoModelForImageClassification, self.classifier, "image classifier", self.dtype, self.revision
        )
        self.labels = self.labels or dict(network.config.label2id)
        return network

    def _classify(self, network: nn.Module, pixels: Tensor) -> Tensor:
        if self.processor is not None:
            return network(pixel_values=self._prepare(pixels)).logits
        if isinstance(network, _Function):
            return network(pixels)
        return network(pixels.to(device=self.device, dtype=self.dtype))

    def _class(self, place: int, prompts: Sequence[Any], metadata: Sequence[dict], count: int) -> int:
        if self.key is not None and self.key not in metadata[place]:
            raise ValueError(
                f"metadata: got the keys {sorted(metadata[place])} for sample {place}, expected the class under "
                f"{self.key!r}"
            )
        asked = prompts[place] if self.key is None else metadata[place][self.key]
        number = self.labels.get(asked, asked) if isinstance(asked, str) else asked
        if isinstance(number, str) and number.isdecimal():
            number = int(number)
        if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < count:
            names = f" or one of {', '.join(sorted(self.labels)[:20])}" if self.labels else ""
            raise ValueError(f"class: got {asked!r} for sample {place}, expected a number from 0 to {count - 1}{names}")
        return number


class _Function(nn.Module):
    """A plain function where a module is expected."""

    def __init__(self, function: Callable[[Tensor], Tensor]):
        super().__init__()
        self.function = function

    def forward(self, pixels: Tensor) -> Tensor:
        return self.function(pixels)
