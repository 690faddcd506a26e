"""Baselines: the full cache, and a random choice."""

from __future__ import annotations

from keepkv.methods.base import Method, register_method
from keepkv.score.random import Random
from keepkv.when import When


@register_method("full")
def full() -> Method:
    """The plain cache: nothing is ever compressed, the budget is ignored."""
    return Method(score=Random(), when=When(prefill=None), name="full")


@register_method("random")
def random(sinks: int = 4, window: int = 0, when: When = When()) -> Method:
    """Keeps a random subset: the null that every score must beat. ``sinks``/``window`` pin the ends of the prompt."""
    return Method(score=Random(), when=when, sinks=sinks, window=window, name="random")
