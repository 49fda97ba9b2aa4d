"""Draws two_numbers.svg: log-ratio against KL of rows whose policy moved at random, and what mask and clip drop.

python docs/figures/two_numbers.py
"""

from __future__ import annotations

from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import torch

from flowdppo_fast import row_statistics, sde_schedule

N, ROWS, THRESHOLD = 4096, 600, 1e-5
# the spread of the log-ratio at the threshold
CLIP = (2 * THRESHOLD / N) ** 0.5


def rows() -> tuple[torch.Tensor, torch.Tensor]:
    """KL and log-ratio, mean-reduced, of rows whose velocities changed independently of the noise."""
    torch.manual_seed(0)
    step = sde_schedule("flow_sde", torch.linspace(1, 0, 11).tolist(), eta=0.7)[3]
    old, noise, change = torch.randn(3, ROWS, N, dtype=torch.float64)
    size = torch.logspace(-7, -4, ROWS, dtype=torch.float64).mul(2).sqrt() / abs(step.kl_scale)
    p, q = row_statistics(old + size[:, None] * change, old, noise, step)
    return q / 2, p - q / 2


def main() -> None:
    matplotlib.rcParams.update({"svg.hashsalt": "two_numbers", "font.size": 10})
    kl, log_ratio = rows()
    mask, clip = (kl >= THRESHOLD) & (log_ratio > 0), log_ratio > CLIP
    figure, axis = plt.subplots(figsize=(7.2, 3.8), layout="constrained")
    for chosen, colour, marker, label in (
        (~mask & ~clip, "#8a8a8a", "o", "dropped by neither"),
        (mask & clip, "#222222", "s", "dropped by both"),
        (mask & ~clip, "#0072B2", "^", "by the mask only: far, and moving on"),
        (clip & ~mask, "#D55E00", "v", "by the clip only: near, and noise"),
    ):
        axis.plot(
            kl[chosen], log_ratio[chosen], marker, color=colour, markersize=3.5, label=f"{label} ({chosen.sum()})"
        )
    axis.axvline(THRESHOLD, color="#0072B2", linewidth=1)
    axis.axhline(CLIP, color="#D55E00", linewidth=1)
    axis.axhline(0, color="black", linewidth=0.6)
    levels = torch.logspace(-7, -4, 50)
    for sign in (-1, 1):
        spread = sign * (2 * levels / N).sqrt() - levels
        axis.plot(levels, spread, ":", color="black", linewidth=1, label="-D ± sqrt(2 D/N)" if sign > 0 else None)
    axis.set(xscale="log", xlabel="KL of the row, D = Q/2 (threshold: vertical line)")
    axis.set_ylabel("log-ratio of the row, L = P - Q/2\n(clip: horizontal line)")
    axis.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    axis.legend(fontsize=8, loc="lower left")
    figure.savefig(Path(__file__).with_suffix(".svg"), metadata={"Date": None})


if __name__ == "__main__":
    main()
