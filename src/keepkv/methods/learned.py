"""Learned beforehand, for one model: published weights, or a fit of ours."""

from __future__ import annotations

from keepkv.allocate.base import Allocate
from keepkv.allocate.threshold import Threshold
from keepkv.core.when import When
from keepkv.methods.base import Method, register_method
from keepkv.methods.pieces import as_score, shared
from keepkv.score.base import Score
from keepkv.score.learned.fast_kvzip import FastKVzip
from keepkv.score.learned.kvzap import KVzap


@register_method("kvzap", paper="arXiv 2601.07891")
def kvzap(
    allocate: str | Allocate = "pooled", safeguard: float = 0.0, sinks: int = 4, window: int = 16, when: When = When(),
) -> Method:  # fmt: skip
    """Keeps what a second reading of the text would attend to, foretold from each token's hidden state.

    Score: ln of the KVzip+ score, by a linear map or a small network of the hidden state that a layer's attention is
    fed (``score.learned.kvzap``). ``keepkv calibrate kvzap`` fits the map in closed form, and with ``--from`` it reads
    the networks that the authors published. Here the highest scores fill the budget; the paper drops whatever is below
    a threshold once it is 128 tokens old: that is method "dms".

    Options:
        allocate: pooled: one budget for all layers; adakv: by head; uniform
        safeguard: share of its budget that each head keeps for itself, where all share one
    """
    return Method(KVzap(), shared(allocate, safeguard))


@register_method("fast-kvzip", paper="arXiv 2601.17668")
def fast_kvzip(
    allocate: str | Allocate = "pooled", safeguard: float = 0.0, sinks: int = 4, window: int = 16, when: When = When(),
) -> Method:  # fmt: skip
    """Keeps what a second reading of the text would attend to, foretold from hidden states by small gates.

    Score: attention of a small query of the token to its own small key, beside learned sinks
    (``score.learned.fast_kvzip``). ``keepkv calibrate fast-kvzip`` trains the gates; ``--from`` reads those that the
    authors published. As there, one budget is shared by all heads of all layers. window: the paper keeps the last 2 %
    of a prompt, or the last 4096 tokens where it is read in chunks: give that number.

    Options:
        allocate: pooled: one budget for all layers; adakv: by head; uniform
        safeguard: share of its budget that each head keeps for itself, where all share one
    """
    return Method(FastKVzip(), shared(allocate, safeguard))


@register_method("dms", paper="arXiv 2506.05345")
def dms(
    threshold: float = -4.0, score: str | Score = "kvzap", sinks: int = 4, window: int = 128, when: When = When(),
) -> Method:  # fmt: skip
    """Keeps the slots whose score is ``threshold`` at least, once they are older than the ``window`` newest tokens.

    How many stay, the text decides, in each head: with ``budget=0.99`` the threshold alone. A smaller budget is a
    bound, which the heads of a layer share by score where more slots pass; one that holds every token keeps them all.
    ``cache.report()`` says what was kept. Any score will do, each with thresholds on its own scale: the default is
    KVzap's, ln of KVzip+ (arXiv 2601.07891), for which its authors take -3 to -7. With ``When(every=n)`` decoded tokens
    leave too, n at a time.

    The paper trains the model to say, while it makes a token, that it will drop it after the window. That is not here:
    as in kvpress, a score decides.

    Options:
        threshold: on the scale of the score
        score: its name, or a score of your own
    """
    return Method(as_score(score, window), Threshold(threshold=threshold))
