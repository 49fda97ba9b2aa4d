"""What a call works out once for others like it: calls that differ in one thing, one after another in any order."""

from __future__ import annotations

import random

import torch
from support.cases import bounded_call
from support.compare import Yardstick, check_backend
from support.layouts import channels_last, trajectory_slice, unaligned
from support.problems import VELOCITY_NAMES, make_problem

import flowdppo_fast as fast

PROBLEM = make_problem((4,), (3, 4, 5))
# one that has another step per row, and the same shapes
TABLE = make_problem((4,), (3, 4, 5), index=[0, 1, 2, 3])
VARIANTS = [
    {},
    {"layout": trajectory_slice},
    {"layout": unaligned},
    {"layout": channels_last},
    *({"layout": {name: trajectory_slice}} for name in VELOCITY_NAMES[:3]),
    {"dtypes": torch.bfloat16},
    {"dtypes": torch.float64},
    {"with_reference": True, "kl_weight": 0.3},
    {"with_reference": True, "kl_weight": 0.1},
    {"with_old_log_prob": True},
    {"with_weights": True},
    {"noise": fast.PhiloxNoise(1)},
    {"noise": fast.PhiloxNoise(2)},
    {"noise": fast.PhiloxNoise(1, 5)},
    {"noise": fast.PhiloxNoise(1, torch.tensor([3, 1, 7, 5]))},
    {"latent_reduction": "sum"},
    {"reduction": "sum"},
    {"reduction": "none"},
    {"advantage_clip": 0.5},
    {"log_prob": "unnormalized"},
    {"single_pass": True},
    {"single_pass": False},
    {"problem": TABLE},
    {"objective": "dppo_symmetric"},
    {"objective": "ratio_clip"},
    {"objective": "grpo_guard_batch"},
    {"form": "means"},
]


def test_calls_that_differ_in_one_thing(backend):
    calls = []
    for variant in VARIANTS:
        options = {"dtypes": torch.float32} | variant
        if options["dtypes"] == torch.float64 and not backend.float64:
            continue
        problem, form = options.pop("problem", PROBLEM), options.pop("form", "velocity")
        call = bounded_call(problem, form, options.pop("objective", "dppo"), device=backend.device, **options)
        calls.append((call, Yardstick.of(call)))
    draw = random.Random(0)
    for _ in range(2):
        for call, yardstick in draw.sample(calls, len(calls)):
            check_backend(call, backend.name, yardstick)
