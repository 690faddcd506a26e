"""Methods whose heads get budgets of their own."""

from __future__ import annotations

from keepkv.allocate.adakv import AdaKV
from keepkv.core.when import When
from keepkv.methods.base import Method, register_method
from keepkv.methods.keepkv import as_score
from keepkv.score.base import Score
from keepkv.score.kvzip import KVzip


@register_method("adakv", paper="arXiv 2407.11550")
def adakv(
    score: str | Score = "snapkv", alpha: float = 0.2, sinks: int = 4, window: int = 32, when: When = When()
) -> Method:
    """Any score, with the budget of a layer shared by its heads: those with concentrated attention need fewer slots.

    Each head first keeps its own top ⌊``alpha`` · budget⌋, the rest goes to the highest scores over all heads.
    ``score`` is a name or a Score whose values can be compared between heads; "snapkv" looks through the method's
    ``window``. Memory of what a head does not keep is freed.
    """
    return Method(
        score=as_score(score, window),
        allocate=AdaKV(alpha=alpha),
        when=when,
        sinks=sinks,
        window=window,
        name="adakv",
        options={"score": score, "alpha": alpha, "window": window},
    )


@register_method("kvzip", paper="arXiv 2505.23416")
def kvzip(alpha: float = 0.0, sinks: int = 4, window: int = 0, when: When = When()) -> Method:
    """Keeps what the model attends to when it reads the text a second time, behind the first, as if to repeat it.

    It needs that second reading: make the cache with ``when=keepkv.When("deferred")``, feed the context, call
    ``keepkv.reread(model, cache, input_ids)``, then ``cache.compress()``. Without it, as in a plain ``generate``, the
    score is the largest attention during the first reading, which is not KVzip. Score = max over queries and the query
    heads of a KV head; the budget of a layer goes to the highest scores over all its heads, of which each first keeps
    ⌊``alpha`` · budget⌋ (the paper ranks over all layers too).
    """
    return Method(
        score=KVzip(),
        allocate=AdaKV(alpha=alpha),
        when=when,
        sinks=sinks,
        window=window,
        name="kvzip",
        options={"alpha": alpha, "window": window},
    )
