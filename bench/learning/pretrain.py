"""Makes what runs start from: the shapes transformer, both tasks' judges, and the moments of real pages.

    OMP_NUM_THREADS=1 python -m bench.learning pretrain

writes ``bench/learning/checkpoints``; the digits transformer and its convolutional judge are the example's.
"""

from __future__ import annotations

import copy
import math
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from examples.digits.judge import Judge

from . import shapes
from .judges import FeatureSpace, LinearJudge
from .measures import moments_by_class
from .paths import CHECKPOINTS, EXAMPLE


def digits_pages() -> tuple[Tensor, Tensor]:
    """All real digits ``[1797, 1, 16, 16]`` in [0, 1] and their labels."""
    # the example's scripts import each other by bare names
    sys.path.append(str(EXAMPLE))
    from examples.digits.pretrain import load_images

    return load_images()


def shape_pages(count: int, seed: int) -> tuple[Tensor, list[str]]:
    """``count`` rendered pages of random captions."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(shapes.CAPTIONS), (count,), generator=generator).tolist()
    captions = [shapes.CAPTIONS[index] for index in chosen]
    return shapes.draw_pages(captions, generator), captions


def train_transformer(steps: int, batch: int, learning_rate: float, seed: int) -> shapes.ShapesTransformer:
    """Flow matching on rendered pages; returns the moving average of the weights."""
    torch.manual_seed(seed)
    transformer = shapes.make_transformer()
    average = copy.deepcopy(transformer).requires_grad_(False)
    optimizer = torch.optim.AdamW(transformer.parameters(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min(1, (i + 1) / 50) * 0.5 * (1 + math.cos(math.pi * i / steps))
    )
    started, losses = time.perf_counter(), []
    for step in range(steps):
        pages, captions = shape_pages(batch, seed * 1_000_003 + step)
        clean, noise = pages * 2 - 1, torch.randn(batch, 3, shapes.SIZE, shapes.SIZE)
        # more of the noisy levels, where the page is decided
        sigma = torch.rand(batch).sqrt().clamp_min(0.05)
        noisy = torch.lerp(clean, noise, sigma[:, None, None, None])
        vectors = shapes.caption_vectors(captions)
        # a tenth of the captions is dropped, for guidance
        vectors = torch.where(torch.rand(batch, 1) < 0.1, shapes.no_caption(batch), vectors)
        velocity = transformer(
            noisy, timestep=sigma * 1000, encoder_hidden_states=vectors[:, None], pooled_projections=vectors
        ).sample
        # the squared error of the page over sigma: between that of the velocity and that of the page
        weight = sigma[:, None, None, None]
        loss = ((velocity - (noise - clean)).square() * weight).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(transformer.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            decay = min(0.998, (1 + step) / (10 + step))
            torch._foreach_lerp_(list(average.parameters()), list(transformer.parameters()), 1 - decay)
        losses.append(loss.item())
        if (step + 1) % 100 == 0:
            mean = sum(losses[-100:]) / 100
            print(f"transformer {step + 1}/{steps}  loss {mean:.4f}  {time.perf_counter() - started:.0f} s", flush=True)
    return average.half()


def train_judge(steps: int, batch: int, seed: int) -> Judge:
    """The convolutional judge of shapes, on ink maps with noise, blur, other contrast and a share of scrambled ones."""
    torch.manual_seed(seed)
    judge = Judge(image_size=32, width=8, num_classes=len(shapes.SHAPES))
    optimizer = torch.optim.AdamW(judge.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        pages, captions = shape_pages(batch, seed * 1_000_003 + 500_000 + step)
        ink = F.adaptive_avg_pool2d(shapes.ink_of(pages), 32)
        blurred = F.avg_pool2d(ink, 3, stride=1, padding=1)
        ink = torch.lerp(ink, blurred, torch.rand(batch, 1, 1, 1)) * (0.5 + 0.7 * torch.rand(batch, 1, 1, 1))
        ink = (ink + 0.15 * torch.rand(batch, 1, 1, 1) * torch.randn_like(ink)).clamp(0, 1)
        target = F.one_hot(shapes.caption_indices(captions)[0], len(shapes.SHAPES)).float()
        # ink at the wrong places: no answer is right
        eighth = batch // 8
        order = torch.rand(eighth, 16).argsort(1)[:, None, :].expand(-1, 64, -1)
        ink[:eighth] = F.fold(F.unfold(ink[:eighth], 8, stride=8).gather(2, order), 32, 8, stride=8)
        target[:eighth] = 1 / len(shapes.SHAPES)
        loss = F.cross_entropy(judge(ink), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % 100 == 0:
            print(f"judge {step + 1}/{steps}  loss {loss.item():.4f}", flush=True)
    return judge.eval().requires_grad_(False)


def scorers(judge: Judge, ink: Tensor, labels: Tensor, classes: int) -> dict[str, Tensor]:
    """Tensors of the linear judge, the feature space and real pages' moments by class."""
    linear, features = LinearJudge.fit(ink, labels, classes), FeatureSpace.fit(judge, ink)
    return {
        "linear.weight": linear.weight,
        "linear.bias": linear.bias,
        "linear.unit": torch.tensor(linear.unit),
        "features.centre": features.centre,
        "features.directions": features.directions.contiguous(),
        **moments_by_class(features(ink), labels, classes),
    }


def make(folder: Path = CHECKPOINTS, *, steps: int, judge_steps: int, seed: int = 0) -> None:
    """Everything, in a few minutes on one core."""
    folder.mkdir(parents=True, exist_ok=True)
    pages, labels = digits_pages()
    example_judge = Judge.from_pretrained(EXAMPLE / "checkpoint")
    save_file(scorers(example_judge, pages, labels, 10), folder / "digits_scorers.safetensors")

    judge = train_judge(judge_steps, 64, seed)
    judge.save_pretrained(folder / "shapes_judge")
    pages, captions = shape_pages(2000, seed * 1_000_003 + 900_000)
    asked = shapes.caption_indices(captions)[0]
    ink = shapes.ink_of(pages)
    save_file(scorers(judge, ink, asked, len(shapes.SHAPES)), folder / "shapes_scorers.safetensors")

    transformer = train_transformer(steps, 48, 2e-3, seed)
    transformer.save_pretrained(folder / "shapes_transformer")
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"wrote {folder} ({size / 1e6:.2f} MB)")
