"""Made for long replies: they compress every so many decoded tokens.

``prompt=True`` keeps every token of the prompt, with each of them. A budget in slots or bytes includes the prompt and
must hold it; one that is a share is one of the tokens that follow. A head never holds more than its budget and
``when.every`` slots.
"""

from __future__ import annotations

from keepkv.core.when import When
from keepkv.methods.base import Method, register_method
from keepkv.score.content.random import Random
from keepkv.score.decoding.gkv import GKV
from keepkv.score.decoding.lazy import LazyEviction
from keepkv.score.decoding.morphkv import MorphKV
from keepkv.score.decoding.raas import RaaS
from keepkv.score.decoding.rkv import RKV
from keepkv.score.decoding.rpc import RPC
from keepkv.score.decoding.triattention import TriAttention
from keepkv.score.decoding.vase import VaSE
from keepkv.score.queries.snapkv import SnapKV


@register_method("g-kv", paper="arXiv 2512.00504")
def gkv(
    window: int = 16, alpha: float = 0.8, mode: str = "max", lam: float = 0.5, threshold: float = 0.5,
    sinks: int = 4, prompt: bool = False, when: When = When(every=128),
) -> Method:  # fmt: skip
    """Keeps what the last queries attend to, or those of an earlier compression did, and whose keys are not in others.

    Score = ``lam``·F − (1 − ``lam``)·redundancy. F = max(``alpha``·F before, attention of the last ``window`` queries
    as a share of its peak); ``mode`` "mean" and "sum" are the paper's other ways to remember. The redundancy of a key
    is its mean cosine with the others, where of keys nearer than ``threshold`` the newest goes free; ``lam=1`` leaves
    it out. Compresses the prompt and then every 128 decoded tokens. The paper pins neither sinks nor the prompt.

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
    sinks: int = 4, prompt: bool = False, when: When = When(every=128),
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


@register_method("snapkv-decode", paper="arXiv 2404.14469")
def snapkv_decode(
    window: int = 32, kernel: int = 5, pooling: str = "avg", sinks: int = 4, prompt: bool = False,
    when: When = When(every=128),
) -> Method:  # fmt: skip
    """Keeps what the last queries attend to, again and again: ``snapkv`` every 128 decoded tokens.

    Nothing is remembered from one compression to the next. Of the scores that were compared on long replies it keeps
    least of the prompt, and gains most where the prompt is kept (arXiv 2609.03430).

    Options:
        window: recent tokens that are always kept, and whose attention is the score
        kernel: neighbours that a score is pooled over, an odd number
        pooling: avg or max: how it is pooled
    """
    return Method(SnapKV(window, kernel, pooling))


@register_method("morphkv", paper="arXiv 2503.00979")
def morphkv(
    window: int = 32, fuse: str = "sum", sinks: int = 1, prompt: bool = False, when: When = When(every=1)
) -> Method:
    """Keeps what the last queries together attend to, chosen anew at every decoded token.

    Score = attention of the last ``window`` queries to the slots before them, their ``fuse`` "sum" or "max". The first
    token is pinned, as in the released code, which follows the group's logits added up. ``When(every=n)`` chooses less
    often, as its option to evict in bursts does.

    Options:
        window: recent tokens that are always kept, and whose attention is the score
        fuse: sum or max over these queries
    """
    return Method(MorphKV(window, fuse))


@register_method("rpc", paper="arXiv 2505.13866")
def rpc(
    window: int = 32, kernel: int = 7, sinks: int = 0, prompt: bool = True, when: When = When(every=1024)
) -> Method:
    """Keeps the prompt, and of the reply what the last queries attend to; all heads of a layer keep the same tokens.

    Score = attention of the last ``window`` queries, mean over all heads of the layer, then over ``kernel`` neighbours.
    A budget of 0.25 is the paper's: every 1024 decoded tokens the whole reply so far is brought to a quarter, and the
    cache grows with it. With a budget in slots it does not grow. The paper keeps the window beyond the quarter; here
    it is part of it.

    Options:
        window: recent tokens that are always kept, and whose attention is the score
        kernel: neighbours that a score is averaged over, an odd number
    """
    return Method(RPC(window, kernel), together=True)


@register_method("raas", paper="arXiv 2502.11147")
def raas(
    threshold: float | None = None, sinks: int = 0, window: int = 0, prompt: bool = True, when: When = When(every=1)
) -> Method:
    """Keeps the prompt, and of the reply what was attended to most lately: the least recently used slot leaves.

    A decoded token uses the slots that get more than ``threshold`` of its attention, by default the upper half. The
    paper evicts at every token, and whole pages where it is to be fast; here it is slots.

    Options:
        threshold: attention from which a slot counts as used; none: the median over the slots of its head
    """
    return Method(RaaS(threshold))


@register_method("lazy-eviction", paper="arXiv 2506.15969")
def lazy_eviction(
    threshold: float = 1e-4, window: int = 128, sinks: int = 0, prompt: bool = False, when: When = When(every=128)
) -> Method:
    """Keeps what is attended to again and again, as long as it has not been left for much longer than ever before.

    Score = 2σ(−1 − t/m) + 2σ(1 − m): t tokens ago the slot had more than ``threshold`` of a token's attention, and m is
    the longest time between two such tokens. This is the released code; the paper's text has other terms, see
    ``keepkv.score.LazyEviction``. The window is as long as the interval.

    Options:
        threshold: attention of a token from which a slot counts as attended to
    """
    return Method(LazyEviction(threshold))


@register_method("vase", paper="arXiv 2606.03928")
def vase(
    reserved: float = 0.25, window: int = 32, kernel: int = 5, sinks: int = 4, prompt: bool = False,
    when: When = When(every=128),
) -> Method:  # fmt: skip
    """Keeps the slots whose values range widest, and of the others a draw in proportion to their attention.

    ``reserved`` of what the budget leaves goes to the largest max v − min v, as losing such values starts loops. The
    rest is drawn without replacement, in proportion to the attention of the last ``window`` queries, anew at every
    compression; ``Cache(seed=)`` decides the draw.

    Options:
        reserved: share of the budget that goes to the values that range widest
        window: recent tokens that are always kept, and whose attention is drawn by
        kernel: neighbours that attention is averaged over, an odd number
    """
    return Method(VaSE(reserved, window, kernel))


@register_method("triattention", paper="arXiv 2604.04921")
def triattention(
    horizon: int = 65536, normalize: bool = True, sinks: int = 0, window: int = 0, prompt: bool = True,
    when: When = When(every=128),
) -> Method:  # fmt: skip
    """Keeps the prompt, and of the reply what a model's average query will attend to at distances that double.

    Score = mean over 1, 2, 4, … ``horizon`` tokens ahead of the product of the key and the mean query turned there, and
    what queries of other directions may add. No query is watched: both are of a calibration, made once by ``keepkv
    calibrate triattention``. Each KV head keeps its own tokens by the largest score of its query heads, as one of the
    released modes does; another has all layers keep the same.

    Options:
        horizon: the farthest distance, in tokens
        normalize: whether the scores of each query head are brought to mean 0 and deviation 1
    """
    return Method(TriAttention(horizon, normalize))


@register_method("random-attention", paper="arXiv 2609.03430")
def random_attention(sinks: int = 0, window: int = 0, prompt: bool = True, when: When = When(every=64)) -> Method:
    """Keeps the prompt, and of the reply a random subset, drawn anew at every compression.

    A slot must win every draw to stay, so the older a token the fewer of its heads hold it: a soft recent window with a
    thin tail. What every score for long replies must beat at the same budget, with the prompt kept or not as there.
    ``Cache(seed=)`` decides the draws.
    """
    return Method(Random(fresh=True))
