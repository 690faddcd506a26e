"""keepkv3: what questions would ask for stays, foretold from each slot by gates that are fitted once per model."""

from __future__ import annotations

from keepkv.allocate.adakv import Pooled
from keepkv.allocate.base import Allocate
from keepkv.core.when import When
from keepkv.methods.base import Method, register_method
from keepkv.methods.pieces import as_allocation
from keepkv.score.learned.gates import Gates


@register_method("keepkv3")
def keepkv3(
    allocate: str | Allocate = "pooled", safeguard: float = 0.1, sinks: int = 4, window: int = 16, when: When = When(),
) -> Method:  # fmt: skip
    """Keeps the slots that questions would ask for, before any is asked and without reading the text again.

    1. Once per model, ``keepkv calibrate gates`` lets it answer questions on other texts, and fits for each KV head, in
       closed form, a linear map from a token's key and value to the attention that it gets (``score.learned.gates``).
    2. Score: that map. It looks at no query, so nothing is observed while a text is read, and the order of slots never
       changes while decoding.
    3. Budget: one for all heads of all layers, whose scores are on one scale; each keeps its own top ``safeguard``.

    It costs one product of each key and value with a vector. ``keepkv.Cache(model, "keepkv3", 0.25,
    calibration="gates.safetensors")``. allocate: "pooled", "adakv" for budgets by layer, shared by its heads,
    "uniform"; with the first, a prompt stands in memory as a whole until its forward ends. sinks, window: first and
    most recent tokens that are always kept.

    Options:
        allocate: pooled: one budget for all layers; adakv: by head; uniform
        safeguard: share of its budget that each head keeps for itself, where all share one
    """
    return Method(Gates(), Pooled(safeguard) if allocate == "pooled" else as_allocation(allocate))
