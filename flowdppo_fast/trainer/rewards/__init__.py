"""Rewards: the protocol, the built-in ones, rewards by name, and scoring in the background.

>>> from flowdppo_fast.trainer.rewards import build_rewards
>>> reward, weights = build_rewards({"pickscore": 1.0, "jpeg": 0.01})
"""

from .aesthetic import AestheticScore
from .background import BackgroundScorer, RewardHandle
from .classifier import ClassifierReward
from .clip import CLIPScore, HPSv2Score, PickScore
from .http import HTTPReward, RewardServerError
from .imagereward import ImageRewardScore
from .images import to_pixels
from .jpeg import JPEGCompressibility, JPEGIncompressibility
from .ocr import OCRReward
from .protocol import Reward, move_reward, score
from .registry import CombinedReward, build_rewards
from .vlm_judge import VLMJudge

__all__ = [
    "AestheticScore",
    "BackgroundScorer",
    "CLIPScore",
    "ClassifierReward",
    "CombinedReward",
    "HPSv2Score",
    "HTTPReward",
    "ImageRewardScore",
    "JPEGCompressibility",
    "JPEGIncompressibility",
    "OCRReward",
    "PickScore",
    "Reward",
    "RewardHandle",
    "RewardServerError",
    "VLMJudge",
    "build_rewards",
    "move_reward",
    "score",
    "to_pixels",
]
