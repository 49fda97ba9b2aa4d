"""What rewards with a network have in common: loaded at first use, moved to a device, evaluated in micro-batches."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, get_args

import torch
from torch import Tensor, nn
from typing_extensions import Self

from .images import DEFAULT_FRAMES, check_all_positive
from .preprocess import Preprocess, Preprocessor, prepare

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class ModelReward:
    """A reward around a network.

    The network is loaded by the first call or by :meth:`load`, onto the device given to :meth:`to`, or onto that of
    the images where none was given.

    Args:
        dtype: of the network's weights: ``"float32"``, ``"bfloat16"``, ``"float16"`` or one of these torch dtypes.
            Embeddings are normalised and compared in float32 whatever it is.
        batch_size: images or prompts per call of the network.
        frames: frames of a video that are scored (:func:`~.images.select_frames`); the reward is their mean.
        preprocess: ``"torch"`` does the image processor's work on the device, ``"processor"`` runs it, on the CPU.

    Raises:
        ValueError: settings out of range, or a model that cannot be loaded.
    """

    def __init__(
        self,
        *,
        dtype: str | torch.dtype = "float32",
        batch_size: int = 32,
        frames: int = DEFAULT_FRAMES,
        preprocess: Preprocess = "torch",
    ):
        check_all_positive(batch_size=batch_size, frames=frames)
        chosen = _DTYPES.get(dtype) if isinstance(dtype, str) else dtype
        if chosen not in _DTYPES.values():
            raise ValueError(f"dtype: got {dtype!r}, expected one of {', '.join(_DTYPES)}")
        if preprocess not in get_args(Preprocess):
            raise ValueError(f"preprocess: got {preprocess!r}, expected 'torch' or 'processor'")
        self.dtype: torch.dtype = chosen  # type: ignore[assignment]
        self.batch_size, self.frames, self.preprocess = batch_size, frames, preprocess
        self.device: torch.device | None = None
        self.processor: Any = None
        self._own: Preprocessor | None = None
        self._model: nn.Module | None = None

    def to(self, device: torch.device | str) -> Self:
        """Moves the network, now or when it is loaded; ``"cpu"`` frees the accelerator's memory."""
        self.device = torch.device(device)
        if self._model is not None:
            self._model.to(self.device)
        return self

    def load(self, device: torch.device | str = "cpu") -> nn.Module:
        """The network, in evaluation mode and without gradients; ``device`` counts where :meth:`to` gave none."""
        if self._model is None:
            self.device = self.device or torch.device(device)
            model = self._load()
            if self.processor is not None and self.preprocess == "torch":
                self._own = Preprocessor(self.processor.to_dict())
            self._model = model.eval().requires_grad_(False).to(self.device)
        return self._model

    def _load(self) -> nn.Module:
        """Builds the network on the CPU and sets ``processor`` if images need one."""
        raise NotImplementedError

    def _prepare(self, pixels: Tensor) -> Tensor:
        """``[N, C, H, W]`` pixels as the network takes them."""
        assert self.device is not None
        return prepare(pixels, self.processor, self.preprocess, self._own, self.device).to(self.dtype)

    def _map(self, function: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
        """``function`` on micro-batches of ``rows``, float32."""
        return torch.cat([function(part).float() for part in rows.split(self.batch_size)])


def from_pretrained(kind: Any, path: str, what: str, **options: Any) -> Any:
    """``kind.from_pretrained(path)`` of transformers, without code from the model's folder.

    Raises:
        ValueError: nothing that can be loaded there.
    """
    try:
        return kind.from_pretrained(os.path.expanduser(path), trust_remote_code=False, **options)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"path: got {path!r}, which gives no {what} ({error}); expected a local folder or a name on the model hub, "
            "with weights in safetensors"
        ) from error


def load_network(kind: Any, path: str, what: str, dtype: torch.dtype, revision: str | None) -> nn.Module:
    """A network of transformers from safetensors (never from pickled weights), on the CPU."""
    return from_pretrained(kind, path, what, use_safetensors=True, revision=revision).to(dtype)
