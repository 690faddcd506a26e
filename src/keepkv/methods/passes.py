"""Read the text more than once."""

from __future__ import annotations

from keepkv.allocate.adakv import AdaKV
from keepkv.core.when import When
from keepkv.methods.base import Method, register_method
from keepkv.score.passes.kvzip import KVzip


@register_method("kvzip", paper="arXiv 2505.23416")
def kvzip(alpha: float = 0.0, sinks: int = 4, window: int = 0, when: When = When()) -> Method:
    """Keeps what the model attends to when it reads the text a second time, behind the first, as if to repeat it.

    It needs that second reading: make the cache with ``when=keepkv.When("deferred")``, feed the context, call
    ``keepkv.reread(model, cache, input_ids)``, then ``cache.compress()``. Without it, as in a plain ``generate``, the
    score is the largest attention during the first reading, which is not KVzip. Score = max over queries and the query
    heads of a KV head; the budget of a layer goes to the highest scores over all its heads, of which each first keeps
    ⌊``alpha`` · budget⌋ (the paper ranks over all layers too).

    Options:
        alpha: share of its budget that each head keeps for itself
    """
    return Method(KVzip(), AdaKV(alpha))
