"""Baselines: the full cache, a random choice, the ends of the text, and what was used last."""

from __future__ import annotations

from keepkv.core.when import When
from keepkv.methods.base import Method, register_method
from keepkv.score.content.random import Random
from keepkv.score.content.streaming import Streaming
from keepkv.score.queries.lru import LRU


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


@register_method("protected-lru", paper="arXiv 2605.18053")
def protected_lru(factor: float = 1.0, sinks: int = 4, window: int = 32, when: When = When()) -> Method:
    """Keeps the ends of the text and, in between, what was attended to last: the null for scores of attention.

    Score = position of the last query that gave the slot at least ``factor`` times an even share of its attention, in
    any query head of the KV head. ``When(every=n)`` goes on while decoding. The paper protects a tenth of the budget at
    either end of the prompt, and finds that with it most scores are level with this one.

    Options:
        factor: even shares of attention from which a slot counts as attended to
    """
    return Method(LRU(factor))
