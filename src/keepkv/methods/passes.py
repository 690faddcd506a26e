"""Read the text more than once."""

from __future__ import annotations

from keepkv.allocate.base import Allocate
from keepkv.core.when import When
from keepkv.methods.base import Method, register_method
from keepkv.methods.pieces import shared
from keepkv.score.passes.kvcompose import KVCompose
from keepkv.score.passes.kvgrad import KVgrad
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


@register_method("kvgrad", paper="openreview cg1wTCJjjk")
def kvgrad(
    alpha: float = 0.0, allocate: str | Allocate = "pooled", sinks: int = 4, window: int = 0, when: When = When(),
) -> Method:  # fmt: skip
    """Keeps what the outcome of a second reading hangs on: attention, by what a slot adds, by the gradient there.

    Read the text again as for "kvzip": ``keepkv.reread`` with ``when=keepkv.When("deferred")``. Score = max over
    queries of attention · ‖W_O v‖ · ‖∂Φ/∂o‖, with Φ the squared norms of the last layer's outputs
    (``score.passes.kvgrad``). It takes a backward pass: four times the time of reading the text once, and the
    activations of a chunk in all layers. It serves models whose output projection can be read.

    Options:
        alpha: share of its budget that each head keeps for itself
        allocate: pooled: one budget for all layers; adakv: by head; uniform
    """
    return Method(KVgrad(), shared(allocate, alpha))


@register_method("kvcompose", paper="arXiv 2509.05165")
def kvcompose(
    allocate: str | Allocate = "composite", sinks: int = 4, window: int = 0, when: When = When(),
) -> Method:  # fmt: skip
    """Keeps in each head what it attends to while it reads the text again, in a layer as many as its heads are worth.

    Read the text again as for "kvzip": ``keepkv.reread`` with ``when=keepkv.When("deferred")``. Score = s + its mean
    over the KV heads, s the largest attention of a token, mean over the query heads of a KV head. Heads of a layer
    keep as many slots, not the same ones: the r-th best of each make a composite token, and the best composite tokens
    of all layers fill the budget. ``allocate="pooled"``: the paper's unstructured variant.

    Options:
        allocate: composite: by layer; pooled: by head and layer; adakv: by head; uniform
    """
    return Method(KVCompose(), shared(allocate, 0.0))
