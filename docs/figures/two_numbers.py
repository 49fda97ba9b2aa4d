"""Draws two_numbers.png: log-ratio against KL of rows whose policy moved at random, and what mask and clip drop.

python docs/figures/two_numbers.py
"""

from __future__ import annotations

from pathlib import Path

import torch

from flowdppo_fast import row_statistics, sde_schedule
from flowdppo_fast.runs import figures

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


@figures.style()
def main() -> None:
    kl, log_ratio = rows()
    mask, clip = (kl >= THRESHOLD) & (log_ratio > 0), log_ratio > CLIP
    figure, (axis,) = figures.panels(1, height=4.4)
    for chosen, colour, marker, label in (
        (~mask & ~clip, figures.PALE, "o", "dropped by neither"),
        (mask & clip, figures.INK, "s", "dropped by both"),
        (mask & ~clip, figures.BLUE, "^", "by the mask only: far, and moving on"),
        (clip & ~mask, figures.VERMILION, "v", "by the clip only: near, and noise"),
    ):
        axis.plot(kl[chosen], log_ratio[chosen], marker, color=colour, markersize=4, label=f"{label} ({chosen.sum()})")
    axis.axvline(THRESHOLD, color=figures.BLUE)
    axis.axhline(CLIP, color=figures.VERMILION)
    axis.axhline(0, color=figures.GREY, linewidth=0.8)
    levels = torch.logspace(-7, -4, 50)
    for sign in (-1, 1):
        spread = sign * (2 * levels / N).sqrt() - levels
        axis.plot(
            levels, spread, ":", color=figures.INK, linewidth=1.2, label="-D ± sqrt(2 D / N)" if sign > 0 else None
        )
    figures.log_scale(axis.xaxis)
    axis.set(
        xlabel="KL of the row: D = Q/2 (mask: vertical line)",
        ylabel="log-ratio of the row: L = P - Q/2\n(clip: horizontal line)",
    )
    axis.ticklabel_format(axis="y", style="sci", scilimits=(0, 0), useMathText=True)
    figures.legend(figure, (axis,), columns=2)
    print(figures.save(figure, Path(__file__).with_suffix(".png")))


if __name__ == "__main__":
    main()
