"""Judge a token by what it adds to the layer's output."""

from __future__ import annotations

from keepkv.allocate.adakv import AdaKV
from keepkv.core.when import When
from keepkv.methods.base import Method, register_method
from keepkv.methods.pieces import as_score
from keepkv.score.base import Score
from keepkv.score.queries.cap import Cap
from keepkv.score.queries.critical import Critical
from keepkv.score.queries.dropkv import DropKV
from keepkv.score.queries.restkv import ReSTKV


@register_method("criticalkv", paper="arXiv 2502.03805")
def criticalkv(
    score: str | Score = "snapkv", first: float = 0.5, epsilon: float = 1e-4,
    sinks: int = 4, window: int = 32, when: When = When(),
) -> Method:  # fmt: skip
    """Any score in two stages: its best for half of the budget, then what the output projection makes long.

    Second stage: (s_i + ``epsilon``)·‖v_i W‖₁, W the output projection of the layer. Refused where W cannot be read.
    Use a score that does not weigh by values already, such as "snapkv" or "h2o".

    Options:
        score: name or Score that is not negative
        first: share of the budget that the score alone chooses
        epsilon: is added to the score before it is weighed by the value
        window: most recent tokens that are always kept; snapkv looks through them
    """
    return Method(Critical(as_score(score, window), first, epsilon))


@register_method("critical-adakv", paper="arXiv 2502.03805")
def critical_adakv(
    score: str | Score = "snapkv", alpha: float = 0.2, first: float = 0.5, epsilon: float = 1e-4,
    sinks: int = 4, window: int = 32, when: When = When(),
) -> Method:  # fmt: skip
    """criticalkv, with the budget of a layer shared by its heads as AdaKV does.

    The score alone says how many slots each head keeps (see "adakv"), and the two stages which.

    Options:
        score: name or Score that is not negative, and whose values can be compared between heads
        alpha: share of its budget that each head keeps for itself
        first: share of the budget that the score alone chooses
        epsilon: is added to the score before it is weighed by the value
        window: most recent tokens that are always kept; snapkv looks through them
    """
    return Method(Critical(as_score(score, window), first, epsilon, alpha), AdaKV(alpha))


@register_method("dropkv", paper="openreview MqfNzH3TVH")
def dropkv(window: int = 32, project: bool = False, sinks: int = 4, when: When = When()) -> Method:
    """Keeps the slots without which the output of the last ``window`` queries would move most.

    Score = Σ_q (a_i/(1 − a_i))²·‖v_i − o(q)‖²: without slot i the output o of a query moves by a_i/(1 − a_i)·(o − v_i).
    Exact for one slot; together, slots that leave move it by something else.

    Options:
        window: recent tokens that are always kept, and whose outputs are looked at
        project: measure what the output projection makes of the move, rather than the move itself
    """
    return Method(DropKV(window, project))


@register_method("rest-kv", paper="arXiv 2605.08840")
def rest_kv(window: int = 32, kernel: int = 5, alpha: float = 0.3, sinks: int = 4, when: When = When()) -> Method:
    """Keeps the slots without which the mean output of the last ``window`` queries would move most, smoothed.

    Score = mean of ``kernel`` neighbours of ā_i/(1 − ā_i)·‖(v_i − ō)W‖, W the output projection, ā the moving average
    of the queries' attention, ō its output over the slots before the window. As the released code with "after"; its
    pooling that follows how attention moves is not here.

    Options:
        window: recent tokens that are always kept, and whose attention is averaged
        kernel: neighbours that a score is pooled over, an odd number
        alpha: weight of a query against those before it
    """
    return Method(ReSTKV(window, kernel, alpha))


@register_method("cap", paper="arXiv 2604.25975")
def cap(tau: float = 5.0, horizon: int = 512, sinks: int = 4, window: int = 0, when: When = When()) -> Method:
    """Keeps the slots whose values no others can stand for, among keys that the mean query looks at.

    Score = w_i·v_iᵀ(I + Σ w v vᵀ)⁻¹v_i, w = e^(``tau``·cos(k, μ)), μ the row's mean query, turned by the mean rotation
    of the next ``horizon`` positions. CapKV as in kvpress, where the cosine stands for the paper's product.

    Options:
        tau: how sharply keys are told apart by their cosine with the mean query
        horizon: queries to come that are averaged over
    """
    return Method(Cap(tau, horizon, sinks))
