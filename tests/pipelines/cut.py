"""The states a pipeline's callback sees, in the form its scheduler steps on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def cut_to_latent(state: Tensor, latent: Sequence[int]) -> Tensor:
    """``[B, *latent]`` of a state: its first entries along every dim, and packed tokens in their places, where what is
    given, such as a first frame, comes before."""
    if state.ndim == len(latent) + 1:
        return state[(slice(None), *(slice(size) for size in latent))]
    places = torch.Size(latent[2:]).numel()
    if state.ndim == 3 and state.shape[2] == latent[0] and state.shape[1] % places == 0:
        return state.transpose(1, 2).unflatten(2, (-1, *latent[2:]))[:, :, -latent[1] :]
    return state.reshape(len(state), *latent)
