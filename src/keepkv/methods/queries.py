"""Keep what is attended to: by the latest queries, by all so far, or by those to come."""

from __future__ import annotations

from keepkv.allocate.pyramid import Pyramid
from keepkv.core.when import When
from keepkv.methods.base import Method, register_method
from keepkv.score.content.compactor import Compactor
from keepkv.score.queries.expected import ExpectedAttention
from keepkv.score.queries.h2o import H2O
from keepkv.score.queries.snapkv import SnapKV
from keepkv.score.queries.tova import TOVA


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
def h2o(window: int = 32, normalize: str = "sum", sinks: int = 4, prompt: bool = False, when: When = When()) -> Method:
    """Keeps heavy hitters, the slots that received most attention from all queries so far, and a recent window.

    Score = Σ over queries of attention ("mean": per query that could see the slot, as kvpress' ObservedAttention).
    The paper gives half the budget to recent tokens and evicts one slot per decoded token; here the window is a
    fixed number of tokens and ``When(every=n)`` sets the pace.

    Options:
        normalize: sum of the attention, or mean over the queries that could see the slot
    """
    return Method(H2O(normalize))


@register_method("tova", paper="arXiv 2401.06104")
def tova(sinks: int = 0, window: int = 0, prompt: bool = False, when: When = When()) -> Method:
    """Keeps what the last query attends to, averaged over all heads of a layer: every head keeps the same tokens.

    Nothing is pinned, as in the paper (kvpress pins the last token). ``When(every=1)`` is the paper's decoding.
    """
    return Method(TOVA())


@register_method("expected-attention", paper="arXiv 2510.00636")
def expected_attention(
    horizon: int = 512, epsilon: float = 0.0, epsilon_mode: str = "absolute", use_covariance: bool = True,
    value_norm: str | None = "v", position_average: str = "rotation", shrinkage: float | str = 0.0,
    statistics: str = "prompt", sinks: int = 4, window: int = 0, when: When = When(),
) -> Method:  # fmt: skip
    """Keeps the slots with the largest expected contribution to the output of the next ``horizon`` queries.

    Score = mean over query heads of (softmax of log E[exp(q·k·scaling)] + ε)·‖v‖, q Gaussian with the statistics of
    the row's queries before RoPE, turned by the mean rotation over the horizon. ε is 0 as in kvpress and in the paper's
    needle tests; the paper's other results use 0.02. The statistics cover the whole row, ``sinks`` excluded, and go on
    while decoding (``When(every=512)`` in the paper). ``statistics="stored"`` takes those of other texts instead, a
    calibration made once by ``keepkv calibrate query-statistics``: nothing is observed while a row is read. See
    ``keepkv.score.ExpectedAttention`` for every option.

    Options:
        horizon: queries to come that are averaged over
        epsilon: is added to the attention before it is weighed by the value
        epsilon_mode: absolute; relative: epsilon is divided by the number of tokens
        use_covariance: whether the spread of the queries counts, beside their mean
        value_norm: v: weigh by the norm of the value; none: leave it out
        position_average: rotation, moments or mixture: how the queries' positions are averaged
        shrinkage: how far the covariance is drawn to its diagonal, 0 to 1; auto: by the number of tokens
        statistics: prompt: of the queries of the text; stored: of a calibration
    """
    return Method(ExpectedAttention(
        horizon, sinks, epsilon, epsilon_mode, use_covariance, value_norm, position_average, shrinkage,
        statistics=statistics,
    ))  # fmt: skip


@register_method("non-causal-attention", paper="arXiv 2507.08143")
def non_causal_attention(
    chunk: int = 256, scaled: bool = False, sinks: int = 4, window: int = 4, when: When = When()
) -> Method:
    """Keeps what tokens before and behind attend to, weighed by the value: Compactor's attention, without its leverage.

    Score = mean of 3 neighbours of ‖v_i‖·mean_g Σ_q p_i(q), the queries of each ``chunk`` attending to all of it,
    later tokens too. What kvpress has as NonCausalAttnPress. sinks, window: kept and left out of the score.

    Options:
        chunk: tokens that attend to each other for the score
        scaled: whether the attention takes the model's scaling
    """
    return Method(Compactor(0.0, chunk, scaled=scaled, sinks=sinks, window=window))
