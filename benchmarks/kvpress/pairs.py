"""Which press of kvpress stands beside which method of keepkv, with options that mean the same.

kvpress pins nothing for key norms and TOVA's last token, and knows no sinks in SnapKV: keepkv is given the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from keepkv import Method, When
from keepkv.allocate import Uniform
from keepkv.score import Chunk, ChunkKV, ExpectedAttention, KeyDiff, KNorm, SnapKV
from keepkv.score.base import Score

from .explain import EachAlone, FilledBlock, FromBuffer, OnePosition

Spec = dict[str, Any]


@dataclass(frozen=True)
class Given(Uniform):
    """Counts per layer taken from elsewhere: what remains to be compared is the score."""

    counts: tuple[int, ...] = ()

    def layer_budget(self, budget: Tensor, layer: int, *args: Any, **kwargs: Any) -> Tensor:
        return budget.new_full(budget.shape, self.counts[layer])


@dataclass(frozen=True)
class Pair:
    """press: from (ratio, window). method and options: ours, from (window, slots per head of each layer that kvpress
    kept). eager: kvpress needs the attention weights. reorder: its slots are put back into
    the order of the text. why: what is known to differ."""

    name: str
    press: Callable[[float, int], Spec]
    method: Callable[[int, tuple[int, ...]], str | Method]
    options: Callable[[int], dict[str, Any]] = field(default=lambda window: {})
    eager: bool = False
    reorder: bool = False
    why: str = ""


def _press(name: str, windowed: bool = False, **options: Any) -> Callable[[float, int], Spec]:
    def make(ratio: float, window: int) -> Spec:
        more = {"window_size": window} if windowed else {}
        return {"press": name, "options": {"compression_ratio": ratio, **options, **more}}

    return make


def _adaptive(inner: Callable[[float, int], Spec], **options: Any) -> Callable[[float, int], Spec]:
    return lambda ratio, window: {"press": "AdaKVPress", "options": {"press": inner(ratio, window), **options}}


def _plain(name: str, **options: Any) -> dict[str, Any]:
    return {"method": lambda window, counts: name, "options": lambda window: options}


def _windowed(name: str, **options: Any) -> dict[str, Any]:
    return {"method": lambda window, counts: name, "options": lambda window: {"window": window, **options}}


def _pyramid_as_given(window: int, counts: tuple[int, ...]) -> Method:
    return Method(score=SnapKV(window=window), allocate=Given(counts=counts), sinks=0, window=window)


def _expected(name: str, press: dict[str, Any], ours: dict[str, Any]) -> Pair:
    return Pair(name, _press("ExpectedAttentionPress", **press), **_plain("expected-attention", **ours))


def _compactor(chunk: int, sinks: int) -> Callable[[float, int], Spec]:
    """λ is given: of ours, the default follows from the budget, of kvpress' from the ratio, which is not rounded."""

    def make(ratio: float, window: int) -> Spec:
        options = {"sink_size_start": sinks, "sink_size_end": window, "chunk_size": chunk, "blending": 0.5}
        return {"press": "CompactorPress", "options": {"compression_ratio": ratio, **options}}

    return make


def _filled(chunk: int, sinks: int) -> Callable[[int, tuple[int, ...]], str | Method]:
    def make(window: int, counts: tuple[int, ...]) -> Method:
        score = FilledBlock(blending=0.5, chunk=chunk, sinks=sinks, window=window)
        return Method(score=score, sinks=sinks, window=window)

    return make


def _over(name: str, inner: Callable[[float, int], Spec], **options: Any) -> Callable[[float, int], Spec]:
    """A press around another one."""
    return lambda ratio, window: {"press": name, "options": {"press": inner(ratio, window), **options}}


def _as_many(score: Score, together: bool = False) -> Callable[[int, tuple[int, ...]], str | Method]:
    """As many slots as kvpress keeps, whose chunks do not always add up to the budget."""
    return lambda window, counts: Method(score, Given(counts=counts), sinks=0, together=together)


def _finch(ratio: float, window: int) -> Spec:
    """Without the token that it looks for, which the worker's prompts do not have; keys keep their positions."""
    options = {"compression_ratio": ratio, "rerotate_keys": False}
    return {"press": "FinchPress", "options": options, "set": {"window_size": window, "delimiter_token_id": -1}}


