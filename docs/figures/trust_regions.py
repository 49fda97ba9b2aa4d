"""Draws trust_regions.png: how hard each objective pushes a row that moves along its noise, the further it is.

python docs/figures/trust_regions.py
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from flowdppo_fast import DPPO, DRPO, KLPenalty, LogHinge, RatioClip, Unclipped, fused_policy_loss
from flowdppo_fast.runs import figures

# a row of advantage 1 at u = t*e, so P = t and Q = t**2: bounds set in where D = t**2/2 is the threshold
MOVED = 0.2
THRESHOLD, LOG_RATIO = MOVED**2 / 2, MOVED - MOVED**2 / 2
CLIP = math.expm1(LOG_RATIO)
STOPS = {
    "Unclipped()": Unclipped(),
    "DPPO(d)": DPPO(THRESHOLD),
    "RatioClip": RatioClip(CLIP),
    "LogHinge": LogHinge(LOG_RATIO),
}
PULLS = {
    "Unclipped()": Unclipped(),
    "DPPO(d, pull=0.1)": DPPO(THRESHOLD, pull=0.1),
    "KLPenalty(5), DRPO(0.2)": KLPenalty(1.0 / MOVED),
    "DRPO on the ratio": DRPO(CLIP, "ratio"),
}


def push(objective: Any, moved: torch.Tensor) -> torch.Tensor:
    """``-dl/dt`` of rows at ``u = t*e``: what the gradient adds to ``t``."""
    new = moved[:, None].clone().requires_grad_()
    one = torch.ones_like(moved)
    out = fused_policy_loss(
        new, torch.zeros_like(new).detach(), one[:, None], 1.0, one, objective=objective, reduction="sum"
    )
    out.loss.backward()
    assert new.grad is not None
    return -new.grad[:, 0]


@figures.style()
def main() -> None:
    moved = torch.linspace(0.0, 2.0 * MOVED, 801, dtype=torch.float64)
    figure, axes = figures.panels(2, height=4.2)
    colours = (figures.GREY, figures.BLUE, figures.VERMILION, figures.INK)
    for axis, shown, title in zip(axes, (STOPS, PULLS), ("bounds that stop", "bounds that pull back")):
        for (name, objective), colour in zip(shown.items(), colours):
            # what clips is where the mask is until there
            line = "--" if name == "RatioClip" else "-"
            axis.plot(moved**2 / 2 / THRESHOLD, push(objective, moved), line, color=colour, label=name)
        axis.axvline(1.0, color=figures.GREY, linewidth=0.8, linestyle=":")
        axis.axhline(0.0, color=figures.GREY, linewidth=0.8)
        axis.set(xlabel="KL of the row over the bound, D/d", ylabel="push away from the old policy", title=title)
        axis.legend(frameon=False)
    print(figures.save(figure, Path(__file__).with_suffix(".png")))


if __name__ == "__main__":
    main()
