"""Merge what leaves into what stays, as it was published."""

from __future__ import annotations

from keepkv.allocate.base import Allocate
from keepkv.core.when import When
from keepkv.methods.base import Method, register_method
from keepkv.methods.pieces import as_allocation, as_score
from keepkv.reduce.cam import CaM
from keepkv.reduce.d2o import D2O
from keepkv.reduce.kvmerger import KVMerger
from keepkv.reduce.kvslimmer import KVSlimmer
from keepkv.reduce.look_m import LookM
from keepkv.reduce.selkv import SelKV
from keepkv.reduce.weightedkv import WeightedKV
from keepkv.score.base import Score
from keepkv.score.queries.block_mates import BlockMates
from keepkv.score.queries.h2o import H2O
from keepkv.score.queries.pairs import Pairs
from keepkv.score.queries.remembering import Remembering
from keepkv.score.vision.text_first import TextFirst


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


@register_method("look-m", paper="arXiv 2406.18139")
def look_m(
    score: str | Score = "h2o", allocate: str | Allocate = "uniform", merge: str = "pivot", within: str = "all",
    text_first: bool = False, sinks: int = 4, window: int = 32, when: When = When(),
) -> Method:  # fmt: skip
    """Keeps what is attended to, and averages every leaving slot into its nearest kept key.

    With n arrivals at slot c, for keys and values alike and without votes:

        average    x_c ← (x_c + Σ x_e) / (n + 1)
        pivot      x_c ← (x_c + Σ (x_e + x_c)/2) / (n + 1), so that the kept slot prevails
        weighted   x_c ← (x_c + Σ cos(k_e, k_c)·x_e) / (n + 1)

    In the paper tokens of images leave before any of the text do, which is ``text_first``; and sinks and recent tokens
    receive merges too, which they do not here.

    Options:
        merge: pivot, average or weighted: how a slot takes in what arrives
        within: all, or modality: vision is averaged into vision alone, and text into text
        text_first: whether vision leaves before any text does
    """
    chosen = as_score(score)
    return Method(TextFirst(chosen, 0.0) if text_first else chosen, as_allocation(allocate), LookM(merge, within))


@register_method("kvmerger", paper="arXiv 2407.08454")
def kvmerger(
    score: str | Score = "h2o", allocate: str | Allocate = "uniform", threshold: float = 0.75,
    sigma: float | None = None, sinks: int = 4, window: int = 32, when: When = When(),
) -> Method:  # fmt: skip
    """Keeps what is attended to; what leaves enters the most attended slot of its run of similar neighbours.

    Slots next to each other whose key cosine is above ``threshold`` form a run. With p its kept slot of largest score:
    g_i = exp(−‖k_p − k_i‖² / 2σ²), w = g/Σg over p and what leaves the run, k_p ← Σwk, v_p ← Σwv; no votes.

    Not as published: there every run becomes one slot, tokens of high attention stay out of runs, and what the cache
    then holds follows from ``threshold``. Here the budget says what stays, so a run may keep several slots, and one
    that keeps none is dropped. The paper's σ is a function of the weights that it defines; here it is the root mean
    square distance within the run.

    Options:
        threshold: key cosine of neighbours above which they are one run
        sigma: σ, in the units of keys; none: of each run, from its distances
    """
    return Method(as_score(score), as_allocation(allocate), KVMerger(threshold, sigma))


