"""Merge what leaves into what stays, without votes, as it was published."""

from __future__ import annotations

from keepkv.allocate.base import Allocate
from keepkv.core.when import When
from keepkv.methods.base import Method, register_method
from keepkv.methods.pieces import as_allocation, as_score
from keepkv.reduce.cam import CaM
from keepkv.reduce.d2o import D2O
from keepkv.score.base import Score
from keepkv.score.queries.remembering import Remembering


@register_method("cam", paper="ICML 2024, openreview LCTmppB165")
def cam(
    score: str | Score = "h2o", allocate: str | Allocate = "uniform", span: int = 32, limit: int | None = 512,
    sinks: int = 4, window: int = 0, when: When = When(),
) -> Method:  # fmt: skip
    """Adds the value of what leaves to the kept slots that follow it, by chance in proportion to its attention.

    Slot i merges with probability clamp(A_i / mean A_targets, 0, 1), v_j += v_i/m for the m = ``span`` kept slots after
    it; its key is gone. At most ``limit`` slots per head and compression merge, and a slot takes at most one value's
    worth, which bounds what bulk eviction would make diverge. Protected slots take nothing: ``window`` is 0 because
    the published targets are the recent tokens.

    Options:
        span: kept slots behind it that take a part of a leaving value
        limit: slots of a head that merge in a compression at most; none: all
    """
    return Method(Remembering(as_score(score), 32), as_allocation(allocate), CaM(span, limit))


@register_method("d2o", paper="arXiv 2406.13035")
def d2o(
    score: str | Score = "h2o", allocate: str | Allocate = "uniform", weights: str = "paper", beta: float = 0.5,
    sinks: int = 4, window: int = 32, when: When = When(),
) -> Method:  # fmt: skip
    """Merges a leaving slot into its nearest kept key where the cosine u reaches a moving threshold.

    w_e = e^u / (Σe^u + e) for what arrives, e / (Σe^u + e) for the kept slot, on keys and values alike; no votes.
    The threshold starts at the mean of u and follows it with rate 1 − ``beta``. The paper adds layer budgets from the
    variance of attention; here they are a choice of ``allocate``.

    Options:
        weights: paper, or the released code's
        beta: how slowly the threshold follows
    """
    return Method(as_score(score), as_allocation(allocate), D2O(weights, beta))
