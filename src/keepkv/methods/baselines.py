"""Baselines: the full cache, a random choice, and what needs no attention."""

from __future__ import annotations

from keepkv.core.when import When
from keepkv.methods.base import Method, register_method
from keepkv.score.keydiff import KeyDiff
from keepkv.score.knorm import KNorm
from keepkv.score.random import Random
from keepkv.score.streaming import Streaming


@register_method("full")
def full() -> Method:
    """The plain cache: nothing is ever compressed; a budget is not applied, which a warning says."""
    return Method(Random(), when=When(prefill=None))


@register_method("random")
def random(sinks: int = 4, window: int = 0, when: When = When()) -> Method:
    """Keeps a random subset: the null that every score must beat. ``sinks``/``window`` pin the ends of the prompt."""
    return Method(Random())


@register_method("streaming-llm", paper="arXiv 2309.17453")
def streaming_llm(sinks: int = 4, window: int = 0, when: When = When()) -> Method:
    """Keeps the first ``sinks`` tokens and the most recent ones, as many as the budget holds.

    Score = position. Kept keys stay at their original positions; the paper moves them up to close the gap.
    ``When(every=n)`` keeps the cache at the budget while decoding.
    """
    return Method(Streaming())


@register_method("knorm", paper="arXiv 2406.11430")
def knorm(sinks: int = 4, window: int = 0, when: When = When()) -> Method:
    """Keeps the slots whose keys have the smallest norm: score −‖k‖₂.

    The paper compresses all layers but the first two; here every layer is compressed, as in kvpress. Where a model
    norms its keys (QK-norm), norms hardly differ and the choice means little.
    """
    return Method(KNorm())


@register_method("keydiff", paper="arXiv 2504.15364")
def keydiff(sinks: int = 4, window: int = 0, when: When = When()) -> Method:
    """Keeps the slots whose keys are least like the average key: score −cos(k, mean of normalised keys).

    The paper runs it block by block over a chunked prefill: chunk the prefill, with ``When("immediate")``.
    """
    return Method(KeyDiff())
