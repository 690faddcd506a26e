"""Scores, one file per idea; importing this package registers them all."""

from keepkv.score import ema, random
from keepkv.score.base import SCORES, FunctionScore, Score, register_score

__all__ = ["SCORES", "FunctionScore", "Score", "ema", "random", "register_score"]
