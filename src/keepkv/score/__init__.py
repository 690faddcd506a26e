"""Scores, one file per idea; importing this package registers them all."""

from keepkv.score.base import SCORES, FunctionScore, Score, register_score
from keepkv.score.compactor import Compactor
from keepkv.score.ema import Ema
from keepkv.score.expected import ExpectedAttention
from keepkv.score.gates import Gates
from keepkv.score.gkv import GKV
from keepkv.score.h2o import H2O
from keepkv.score.keydiff import KeyDiff
from keepkv.score.knorm import KNorm
from keepkv.score.kvzip import KVzip
from keepkv.score.leverage import Leverage
from keepkv.score.matching import Matching
from keepkv.score.random import Random
from keepkv.score.rkv import RKV
from keepkv.score.snapkv import SnapKV
from keepkv.score.streaming import Streaming
from keepkv.score.tova import TOVA

__all__ = [
    "GKV", "H2O", "RKV", "SCORES", "TOVA", "Compactor", "Ema", "ExpectedAttention", "FunctionScore", "Gates", "KNorm",
    "KVzip", "KeyDiff", "Leverage", "Matching", "Random", "Score", "SnapKV", "Streaming", "register_score",
]  # fmt: skip
