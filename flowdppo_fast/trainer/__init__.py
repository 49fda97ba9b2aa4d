"""A thin Flow-DPPO trainer for any diffusers flow pipeline; needs the ``trainer`` extra (diffusers, accelerate, peft).

>>> from flowdppo_fast.trainer import FlowDPPOConfig, FlowDPPOTrainer, PreparedRun, Recipe
>>> FlowDPPOTrainer(pipeline, reward, prompts, FlowDPPOConfig.from_yaml("config.yaml")).train()
>>> PreparedRun.of(Recipe.from_yaml("recipe.yaml")).train()
"""

from .advantages import group_advantages
from .config import FlowDPPOConfig
from .recipe import PreparedRun, Recipe
from .record.recorder import TrajectoryRecorder
from .record.sampling import FlowMatchSDEScheduler
from .rewards import Reward
from .trainer import FlowDPPOTrainer

__all__ = [
    "FlowDPPOConfig",
    "FlowDPPOTrainer",
    "FlowMatchSDEScheduler",
    "PreparedRun",
    "Recipe",
    "Reward",
    "TrajectoryRecorder",
    "group_advantages",
]
