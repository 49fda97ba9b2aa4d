"""Who scores pages: a linear judge that can be hacked, and the fixed features behind the quality measures."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from examples.digits.judge import Judge

# rank of the space in which Frechet distances are taken; a few hundred pages give a stable covariance there
FEATURE_RANK = 16


@dataclass(frozen=True)
class LinearJudge:
    """Logistic regression on 16x16 ink maps of clean pages, as a reward that has no ceiling.

    The score is the margin of the asked class over the best other one, in units of the mean margin of real pages. What
    a linear map likes best is no digit and no shape, so chasing the score spoils the pages.

    Attributes:
        weight: ``[classes, 256]``; ``bias``: ``[classes]``; ``unit``: the mean margin of real pages.
    """

    weight: Tensor
    bias: Tensor
    unit: float

    def __call__(self, ink: Tensor, asked: Tensor) -> Tensor:
        """``[B]`` scores of ink maps ``[B, 1, H, W]``, 1 for a typical real page, below 0 for a misread one."""
        pixels = F.adaptive_avg_pool2d(ink, 16).flatten(1)
        logits = pixels @ self.weight.T + self.bias
        own = logits.gather(1, asked[:, None])[:, 0]
        others = logits.scatter(1, asked[:, None], -torch.inf).amax(1)
        return (own - others) / self.unit

    @classmethod
    def fit(cls, ink: Tensor, labels: Tensor, classes: int, *, steps: int = 500, decay: float = 1e-3) -> LinearJudge:
        """Full-batch logistic regression with a ridge of ``decay``; no randomness."""
        pixels = F.adaptive_avg_pool2d(ink, 16).flatten(1)
        weight = torch.zeros(classes, pixels.shape[1], requires_grad=True)
        bias = torch.zeros(classes, requires_grad=True)
        optimizer = torch.optim.Adam([weight, bias], lr=0.02)
        for _ in range(steps):
            loss = F.cross_entropy(pixels @ weight.T + bias, labels) + decay * weight.square().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        judge = cls(weight.detach(), bias.detach(), 1.0)
        return cls(judge.weight, judge.bias, float(judge(ink, labels).mean()))


@dataclass(frozen=True)
class FeatureSpace:
    """The last hidden layer of a convolutional judge that gives no reward, projected to a few directions.

    Attributes:
        judge: reads ``[B, 1, size, size]`` ink maps.
        centre: ``[D]``; ``directions``: ``[D, rank]`` principal directions of real pages, scaled to unit variance.
    """

    judge: Judge
    centre: Tensor
    directions: Tensor

    @torch.no_grad()
    def __call__(self, ink: Tensor) -> Tensor:
        """Features ``[B, rank]`` of ink maps."""
        return (_hidden(self.judge, ink) - self.centre) @ self.directions

    @torch.no_grad()
    def reads(self, ink: Tensor, asked: Tensor) -> Tensor:
        """``[B]`` bool: is the asked class what the judge finds most likely?"""
        return self.judge(_resize(self.judge, ink)).argmax(1) == asked

    @classmethod
    @torch.no_grad()
    def fit(cls, judge: Judge, ink: Tensor) -> FeatureSpace:
        """The principal directions of real pages' features.

        Raises:
            ValueError: a feature is not finite.
        """
        hidden = _hidden(judge, ink)
        if not hidden.isfinite().all():
            raise ValueError("ink: the judge's features of these pages are not finite, so they have no directions")
        centre = hidden.mean(0)
        _, scale, directions = torch.linalg.svd(hidden - centre, full_matrices=False)
        spread = scale[:FEATURE_RANK] / (len(hidden) - 1) ** 0.5
        return cls(judge, centre, directions[:FEATURE_RANK].T / spread)


def _resize(judge: Judge, ink: Tensor) -> Tensor:
    return F.adaptive_avg_pool2d(ink, judge.config["image_size"])


def _hidden(judge: Judge, ink: Tensor) -> Tensor:
    return judge.features(_resize(judge, ink) * 2 - 1).flatten(1)
