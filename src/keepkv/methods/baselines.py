"""Baselines: the full cache, a random choice, and the ends of the text."""

from __future__ import annotations

from keepkv.core.when import When
from keepkv.methods.base import Method, register_method
from keepkv.score.content.random import Random
from keepkv.score.content.streaming import Streaming


@register_method("full")
def full() -> Method:
    """The plain cache: nothing is ever compressed; a budget is not applied, which a warning says."""
    return Method(Random(), when=When(prefill=None))


@register_method("random")
def random(sinks: int = 4, window: int = 0, when: When = When()) -> Method:
    """Keeps a random subset: the null that every score must beat. ``sinks``/``window`` pin the ends of the prompt."""
    return Method(Random())


@register_method("streaming-llm", paper="arXiv 2309.17453")
def streaming_llm(sinks: int = 4, window: int = 0, prompt: bool = False, when: When = When()) -> Method:
    """Keeps the first ``sinks`` tokens and the most recent ones, as many as the budget holds.

    Score = position. Kept keys stay at their original positions; the paper moves them up to close the gap.
    ``When(every=n)`` keeps the cache at the budget while decoding.
    """
    return Method(Streaming())
