"""Methods that need more of a text than one reading."""

from __future__ import annotations

from keepkv.allocate.base import Allocate
from keepkv.core.when import When
from keepkv.methods.base import Method, register_method
from keepkv.methods.pieces import shared
from keepkv.score.passes.kvzip import KVzip


@register_method("kvzip", paper="arXiv 2505.23416")
def kvzip(
    alpha: float = 0.0, plus: bool = False, allocate: str | Allocate = "adakv", sinks: int = 4, window: int = 0,
    when: When = When(),
) -> Method:  # fmt: skip
    """Keeps what the model attends to when it reads the text a second time, behind the first, as if to repeat it.

    It needs that second reading: make the cache with ``when=keepkv.When("deferred")``, feed the context, call
    ``keepkv.reread(model, cache, input_ids)``, then ``cache.compress()``. Without it, as in a plain ``generate``, the
    score is the largest attention during the first reading, which is not KVzip. Score = max over queries and the query
    heads of a KV head; the budget of a layer goes to the highest scores over all its heads, of which each first keeps
    ⌊``alpha`` · budget⌋. The paper ranks over all layers: ``allocate="pooled"``. ``plus``: KVzip+ (arXiv 2601.07891),
    whose attention counts by what the slot's value adds to the residual stream, ‖W_O v‖ / ‖h‖.

    Options:
        alpha: share of its budget that each head keeps for itself
        plus: KVzip+, for models whose output projection can be read
        allocate: adakv: budgets by layer, shared by its heads; pooled: one for all layers; uniform
    """
    return Method(KVzip(plus), shared(allocate, alpha))
