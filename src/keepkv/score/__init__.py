"""Scores, one file per idea; importing this package registers them all."""

from keepkv.score.base import SCORES, FunctionScore, Score, register_score
from keepkv.score.content.compactor import Compactor
from keepkv.score.content.keydiff import KeyDiff
from keepkv.score.content.knorm import KNorm
from keepkv.score.content.leverage import Leverage
from keepkv.score.content.random import Random
from keepkv.score.content.streaming import Streaming
from keepkv.score.decoding.gkv import GKV
from keepkv.score.decoding.rkv import RKV
from keepkv.score.learned.fast_kvzip import FastKVzip
from keepkv.score.learned.gates import Gates
from keepkv.score.learned.kvzap import KVzap
from keepkv.score.passes.kvcompose import KVCompose
from keepkv.score.passes.kvgrad import KVgrad
from keepkv.score.passes.kvzip import KVzip
from keepkv.score.queries.ema import Ema
from keepkv.score.queries.expected import ExpectedAttention
from keepkv.score.queries.h2o import H2O
from keepkv.score.queries.matching import Matching
from keepkv.score.queries.snapkv import SnapKV
from keepkv.score.queries.tova import TOVA

__all__ = [
    "GKV", "H2O", "RKV", "SCORES", "TOVA", "Compactor", "Ema", "ExpectedAttention", "FastKVzip", "FunctionScore",
    "Gates", "KNorm", "KVCompose", "KVgrad", "KVzap", "KVzip", "KeyDiff", "Leverage", "Matching", "Random", "Score",
    "SnapKV", "Streaming", "register_score",
]  # fmt: skip
