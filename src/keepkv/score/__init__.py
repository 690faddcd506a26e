"""Scores, one file per idea; importing this package registers them all."""

from keepkv.score.base import SCORES, FunctionScore, Score, register_score
from keepkv.score.chunks.block import Block
from keepkv.score.chunks.chunk import Chunk
from keepkv.score.chunks.chunkkv import ChunkKV
from keepkv.score.content.compactor import Compactor
from keepkv.score.content.curdkv import CurDKV
from keepkv.score.content.ends import Ends
from keepkv.score.content.keydiff import KeyDiff
from keepkv.score.content.knorm import KNorm
from keepkv.score.content.lagkv import LagKV
from keepkv.score.content.leverage import Leverage
from keepkv.score.content.leverage_score import LeverageScore
from keepkv.score.content.random import Random
from keepkv.score.content.streaming import Streaming
from keepkv.score.decoding.gkv import GKV
from keepkv.score.decoding.lazy import LazyEviction
from keepkv.score.decoding.morphkv import MorphKV
from keepkv.score.decoding.raas import RaaS
from keepkv.score.decoding.rkv import RKV
from keepkv.score.decoding.rpc import RPC
from keepkv.score.decoding.triattention import TriAttention
from keepkv.score.decoding.vase import VaSE
from keepkv.score.learned.fast_kvzip import FastKVzip
from keepkv.score.learned.gates import Gates
from keepkv.score.learned.kvzap import KVzap
from keepkv.score.learned.qfilter import QFilter
from keepkv.score.passes.kvcompose import KVCompose
from keepkv.score.passes.kvgrad import KVgrad
from keepkv.score.passes.kvzip import KVzip
from keepkv.score.queries.cap import Cap
from keepkv.score.queries.critical import Critical
from keepkv.score.queries.decayed import Decayed
from keepkv.score.queries.dropkv import DropKV
from keepkv.score.queries.ema import Ema
from keepkv.score.queries.expected import ExpectedAttention
from keepkv.score.queries.finch import Finch
from keepkv.score.queries.h2o import H2O
from keepkv.score.queries.lru import LRU
from keepkv.score.queries.matching import Matching
from keepkv.score.queries.pairs import Pairs
from keepkv.score.queries.restkv import ReSTKV
from keepkv.score.queries.snapkv import SnapKV
from keepkv.score.queries.tova import TOVA
from keepkv.score.vision.fastv import FastV
from keepkv.score.vision.frames import EvenFrames, NewestFrames
from keepkv.score.vision.infinipot import InfiniPotV
from keepkv.score.vision.tar import TaR
from keepkv.score.vision.text_first import TextFirst
from keepkv.score.vision.van import VaN
from keepkv.score.vision.vl_cache import VLCache

__all__ = [
    "Block", "Cap", "Chunk", "ChunkKV", "Compactor", "Critical", "CurDKV", "Decayed", "DropKV", "Ema", "Ends",
    "EvenFrames", "ExpectedAttention", "FastKVzip", "FastV", "Finch", "FunctionScore", "GKV", "Gates", "H2O",
    "InfiniPotV", "KNorm", "KVCompose", "KVgrad", "KVzap", "KVzip", "KeyDiff", "LRU", "LagKV", "LazyEviction",
    "Leverage", "LeverageScore", "Matching", "MorphKV", "NewestFrames", "Pairs", "QFilter", "RKV", "RPC", "RaaS",
    "Random", "ReSTKV", "SCORES", "Score", "SnapKV", "Streaming", "TOVA", "TaR", "TextFirst", "TriAttention", "VLCache",
    "VaN", "VaSE", "register_score",
]  # fmt: skip
