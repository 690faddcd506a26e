"""Slots chosen by the very questions that are asked, and by the full cache's replies to them: what a choice could know.

The score of a slot is the most attention that any of their tokens pays to it, the budget is one for all layers. It is
no bound in the strict sense: another score may know better how to use the same questions.
"""

from __future__ import annotations

from keepkv.allocate.adakv import Pooled
from keepkv.methods.base import Method, register_method
from keepkv.score.passes.asked import Asked

ORACLE = "oracle"


@register_method(ORACLE)
def oracle(sinks: int = 4, window: int = 16) -> Method:
    """The slots that the questions and their replies attend to.

    Options:
        sinks: first tokens that are always kept
        window: most recent tokens that are always kept
    """
    return Method(Asked("max"), Pooled(0.1))