def _filled_attention(window: int, counts: tuple[int, ...]) -> Method:
    return Method(FilledBlock(blending=0.0, chunk=256, sinks=0, window=0), sinks=0)


def _filled_default(window: int, counts: tuple[int, ...]) -> Method:
    return Method(score=FilledBlock(), sinks=8, window=4)


_TAIL = "a budget below the sinks, the last whole run and its rest: kvpress takes any of them, keepkv the newest"
_LAG = f"ranks tie between runs; kvpress divides by zero where a channel does not vary, and ranks NaN; {_TAIL}"
_SHORT = "kvpress keeps a slot of a last chunk whose share is less than one"
_EQUALS = f"equal tokens have keys of equal norm in the first layer, and scores of chunks are not recorded; {_SHORT}"
_ALONE = "kvpress scores each chunk as if it were all there is, keepkv within the whole text"
_FILLED = "kvpress fills a last block that is not full with zeros, which take part in the softmax"
_PYRAMID = (
    "counts per layer: kvpress takes the window out of each layer's share, keepkv (as the authors' code) gives it to "
    "every layer beforehand; kvpress falls back to SnapKV where the last layer would get less than the window"
)
_SNAP = _press("SnapKVPress", windowed=True, kernel_size=5)

MATCHED = [
    Pair("knorm", _press("KnormPress"), **_plain("knorm", sinks=0)),
    Pair("keydiff", _press("KeyDiffPress"), **_plain("keydiff", sinks=0)),
    Pair("streaming-llm", _press("StreamingLLMPress", n_sink=4), **_plain("streaming-llm", sinks=4)),
    Pair("snapkv", _SNAP, **_windowed("snapkv", kernel=5, sinks=0)),
    Pair(
        "snapkv, kernel 13",
        _press("SnapKVPress", windowed=True, kernel_size=13),
        **_windowed("snapkv", kernel=13, sinks=0),
    ),
    Pair("tova", _press("TOVAPress"), **_plain("tova", sinks=0, window=1)),
    Pair(
        "pyramidkv",
        _press("PyramidKVPress", windowed=True, kernel_size=5, beta=20),
        **_windowed("pyramidkv", kernel=5, beta=20.0, sinks=0),
        why=_PYRAMID,
    ),
    Pair(
        "pyramidkv, counts of kvpress",
        _press("PyramidKVPress", windowed=True, kernel_size=5, beta=20),
        _pyramid_as_given,
    ),
    Pair(
        "h2o (ObservedAttention)",
        _press("ObservedAttentionPress"),
        **_plain("h2o", normalize="mean", window=0, sinks=0),
        eager=True,
    ),
    _expected("expected-attention", {}, {}),
    _expected("expected-attention, ε 0.01", {"epsilon": 0.01}, {"epsilon": 0.01}),
    _expected("expected-attention, ε 0.0001", {"epsilon": 1e-4}, {"epsilon": 1e-4}),
    _expected("expected-attention, no covariance", {"use_covariance": False}, {"use_covariance": False}),
    _expected("expected-attention, no value norm", {"use_vnorm": False}, {"value_norm": None}),
    _expected(
        "expected-attention, horizon 64, 8 sinks", {"n_future_positions": 64, "n_sink": 8}, {"horizon": 64, "sinks": 8}
    ),
    Pair("compactor", _compactor(256, 1), **_windowed("compactor", blending=0.5, sinks=1), why=_FILLED),
    Pair("compactor, filled as kvpress does", _compactor(256, 1), _filled(256, 1)),
    Pair(
        "compactor, blocks of 27",
        _compactor(27, 0),
        **_windowed("compactor", blending=0.5, chunk=27, sinks=0),
        why=_FILLED,
    ),
    Pair("compactor, blocks of 27, filled as kvpress does", _compactor(27, 0), _filled(27, 0)),
    Pair("adakv(snapkv)", _adaptive(_SNAP), **_windowed("adakv", score="snapkv", sinks=0)),
    Pair("adakv(snapkv), α 0.5", _adaptive(_SNAP, alpha_safeguard=0.5), **_windowed("adakv", alpha=0.5, sinks=0)),
    Pair(
        "adakv(expected-attention)",
        _adaptive(_press("ExpectedAttentionPress", epsilon=0.01)),
        **_plain("adakv", score=ExpectedAttention(epsilon=0.01), window=0, sinks=4),
    ),
    Pair("adakv(knorm)", _adaptive(_press("KnormPress")), **_plain("adakv", score="knorm", window=0, sinks=0)),
    Pair("adakv(keydiff)", _adaptive(_press("KeyDiffPress")), **_plain("adakv", score="keydiff", window=0, sinks=0)),
    Pair("lagkv", _press("LagKVPress", lag_size=29), **_plain("lagkv", lag=29), why=_LAG),
    Pair(
        "lagkv, cross",
        _press("LagKVPress", lag_size=29, cross_scoring=True),
        **_plain("lagkv", lag=29, cross=True),
        why=_LAG,
    ),
    Pair("curdkv", _press("CURPress"), **_plain("curdkv")),
    Pair("curdkv, mean", _press("CURPress", leverage_type="kv_avg"), **_plain("curdkv", of="mean")),
    Pair(
        "curdkv, whole row",
        _press("CURPress", use_local_approximation=False),
        **_plain("curdkv", neighbours=0),
    ),
    Pair("leverage-score", _press("LeverageScorePress"), **_plain("leverage-score", sinks=0)),
    Pair(
        "non-causal-attention",
        _press("NonCausalAttnPress"),
        **_plain("non-causal-attention", sinks=0, window=0),
        why=_FILLED,
    ),
    Pair("non-causal-attention, filled as kvpress does", _press("NonCausalAttnPress"), _filled_attention),
    Pair("cap", _press("CapPress"), **_plain("cap")),
    Pair(
        "cap, τ 1, horizon 64", _press("CapPress", tau=1.0, n_future_positions=64), **_plain("cap", tau=1.0, horizon=64)
    ),
    Pair("criticalkv(snapkv)", _over("CriticalKVPress", _SNAP), **_windowed("criticalkv", score="snapkv", sinks=0)),
    Pair(
        "criticalkv(curdkv), first 0.25",
        _over("CriticalKVPress", _press("CURPress", num_sinks=0), first_stage_ratio=0.25),
        **_plain("criticalkv", score="curdkv", first=0.25, sinks=0, window=0),
    ),
    Pair(
        "critical-adakv(snapkv)",
        _over("CriticalAdaKVPress", _SNAP),
        **_windowed("critical-adakv", score="snapkv", sinks=0),
    ),
    Pair(
        "chunk(knorm)",
        _over("ChunkPress", _press("KnormPress"), chunk_length=20),
        _as_many(Chunk(KNorm(), 20)),
        why=_EQUALS,
    ),
    Pair(
        "chunk(keydiff)",
        _over("ChunkPress", _press("KeyDiffPress"), chunk_length=20),
        _as_many(Chunk(KeyDiff(), 20)),
        why=_ALONE,
    ),
    Pair(
        "chunk(keydiff), each alone as in kvpress",
        _over("ChunkPress", _press("KeyDiffPress"), chunk_length=20),
        _as_many(EachAlone(KeyDiff(), 20)),
        why=_SHORT,
    ),
    Pair("chunkkv(knorm)", _over("ChunkKVPress", _press("KnormPress")), _as_many(ChunkKV(KNorm()), True)),
    Pair("chunkkv(keydiff)", _over("ChunkKVPress", _press("KeyDiffPress")), _as_many(ChunkKV(KeyDiff()), True)),
    Pair(
        "chunkkv(curdkv), entropy-gated",
        _over("EntropyGatedChunkKVPress", _press("CURPress", num_sinks=0)),
        **_plain("chunkkv", score="curdkv", size=10, spiky=4, sinks=0, window=0),
    ),
    Pair(
        "block(keydiff)",
        _over("BlockPress", _press("KeyDiffPress"), block_size=16),
        **_plain("block", score="keydiff", size=16, sinks=0),
    ),
    Pair("finch", _finch, **_windowed("finch", sinks=0)),
]

