"""Methods that keep what has been attended to."""

from __future__ import annotations

from keepkv.allocate.pyramid import Pyramid
from keepkv.core.when import When
from keepkv.methods.base import Method, register_method
from keepkv.score.h2o import H2O
from keepkv.score.snapkv import SnapKV
from keepkv.score.tova import TOVA


@register_method("snapkv", paper="arXiv 2404.14469")
def snapkv(window: int = 32, kernel: int = 5, pooling: str = "avg", sinks: int = 4, when: When = When()) -> Method:
    """Keeps what the last ``window`` queries attend to, smoothed over ``kernel`` neighbours, and the window itself.

    Score = mean attention of the window's queries, pooled, then averaged over the query heads of a KV head (the paper
    has one KV head per query head). window is 32 as in the paper; kvpress uses 64.
    """
    return Method(
        score=SnapKV(window=window, kernel=kernel, pooling=pooling),
        when=when,
        sinks=sinks,
        window=window,
        name="snapkv",
        options={"window": window, "kernel": kernel, "pooling": pooling},
    )


@register_method("pyramidkv", paper="arXiv 2406.02069")
def pyramidkv(
    window: int = 32,
    kernel: int = 5,
    pooling: str = "avg",
    beta: float = 20.0,
    sinks: int = 4,
    when: When = When(),
) -> Method:
    """SnapKV with budgets that fall linearly from the first layer to the last.

    Beyond the sinks and the window, with n slots per layer on average, the last layer keeps n/``beta`` and the first
    2n − n/``beta``; the sum over layers is exact.
    """
    return Method(
        score=SnapKV(window=window, kernel=kernel, pooling=pooling),
        allocate=Pyramid(beta=beta, reserved=sinks + window),
        when=when,
        sinks=sinks,
        window=window,
        name="pyramidkv",
        options={"window": window, "kernel": kernel, "pooling": pooling, "beta": beta},
    )


@register_method("h2o", paper="arXiv 2306.14048")
def h2o(window: int = 32, normalize: str = "sum", sinks: int = 4, when: When = When()) -> Method:
    """Keeps heavy hitters, the slots that received most attention from all queries so far, and a recent window.

    Score = Σ over queries of attention ("mean": per query that could see the slot, as kvpress' ObservedAttention).
    The paper gives half the budget to recent tokens and evicts one slot per decoded token; here the window is a
    fixed number of tokens and ``When(every=n)`` sets the pace.
    """
    return Method(
        score=H2O(normalize=normalize),
        when=when,
        sinks=sinks,
        window=window,
        name="h2o",
        options={"window": window, "normalize": normalize},
    )


@register_method("tova", paper="arXiv 2401.06104")
def tova(sinks: int = 0, window: int = 0, when: When = When()) -> Method:
    """Keeps what the last query attends to, averaged over all heads of a layer: every head keeps the same tokens.

    Nothing is pinned, as in the paper (kvpress pins the last token). ``When(every=1)`` is the paper's decoding.
    """
    return Method(score=TOVA(), when=when, sinks=sinks, window=window, name="tova")
