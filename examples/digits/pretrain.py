"""Train the digits transformer and its judge from scikit-learn's digit images, and save both.

    OMP_NUM_THREADS=1 python examples/digits/pretrain.py

takes about 7 minutes on one core and writes ``examples/digits/checkpoint``. The data are the 1,797 images of the "Optical
Recognition of Handwritten Digits" test set that scikit-learn ships, 8x8, drawn here as 12x12 on a 16x16 page. Flow
matching: ``x_sigma = (1 - sigma) * data + sigma * noise``, the target is the velocity ``noise - data``.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler
from judge import Judge
from pipeline import DigitsPipeline
from rewards import BoldReward, ReadableReward, SlantReward
from sklearn.datasets import load_digits
from sklearn.svm import SVC

IMAGE_SIZE = 16
NUM_CLASSES = 10


def load_images() -> tuple[torch.Tensor, torch.Tensor]:
    """Images ``[1797, 1, 16, 16]`` in [0, 1] (1 = ink) and labels ``[1797]``."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    images = F.interpolate(images, size=12, mode="bicubic", align_corners=False).clamp(0, 1)
    return F.pad(images, (2, 2, 2, 2)), torch.tensor(digits.target)


def make_transformer(hidden: int, heads: int, layers: int) -> DiTTransformer2DModel:
    """A small DiT whose output is zero and whose blocks are identities at the start (adaLN-Zero)."""
    transformer = DiTTransformer2DModel(
        num_attention_heads=heads,
        attention_head_dim=hidden // heads,
        in_channels=1,
        num_layers=layers,
        sample_size=IMAGE_SIZE,
        patch_size=4,
        num_embeds_ada_norm=NUM_CLASSES,
        norm_elementwise_affine=False,
    )
    zeroed = [block.norm1.linear for block in transformer.transformer_blocks]
    for linear in [*zeroed, transformer.proj_out_1, transformer.proj_out_2]:
        torch.nn.init.zeros_(linear.weight)
        torch.nn.init.zeros_(linear.bias)
    # evaluation mode: DiT's own label dropout draws in each block on its own, so labels are dropped in the batch here
    return transformer.eval()


def train_transformer(
    transformer: DiTTransformer2DModel,
    images: torch.Tensor,
    labels: torch.Tensor,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
) -> DiTTransformer2DModel:
    """Flow-matching training; returns the exponential moving average of the weights."""
    data = images * 2 - 1
    average = copy.deepcopy(transformer).requires_grad_(False)
    optimizer = torch.optim.AdamW(
        transformer.parameters(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.01
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min(1, (i + 1) / 100) * 0.5 * (1 + math.cos(math.pi * i / steps))
    )
    start, losses = time.perf_counter(), []
    for step in range(steps):
        index = torch.randint(len(data), (batch_size,))
        clean, noise = data[index], torch.randn(batch_size, *data.shape[1:])
        sigma = torch.rand(batch_size)
        noisy = torch.lerp(clean, noise, sigma[:, None, None, None])
        asked = torch.where(torch.rand(batch_size) < 0.1, NUM_CLASSES, labels[index])
        velocity = transformer(noisy, sigma * 1000, asked).sample
        loss = F.mse_loss(velocity, noise - clean)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(transformer.parameters(), 1.0)
        optimizer.step()
        schedule.step()

        decay = min(0.999, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(
                list(average.parameters()), list(transformer.parameters()), 1 - decay
            )
        losses.append(loss.item())
        if (step + 1) % 250 == 0:
            mean = sum(losses[-250:]) / 250
            print(f"transformer {step + 1}/{steps}  loss {mean:.4f}  {time.perf_counter() - start:.0f} s", flush=True)
    return average


def distort(images: torch.Tensor) -> torch.Tensor:
    """Random slant, rotation, size, shift, stroke width, contrast and noise, another for each image."""
    count = len(images)

    def uniform(low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(count)

    angle, slant, scale = uniform(-0.15, 0.15), uniform(-0.7, 0.7), uniform(0.9, 1.25)
    rotation = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).view(-1, 2, 2)
    shear = torch.eye(2).repeat(count, 1, 1)
    shear[:, 0, 1] = slant
    shift = torch.stack([uniform(-0.12, 0.12), uniform(-0.12, 0.12)], 1)[:, :, None]
    theta = torch.cat([scale[:, None, None] * rotation @ shear, shift], 2)
    images = F.grid_sample(images, F.affine_grid(theta, images.shape, align_corners=False), align_corners=False)

    thicker = F.max_pool2d(images, 3, stride=1, padding=1)
    thinner = -F.max_pool2d(-images, 3, stride=1, padding=1)
    weight = uniform(-0.5, 1.0)[:, None, None, None]
    images = torch.where(weight > 0, images.lerp(thicker, weight), images.lerp(thinner, -weight))
    contrast = uniform(0.7, 1.5)[:, None, None, None]
    return (images * contrast + 0.05 * torch.randn_like(images)).clamp(0, 1)


def train_judge(images: torch.Tensor, labels: torch.Tensor, *, steps: int, batch_size: int) -> Judge:
    """Cross-entropy on distorted digits, with images that are no digit or two digits in a quarter of the batch."""
    judge = Judge(IMAGE_SIZE, num_classes=NUM_CLASSES)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    eighth = batch_size // 8
    start, losses = time.perf_counter(), []
    for step in range(steps):
        index = torch.randint(len(images), (batch_size,))
        batch = distort(images[index])
        target = F.one_hot(labels[index], NUM_CLASSES).float()
        # two digits on one page, either may be the answer
        batch[:eighth] = torch.maximum(batch[:eighth], batch[eighth : 2 * eighth])
        target[:eighth] = (target[:eighth] + target[eighth : 2 * eighth]) / 2
        # ink in the amounts of digits at the wrong places, no answer is right
        order = torch.rand(eighth, 16).argsort(1)[:, None, :].expand(-1, 16, -1)
        patches = F.unfold(batch[-eighth:], 4, stride=4).gather(2, order)
        empty = (torch.rand(eighth, 1, 1, 1) < 0.2).float()
        batch[-eighth:] = F.fold(patches, IMAGE_SIZE, 4, stride=4) * (1 - empty)
        target[-eighth:] = 1 / NUM_CLASSES
        loss = F.cross_entropy(judge(batch), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if (step + 1) % 250 == 0:
            mean = sum(losses[-250:]) / 250
            print(f"judge {step + 1}/{steps}  loss {mean:.4f}  {time.perf_counter() - start:.0f} s", flush=True)
    return judge.eval().requires_grad_(False)