_SINKS = "keepkv pins 4 sinks unless told otherwise, kvpress none"
DEFAULTS = [
    Pair("knorm", _press("KnormPress"), **_plain("knorm"), why=_SINKS),
    Pair("keydiff", _press("KeyDiffPress"), **_plain("keydiff"), why=_SINKS),
    Pair("streaming-llm", _press("StreamingLLMPress"), **_plain("streaming-llm")),
    Pair("snapkv", _press("SnapKVPress"), **_plain("snapkv"), why=f"window 32 against 64; {_SINKS}"),
    Pair("tova", _press("TOVAPress"), **_plain("tova"), why="kvpress pins the last token"),
    Pair(
        "pyramidkv", _press("PyramidKVPress"), **_plain("pyramidkv"), why=f"window 32 against 64; {_SINKS}; {_PYRAMID}"
    ),
    Pair(
        "h2o (ObservedAttention)",
        _press("ObservedAttentionPress"),
        **_plain("h2o"),
        eager=True,
        why="sum of attention against mean per query that could see the slot; 32 recent tokens and 4 sinks pinned",
    ),
    Pair("expected-attention", _press("ExpectedAttentionPress"), **_plain("expected-attention")),
    Pair("compactor", _press("CompactorPress"), **_plain("compactor"), why=_FILLED),
    Pair("compactor, filled as kvpress does", _press("CompactorPress"), _filled_default),
    Pair(
        "adakv(snapkv)",
        _adaptive(_press("SnapKVPress")),
        **_plain("adakv"),
        why=f"window 32 against 64; {_SINKS}",
    ),
    Pair("lagkv", _press("LagKVPress"), **_plain("lagkv"), why=_LAG),
    Pair("curdkv", _press("CURPress"), **_plain("curdkv")),
    Pair("leverage-score", _press("LeverageScorePress"), **_plain("leverage-score"), why=_SINKS),
    Pair("cap", _press("CapPress"), **_plain("cap")),
    Pair(
        "criticalkv(snapkv)",
        _over("CriticalKVPress", _press("SnapKVPress")),
        **_plain("criticalkv"),
        why=f"window 32 against 64; {_SINKS}",
    ),
]


