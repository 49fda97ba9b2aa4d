"""Quality measures that are no rewards, and the drift from the pretrained model."""

from __future__ import annotations

import torch
from torch import Tensor


def moments_by_class(features: Tensor, labels: Tensor, classes: int) -> dict[str, Tensor]:
    """Count, mean and second moment of real pages' features per class, from which any mixture's moments follow."""
    groups = [features[labels == label].double() for label in range(classes)]
    return {
        "real.count": torch.tensor([len(group) for group in groups]),
        "real.mean": torch.stack([group.mean(0) for group in groups]).float(),
        "real.second": torch.stack([group.T @ group / len(group) for group in groups]).float(),
    }


def mixture(mean: Tensor, second: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and covariance (float64) of an equal mixture of ``classes`` (with repetitions)."""
    centre = mean[classes].double().mean(0)
    return centre, second[classes].double().mean(0) - torch.outer(centre, centre)


def frechet(features: Tensor, centre: Tensor, covariance: Tensor) -> float:
    """Squared Frechet distance of Gaussians fitted to ``features`` ``[B, D]`` and given by their moments.

    ``|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))`` (Heusel et al., arXiv 1706.08500), in units of the features. NaN
    where the product of the covariances is not finite: a model that lost its numbers has no distance.
    """
    own = features.double()
    difference = own.mean(0) - centre
    spread = torch.cov(own.T)
    product = spread @ covariance
    if not product.isfinite().all():
        # LAPACK may crash on such a matrix, error or none
        return float("nan")
    # eigenvalues of a product of two positive semi-definite matrices are real and >= 0
    root = torch.linalg.eigvals(product).real.clamp_min(0).sqrt().sum()
    return float(difference.square().sum() + torch.trace(spread) + torch.trace(covariance) - 2 * root)


def diversity(features: Tensor, per_prompt: int) -> float:
    """Mean distance between two pages of one prompt; ``features`` ``[prompts * per_prompt, D]``, prompts adjacent."""
    grouped = features.unflatten(0, (-1, per_prompt))
    pairs = per_prompt * (per_prompt - 1)
    return float((torch.cdist(grouped, grouped).sum((1, 2)) / pairs).mean())
