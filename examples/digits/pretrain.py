"""Train the digits transformer and its judge from scikit-learn's digit images, and save both.

    OMP_NUM_THREADS=1 python examples/digits/pretrain.py

takes about 8 minutes on one core and writes ``examples/digits/checkpoint``. The data are the 1,797 images of the
"Optical Recognition of Handwritten Digits" test set that scikit-learn ships, 8x8, drawn here as 12x12 on a 16x16 page.
Flow matching: ``x_sigma = (1 - sigma) * data + sigma * noise``, the target is the velocity ``noise - data``.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from judge import Judge
from pipeline import DigitsPipeline
from sklearn.datasets import load_digits

IMAGE_SIZE = 16
NUM_DIGITS = 10


def load_images() -> tuple[torch.Tensor, torch.Tensor]:
    """Images ``[1797, 1, 16, 16]`` in [0, 1] (1 = ink) and labels ``[1797]``."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    images = F.interpolate(images, size=12, mode="bicubic", align_corners=False).clamp(0, 1)
    return F.pad(images, (2, 2, 2, 2)), torch.tensor(digits.target)


def split(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices of four fifths that classifiers are trained on and of the held-out fifth; always the same ones."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    return order[count // 5 :], order[: count // 5]


def make_transformer(hidden: int = 64, heads: int = 4, layers: int = 5) -> SD3Transformer2DModel:
    """A small SD3 transformer whose blocks are identities at the start (adaLN-Zero) and whose output is zero."""
    transformer = SD3Transformer2DModel(
        sample_size=IMAGE_SIZE,
        patch_size=4,
        in_channels=1,
        out_channels=1,
        num_layers=layers,
        num_attention_heads=heads,
        attention_head_dim=hidden // heads,
        caption_projection_dim=hidden,
        joint_attention_dim=NUM_DIGITS + 1,
        pooled_projection_dim=NUM_DIGITS + 1,
        pos_embed_max_size=IMAGE_SIZE // 4,
    )
    zeroed = [transformer.norm_out.linear, transformer.proj_out]
    for block in transformer.transformer_blocks:
        zeroed += [block.norm1.linear, block.norm1_context.linear]
    for linear in zeroed:
        torch.nn.init.zeros_(linear.weight)
        torch.nn.init.zeros_(linear.bias)
    return transformer


def train_transformer(
    transformer: SD3Transformer2DModel,
    images: torch.Tensor,
    labels: torch.Tensor,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
) -> SD3Transformer2DModel:
    """Flow-matching training; returns the exponential moving average of the weights."""
    data = images * 2 - 1
    average = copy.deepcopy(transformer).requires_grad_(False)
    optimizer = torch.optim.AdamW(transformer.parameters(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min(1, (i + 1) / 100) * 0.5 * (1 + math.cos(math.pi * i / steps))
    )
    start, losses = time.perf_counter(), []
    for step in range(steps):
        index = torch.randint(len(data), (batch_size,))
        clean, noise = data[index], torch.randn(batch_size, *data.shape[1:])
        sigma = torch.rand(batch_size)
        noisy = torch.lerp(clean, noise, sigma[:, None, None, None])
        # a tenth of the labels becomes "no digit", for guidance
        asked = torch.where(torch.rand(batch_size) < 0.1, NUM_DIGITS, labels[index])
        embeds = F.one_hot(asked, NUM_DIGITS + 1).float()
        velocity = transformer(
            hidden_states=noisy,
            timestep=sigma * 1000,
            encoder_hidden_states=embeds[:, None],
            pooled_projections=embeds,
        ).sample
        loss = F.mse_loss(velocity, noise - clean)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(transformer.parameters(), 1.0)
        optimizer.step()
        schedule.step()

        decay = min(0.999, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(transformer.parameters()), 1 - decay)
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
    judge = Judge(IMAGE_SIZE, num_classes=NUM_DIGITS)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    eighth = batch_size // 8
    start, losses = time.perf_counter(), []
    for step in range(steps):
        index = torch.randint(len(images), (batch_size,))
        batch = distort(images[index])
        target = F.one_hot(labels[index], NUM_DIGITS).float()
        # two digits on one page, either may be the answer
        batch[:eighth] = torch.maximum(batch[:eighth], batch[eighth : 2 * eighth])
        target[:eighth] = (target[:eighth] + target[eighth : 2 * eighth]) / 2
        # ink in the amounts of digits at the wrong places, no answer is right
        order = torch.rand(eighth, 16).argsort(1)[:, None, :].expand(-1, 16, -1)
        patches = F.unfold(batch[-eighth:], 4, stride=4).gather(2, order)
        empty = (torch.rand(eighth, 1, 1, 1) < 0.2).float()
        batch[-eighth:] = F.fold(patches, IMAGE_SIZE, 4, stride=4) * (1 - empty)
        target[-eighth:] = 1 / NUM_DIGITS
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


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the digits transformer and its judge.")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "checkpoint")
    parser.add_argument("--steps", type=int, default=4000, help="optimizer steps of the transformer")
    parser.add_argument("--judge-steps", type=int, default=2500, help="optimizer steps of the judge")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    images, labels = load_images()
    train, held_out = split(len(images))
    judge = train_judge(images[train], labels[train], steps=args.judge_steps, batch_size=256)
    with torch.no_grad():
        accuracy = (judge(images[held_out]).argmax(1) == labels[held_out]).float().mean().item()
    print(f"judge reads {accuracy:.1%} of {len(held_out)} held-out digits")

    torch.manual_seed(args.seed)
    transformer = make_transformer()
    average = train_transformer(transformer, images, labels, steps=args.steps, batch_size=128, learning_rate=2e-3)
    # half precision halves the files; the pipeline loads them as float32
    pipeline = DigitsPipeline(average.half(), FlowMatchEulerDiscreteScheduler(shift=1.0))
    pipeline.save_pretrained(args.output)
    judge.save_pretrained(args.output)
    size = sum(path.stat().st_size for path in args.output.rglob("*") if path.is_file())
    print(f"wrote {args.output} ({size / 1e6:.2f} MB); check it with examples/digits/evaluate.py")


if __name__ == "__main__":
    main()
