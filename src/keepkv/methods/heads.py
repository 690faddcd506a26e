"""Share the budget by heads and layers, whatever the score."""

from __future__ import annotations

from keepkv.allocate.adakv import AdaKV
from keepkv.core.when import When
from keepkv.methods.base import Method, register_method
from keepkv.methods.pieces import as_score
from keepkv.score.base import Score


@register_method("adakv", paper="arXiv 2407.11550")
def adakv(
    score: str | Score = "snapkv", alpha: float = 0.2, sinks: int = 4, window: int = 32, when: When = When()
) -> Method:
    """Any score, with the budget of a layer shared by its heads: those with concentrated attention need fewer slots.

    Each head first keeps its own top ⌊``alpha`` · budget⌋, the rest goes to the highest scores over all heads.
    ``score`` is a name or a Score whose values can be compared between heads; "snapkv" looks through the method's
    ``window``. Memory of what a head does not keep is freed.

    Options:
        score: name or Score whose values can be compared between heads
        alpha: share of its budget that each head keeps for itself
        window: most recent tokens that are always kept; snapkv looks through them
    """
    return Method(as_score(score, window), AdaKV(alpha))
