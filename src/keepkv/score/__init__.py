"""Scores, one file per idea; importing this package registers them all."""

from keepkv.score import random
from keepkv.score.base import SCORES, FunctionScore, Score, register_score

__all__ = ["SCORES", "FunctionScore", "Score", "random", "register_score"]
