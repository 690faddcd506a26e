"""Scores, one file per idea; importing this package registers them all."""

from keepkv.score import ema, expected, future, h2o, keydiff, knorm, random, snapkv, streaming, tova
from keepkv.score.base import SCORES, FunctionScore, Score, register_score
from keepkv.score.expected import ExpectedAttention
from keepkv.score.future import Future
from keepkv.score.h2o import H2O
from keepkv.score.keydiff import KeyDiff
from keepkv.score.knorm import KNorm
from keepkv.score.random import Random
from keepkv.score.snapkv import SnapKV
from keepkv.score.streaming import Streaming
from keepkv.score.tova import TOVA

__all__ = [
    "H2O",
    "SCORES",
    "TOVA",
    "ExpectedAttention",
    "FunctionScore",
    "Future",
    "KNorm",
    "KeyDiff",
    "Random",
    "Score",
    "SnapKV",
    "Streaming",
    "ema",
    "expected",
    "future",
    "h2o",
    "keydiff",
    "knorm",
    "random",
    "register_score",
    "snapkv",
    "streaming",
    "tova",
]
