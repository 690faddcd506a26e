"""Made for long replies: they compress every so many decoded tokens."""

from __future__ import annotations

from keepkv.core.when import When
from keepkv.methods.base import Method, register_method
from keepkv.score.decoding.gkv import GKV
from keepkv.score.decoding.rkv import RKV


@register_method("g-kv", paper="arXiv 2512.00504")
def gkv(
    window: int = 16, alpha: float = 0.8, mode: str = "max", lam: float = 0.5, threshold: float = 0.5,
    sinks: int = 4, when: When = When(every=128),
) -> Method:  # fmt: skip
    """Keeps what the last queries attend to, or those of an earlier compression did, and whose keys are not in others.

    Score = ``lam``·F − (1 − ``lam``)·redundancy. F = max(``alpha``·F before, attention of the last ``window`` queries
    as a share of its peak); ``mode`` "mean" and "sum" are the paper's other ways to remember. The redundancy of a key
    is its mean cosine with the others, where of keys nearer than ``threshold`` the newest goes free; ``lam=1`` leaves
    it out. Compresses the prompt and then every 128 decoded tokens. The paper pins neither sinks nor the prompt, which
    a span protects.

    Options:
        window: recent tokens that are always kept, and whose attention is the score
        alpha: decay of what earlier compressions saw
        mode: max, mean or sum: how that is remembered
        lam: weight of the attention against the redundancy
        threshold: cosine from which keys count as near
    """
    return Method(GKV(window, alpha, mode, lam, threshold))


@register_method("r-kv", paper="arXiv 2505.24133")
def rkv(
    window: int = 8, kernel: int = 7, lam: float = 0.1, threshold: float = 0.5,
    sinks: int = 4, when: When = When(every=128),
) -> Method:  # fmt: skip
    """Keeps what the last queries attend to and whose keys are not in others.

    Score = ``lam``·attention of the last ``window`` queries, the largest of ``kernel`` neighbours, − (1 − ``lam``)·
    redundancy, as of ``g-kv``. Compresses the prompt and then every 128 decoded tokens. A larger ``lam`` is reported to
    do better (arXiv 2609.03430: 0.5, on Qwen3-4B). The paper pins no sinks.

    Options:
        window: recent tokens that are always kept, and whose attention is the score
        kernel: neighbours of which the largest score counts, an odd number
        lam: weight of the attention against the redundancy
        threshold: cosine from which keys count as near
    """
    return Method(RKV(window, kernel, lam, threshold))
