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
from keepkv.score.learned.gates import Gates
from keepkv.score.passes.kvzip import KVzip
from keepkv.score.queries.ema import Ema
from keepkv.score.queries.expected import ExpectedAttention
from keepkv.score.queries.h2o import H2O
from keepkv.score.queries.matching import Matching
from keepkv.score.queries.snapkv import SnapKV
from keepkv.score.queries.tova import TOVA
from keepkv.score.vision.frames import EvenFrames, NewestFrames
from keepkv.score.vision.infinipot import InfiniPotV
from keepkv.score.vision.tar import TaR
from keepkv.score.vision.text_first import TextFirst
from keepkv.score.vision.van import VaN

__all__ = [
    "GKV", "H2O", "RKV", "SCORES", "TOVA", "Compactor", "Ema", "EvenFrames", "ExpectedAttention", "FunctionScore",
    "Gates", "InfiniPotV", "KNorm", "KVzip", "KeyDiff", "Leverage", "Matching", "NewestFrames", "Random", "Score",
    "SnapKV", "Streaming", "TaR", "TextFirst", "VaN", "register_score",
]  # fmt: skip