# While decoding: DecodingPress against When(every=...), prompt uncompressed.
EVERY, TARGET = 16, 64
_ORDER = "kvpress stores slots in the order of their scores, and takes that order for the order of the text"
_ONE = "kvpress turns every buffered query with the position of the newest token"
_BUFFER = "kvpress takes the next position to be the length of its buffer, and the buffer's first queries for sinks"


def _decoding(inner: Callable[[float, int], Spec]) -> Callable[[float, int], Spec]:
    def make(ratio: float, window: int) -> Spec:
        press = inner(0.0, window)
        return {
            "press": "DecodingPress",
            "options": {"base_press": press, "compression_interval": EVERY, "target_size": TARGET},
        }

    return make


def _snap_as_theirs(window: int, counts: tuple[int, ...]) -> Method:
    when = When(prefill=None, every=EVERY)
    return Method(score=OnePosition(window=window), sinks=0, window=window, when=when)


def _expected_as_theirs(window: int, counts: tuple[int, ...]) -> Method:
    return Method(score=FromBuffer(buffer=EVERY), sinks=4, when=When(prefill=None, every=EVERY))


_EXPECTED = _press("ExpectedAttentionPress")
DECODING = [
    Pair("knorm", _decoding(_press("KnormPress")), **_plain("knorm", sinks=0)),
    Pair("keydiff", _decoding(_press("KeyDiffPress")), **_plain("keydiff", sinks=0)),
    Pair("streaming-llm", _decoding(_press("StreamingLLMPress")), **_plain("streaming-llm"), why=_ORDER),
    Pair(
        "streaming-llm, kvpress in order",
        _decoding(_press("StreamingLLMPress")),
        **_plain("streaming-llm"),
        reorder=True,
    ),
    Pair("tova", _decoding(_press("TOVAPress")), **_plain("tova", window=1)),
    Pair("snapkv", _decoding(_SNAP), **_windowed("snapkv", sinks=0), why=_ONE),
    Pair("snapkv, turned as kvpress does", _decoding(_SNAP), _snap_as_theirs, why=_ORDER),
    Pair("snapkv, both turned and in order", _decoding(_SNAP), _snap_as_theirs, reorder=True),
    Pair("expected-attention", _decoding(_EXPECTED), **_plain("expected-attention"), why=_BUFFER),
    Pair("expected-attention, positions of kvpress", _decoding(_EXPECTED), _expected_as_theirs),
]
