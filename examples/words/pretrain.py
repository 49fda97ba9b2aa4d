"""Pre-train the transformer that draws words, from fonts that matplotlib ships, and save its pipeline.

    OMP_NUM_THREADS=1 python examples/words/pretrain.py

Flow matching: ``x_sigma = (1 - sigma) * data + sigma * noise``, the target is the velocity ``noise - data``. Most
words are strings of random letters, so that letters are learned and not words. Held-out words, those for choosing
settings and the withheld combinations of word and typeface are never drawn. It prints what it cost in CPU seconds.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from pipeline import LENGTHS, POOLED_WIDTH, TOKEN_WIDTH, TYPEFACES, WordsPipeline, embed
from render import WIDTH, render
from vocabulary import HELD_OUT, TRAIN, TUNING, WITHHELD

UNSEEN = {*HELD_OUT, *TUNING}


def make_transformer(hidden: int = 96, heads: int = 6, layers: int = 5, patch: int = 6) -> SD3Transformer2DModel:
    """A small SD3 transformer whose blocks are identities at the start (adaLN-Zero) and whose output is zero."""
    transformer = SD3Transformer2DModel(
        sample_size=WIDTH,
        patch_size=patch,
        in_channels=1,
        out_channels=1,
        num_layers=layers,
        num_attention_heads=heads,
        attention_head_dim=hidden // heads,
        caption_projection_dim=hidden,
        joint_attention_dim=TOKEN_WIDTH,
        pooled_projection_dim=POOLED_WIDTH,
        pos_embed_max_size=WIDTH // patch,
    )
    zeroed = [transformer.norm_out.linear, transformer.proj_out]
    for block in transformer.transformer_blocks:
        zeroed += [block.norm1.linear, block.norm1_context.linear]
    for linear in zeroed:
        torch.nn.init.zeros_(linear.weight)
        torch.nn.init.zeros_(linear.bias)
    return transformer


def draw_words(rng: random.Random, count: int) -> list[tuple[str, str]]:
    """Words and typefaces of one batch: a third from the vocabulary, the others of random letters."""
    letters, lengths = "".join(TRAIN), [len(word) for word in TRAIN]
    asked: list[tuple[str, str]] = []
    while len(asked) < count:
        face = rng.choice(list(TYPEFACES))
        if rng.random() < 1 / 3:
            word = rng.choice(TRAIN)
        else:
            # half as often as in words, half all alike
            source = letters if rng.random() < 0.5 else "abcdefghijklmnopqrstuvwxyz"
            word = "".join(rng.choices(source, k=rng.choice(lengths + list(LENGTHS) * 40)))
        if word not in UNSEEN and WITHHELD.get(word) != face:
            asked.append((word, face))
    return asked


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "checkpoint")
    parser.add_argument("--steps", type=int, default=6000, help="optimizer steps")
    parser.add_argument("--minutes", type=float, help="end after so much time of the clock instead, whatever the steps")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--save-every", type=int, default=250, help="steps between saved averages")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--state", type=Path, help="file of the run's state: an interrupted run continues from it")
    parser.add_argument("--curve", type=Path, help="file that gets a line of JSON whenever an average is saved")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    transformer = make_transformer()
    print(f"{sum(p.numel() for p in transformer.parameters()):,} weights", flush=True)
    average = copy.deepcopy(transformer).requires_grad_(False)
    optimizer = torch.optim.AdamW(transformer.parameters(), lr=args.learning_rate, betas=(0.9, 0.99), weight_decay=0.01)
    losses: list[float] = []
    first, spent = 0, 0.0
    if args.state is not None and args.state.exists():
        state = torch.load(args.state, weights_only=False)
        transformer.load_state_dict(state["transformer"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["torch_rng"])
        rng.setstate(state["rng"])
        first, spent = state["step"], state["cpu_seconds"]
    started, step, done = time.perf_counter(), first, False
    while not done:
        passed = step / args.steps
        if args.minutes is not None:
            passed = min(1.0, (time.perf_counter() - started) / (60 * args.minutes))
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * rate(step, passed)
        asked = draw_words(rng, args.batch_size)
        pages = np.stack([render(word, face, rng) for word, face in asked])
        clean = torch.from_numpy(pages).float()[:, None] / 127.5 - 1
        noise, sigma = torch.randn_like(clean), torch.sigmoid(torch.randn(args.batch_size))
        # a tenth asks for nothing, for guidance
        tokens, pooled = embed([None if rng.random() < 0.1 else entry for entry in asked])
        velocity = transformer(
            hidden_states=torch.lerp(clean, noise, sigma[:, None, None, None]),
            timestep=sigma * 1000,
            encoder_hidden_states=tokens,
            pooled_projections=pooled,
        ).sample
        loss = F.mse_loss(velocity, noise - clean)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(transformer.parameters(), 1.0)
        optimizer.step()

        decay = min(0.999, (1 + step) / (10 + step))
        step += 1
        done = passed == 1.0 if args.minutes is not None else step >= args.steps
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(transformer.parameters()), 1 - decay)
        losses.append(loss.item())
        if step % args.save_every == 0 or done:
            recent = losses[-args.save_every :]
            record = {
                "step": step, "loss": sum(recent) / len(recent), "learning_rate": optimizer.param_groups[0]["lr"],
                "cpu_seconds": spent + time.process_time(),
            }  # fmt: skip
            line = "step {step}  loss {loss:.4f}  rate {learning_rate:.2e}  {cpu_seconds:.0f} CPU s"
            print(line.format(**record), flush=True)
            if args.curve is not None:
                with args.curve.open("a") as file:
                    file.write(json.dumps(record) + "\n")
            save(average, args.output)
            if args.state is not None:
                state = {
                    "transformer": transformer.state_dict(), "average": average.state_dict(),
                    "optimizer": optimizer.state_dict(), "torch_rng": torch.get_rng_state(), "rng": rng.getstate(),
                    "step": step, "cpu_seconds": record["cpu_seconds"],
                }  # fmt: skip
                torch.save(state, args.state)
    size = sum(path.stat().st_size for path in args.output.rglob("*") if path.is_file())
    print(f"wrote {args.output} ({size / 1e6:.2f} MB); check it with examples/words/evaluate.py")


def rate(step: int, passed: float) -> float:
    """Factor of the learning rate: 100 steps of warm-up, constant for a third of the run, then straight to 0."""
    return min(1.0, (step + 1) / 100, 1.5 * (1 - passed))


def save(transformer: SD3Transformer2DModel, folder: Path) -> None:
    """The pipeline in half precision, which it is loaded from as float32."""
    half = copy.deepcopy(transformer).half()
    WordsPipeline(half, FlowMatchEulerDiscreteScheduler(shift=1.0)).save_pretrained(folder)


if __name__ == "__main__":
    main()