@register_method("kvslimmer", paper="arXiv 2603.00907")
def kvslimmer(
    score: str | Score | None = None, tilt: float = 49.0, sinks: int = 4, window: int = 32, when: When = When(),
) -> Method:  # fmt: skip
    """Merges the neighbours that least is attended to, until the budget is met; counts go into the softmax.

    The pair (i, i+1) of smallest (a_i + a_{i+1})·(p_i + p_{i+1}) / ``tilt``^x goes first, a the attention of the last
    ``window`` queries, p the tokens that a slot stands for, x from 0 at the front to 1 at the back; the heads of a
    layer share a ranking. Pairs that touch become one run, and a run one slot in the place of its last:

        w_j = α_j·max((1 − Σα)·d_j − Σα·d, 0)    d = ‖v − ō‖₁, sums over the run, α = a/Σa, ō = Σα·v over all slots
        k = Σw·k / Σw                            v = mean over tokens, bias ln(their number)

    For a pair w is the paper's A = h_11 − |h_12| and B = h_22 − |h_12|, and the mean with a bias its sum of values over
    a normaliser that counts. Keys are averaged before RoPE. Cost: the attention of ``window`` queries over all slots,
    once for the ranking and once for α.

    Not as in the released code: it counts to 5 at most and sums values on; of three tokens in two pairs that touch it
    loses the third; once slots stand for several, it takes their sums for values in d and ō; it leaves sinks, 32 of
    them, out of α; and its ``tilt`` grows with what is held, to 49 at the 2,592 slots of its experiments. The tokens of
    the window stay as they are, there those that are being read. ``docs/peers.md`` has a comparison.

    With ``score``, such as "snapkv", each head keeps what that says, and what leaves enters the next kept slot in the
    same way. With a quarter of the bytes and the question known, the embedded model then answers .97 of niah-multikey-1
    and .95 of qa-1 (12 contexts of 512 tokens), as with ``snapkv`` itself; with the ranking of pairs .45 and .19.

    Options:
        score: a score by name; none: the ranking of pairs
        tilt: how much less a pair at the back counts than one at the front, as the latest queries attend to it more
    """
    chosen = Pairs(max(1, window), tilt) if score is None else as_score(score, window)
    ready = Remembering(chosen, max(1, window), turns=True)
    return Method(ready, reduce=KVSlimmer(max(1, window)), together=score is None)


@register_method("selkv", paper="arXiv 2607.16213")
def selkv(
    score: str | Score = "snapkv", allocate: str | Allocate = "uniform", strength: float = 0.5,
    sinks: int = 4, window: int = 32, when: When = When(),
) -> Method:  # fmt: skip
    """Merges a leaving slot into the kept one near it that it attended to most, as far as their values agree.

    Slot j enters the kept slot i of the same 32 tokens that j's own query attended to most. With a the mean attention
    of the last ``window`` queries, g_j = max(cos(v_j, v_i), 0) and A = a_i + Σ g_j·a_j:

        v_i ← (a_i·v_i + Σ g_j·a_j·v_j) / A    bias b_i ← b_i + strength·ln(A / a_i)    keys stay

    What has no i, or a g of 0, is dropped. Neither sinks nor the window take anything. Cost: the attention of each
    token to its 32 when it is read, and that of ``window`` queries over all slots at a compression.

    Not as published: of each token the four that it attended to most among its 32 are remembered, and i is the first
    of them that is kept. On a document of the embedded model that finds the i of 74 % of those that have one at a
    budget of 50 %, of 66 % at 25 %, and never another. Written from a summary of the paper, as no code is public: its
    own selection is not known here, ``score`` selects; under GQA j's attention is the mean over the query heads, each
    over the earlier tokens of the 32 alone.

    Options:
        strength: share of the log mass of what enters that the bias makes up for
    """
    chosen = Remembering(BlockMates(as_score(score, window)), max(1, window))
    return Method(chosen, as_allocation(allocate), SelKV(strength, max(1, window)))


@register_method("weightedkv", paper="arXiv 2503.01330")
def weightedkv(allocate: str | Allocate = "uniform", sinks: int = 4, window: int = 32, when: When = When()) -> Method:
    """Keeps the keys of largest mean attention; the values of the others go to the next kept slot.

    v_c ← (ā_c·v_c + Σ ā_e·v_e) / (ā_c + Σ ā_e) over the slots e between c and the kept slot before it, ā the mean
    attention of all queries that saw a slot. No votes: keys, and what they attract, stay as they are. The paper lets
    one token leave a step, into its right neighbour, sinks and recent tokens included; here all leave at once, and
    protected slots take nothing, so that what stands between them and the last other kept slot is dropped.
    """
    return Method(H2O("mean"), as_allocation(allocate), WeightedKV())
