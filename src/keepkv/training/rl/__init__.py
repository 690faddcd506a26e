"""Reinforcement learning of the policy that is deployed: the model with its compressing cache.

``SparseGRPO`` of ``keepkv.training.rl.trainer`` is TRL's ``GRPOTrainer`` with such rollouts, for own scripts; it needs
the package trl. ``train`` is what ``keepkv train rl`` runs.
"""

from keepkv.training.rl.config import Config
from keepkv.training.rl.rewards import REWARDS, reward
from keepkv.training.rl.run import Outcome, train

__all__ = ["REWARDS", "Config", "Outcome", "reward", "train"]
