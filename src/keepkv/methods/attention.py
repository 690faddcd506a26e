"""Methods that keep what has been attended to."""

from __future__ import annotations

from keepkv.allocate.adakv import AdaKV
from keepkv.allocate.pyramid import Pyramid
from keepkv.core.when import When
from keepkv.methods.base import Method, register_method
from keepkv.methods.pieces import as_score
from keepkv.score.base import Score
from keepkv.score.h2o import H2O
from keepkv.score.snapkv import SnapKV
from keepkv.score.tova import TOVA


@register_method("snapkv", paper="arXiv 2404.14469")
def snapkv(window: int = 32, kernel: int = 5, pooling: str = "avg", sinks: int = 4, when: When = When()) -> Method:
    """Keeps what the last ``window`` queries attend to, smoothed over ``kernel`` neighbours, and the window itself.

    Score = mean attention of the window's queries, pooled, then averaged over the query heads of a KV head (the paper
    has one KV head per query head). window is 32 as in the paper; kvpress uses 64.

    Options:
        window: recent tokens that are always kept, and whose attention is the score
        kernel: neighbours that a score is pooled over, an odd number
        pooling: avg or max: how it is pooled
    """
    return Method(SnapKV(window, kernel, pooling))


@register_method("pyramidkv", paper="arXiv 2406.02069")
def pyramidkv(
    window: int = 32, kernel: int = 5, pooling: str = "avg", beta: float = 20.0, sinks: int = 4, when: When = When()
) -> Method:
    """SnapKV with budgets that fall linearly from the first layer to the last.

    Beyond the sinks and the window, with n slots per layer on average, the last layer keeps n/``beta`` and the first
    2n − n/``beta``; the sum over layers is exact.

    Options:
        window: recent tokens that are always kept, and whose attention is the score
        kernel: neighbours that a score is pooled over, an odd number
        pooling: avg or max: how it is pooled
        beta: the last layer keeps this part, 1/beta, of the mean
    """
    return Method(SnapKV(window, kernel, pooling), Pyramid(beta, reserved=sinks + window))


@register_method("h2o", paper="arXiv 2306.14048")
def h2o(window: int = 32, normalize: str = "sum", sinks: int = 4, when: When = When()) -> Method:
    """Keeps heavy hitters, the slots that received most attention from all queries so far, and a recent window.

    Score = Σ over queries of attention ("mean": per query that could see the slot, as kvpress' ObservedAttention).
    The paper gives half the budget to recent tokens and evicts one slot per decoded token; here the window is a
    fixed number of tokens and ``When(every=n)`` sets the pace.

    Options:
        normalize: sum of the attention, or mean over the queries that could see the slot
    """
    return Method(H2O(normalize))


@register_method("tova", paper="arXiv 2401.06104")
def tova(sinks: int = 0, window: int = 0, when: When = When()) -> Method:
    """Keeps what the last query attends to, averaged over all heads of a layer: every head keeps the same tokens.

    Nothing is pinned, as in the paper (kvpress pins the last token). ``When(every=1)`` is the paper's decoding.
    """
    return Method(TOVA())


@register_method("adakv", paper="arXiv 2407.11550")
def adakv(
    score: str | Score = "snapkv", alpha: float = 0.2, sinks: int = 4, window: int = 32, when: When = When()
) -> Method:
    """Any score, with the budget of a layer shared by its heads: those with concentrated attention need fewer slots.

    Each head first keeps its own top ⌊``alpha`` · budget⌋, the rest goes to the highest scores over all heads.
    ``score`` is a name or a Score whose values can be compared between heads; "snapkv" looks through the method's
    ``window``. Memory of what a head does not keep is freed.

    Options:
        score: name or Score whose values can be compared between heads
        alpha: share of its budget that each head keeps for itself
        window: most recent tokens that are always kept; snapkv looks through them
    """
    return Method(as_score(score, window), AdaKV(alpha))
