"""keepkv2: slots whose keys are unlike the others of their head stay, from one budget for all heads and layers."""

from __future__ import annotations

from keepkv.allocate.adakv import Pooled
from keepkv.allocate.base import Allocate
from keepkv.core.when import When
from keepkv.errors import KeepKVError
from keepkv.methods.base import Method, register_method
from keepkv.methods.pieces import as_allocation, as_score
from keepkv.reduce.drop import Drop
from keepkv.reduce.merge import KeepKV
from keepkv.reduce.refit import Refit
from keepkv.score.base import Score
from keepkv.score.content.leverage import Leverage
from keepkv.score.passes.rehearsed import Rehearsed


@register_method("keepkv2")
def keepkv2(
    score: str | Score = "leverage", queries: int = 16, kernel: int = 13, floor: float = 5.0, ridge: float = 1.0,
    sample: int = 1024, allocate: str | Allocate = "pooled", safeguard: float = 0.2, merge: float | None = None,
    rehearsed: bool = False, sinks: int = 4, window: int = 16, when: When = When(),
) -> Method:  # fmt: skip
    """Keeps the slots whose content nothing else holds, out of all heads and layers; what resembles them may be merged.

    1. Score: S_i = ℓ_i·(A_i + ``floor``·Ā). ℓ is the leverage of a key before RoPE among the keys of its head (ridge
       ``ridge``), A the largest attention that the last ``queries`` tokens give one of the ``kernel`` slots around it,
       Ā its mean. What is usual in a head is learnt from ``sample`` of its keys. See ``score.content.leverage``.
    2. Budget: one for all heads of all layers, whose scores compare; each keeps its own top ``safeguard`` share.
    3. ``merge``, a key cosine such as 0.8: a leaving slot enters the kept slot most similar to it, if that is above
       ``merge``. Keys stay where they are. The bias becomes ln(Σ mass of the group / its own), the value the mean by
       mass, of the mean attention of the last ``queries`` tokens. The output error falls by a few per cent, the
       answers do not gain; None, the default, drops what leaves.

    4. ``rehearsed=True``: the score is times √(E_i + Ē/20), E what the outputs of rehearsed questions would lose with
       the slot, and biases and values of the kept slots are fitted to these outputs. What to rehearse is known best by
       who will ask; without questions, pieces of the text are read again. See ``score.passes.rehearsed`` and
       ``reduce.refit``. Make the cache with ``when=keepkv.When("deferred")``, feed the context, call
       ``keepkv.rehearse(model, cache, input_ids, questions=…)``, then ``cache.compress()``.

    score: another score by name, with its own defaults. allocate: "pooled", "adakv" for budgets by head, "uniform";
    with the first, a prompt stands in memory as a whole until its forward ends. sinks, window: first and most recent
    tokens that are always kept and receive no merge. ``when=When(every=128)`` recompresses while decoding.

    Options:
        queries: recent tokens whose attention counts
        kernel: neighbours of which the largest attention counts, an odd number
        floor: attention that a slot has at least, in means
        ridge: of the leverage
        sample: keys of a head that its usual keys are learnt from
        allocate: pooled: one budget for all layers; adakv: by head; uniform
        safeguard: share of its budget that each head keeps for itself
        merge: key cosine from which a leaving slot is merged; none: it is dropped
        rehearsed: whether questions are rehearsed, with keepkv.rehearse
    """
    if rehearsed and merge is not None:
        raise KeepKVError(f"keepkv2(merge={merge}, rehearsed=True): fitted slots cannot merge too; give one of them")
    chosen = Leverage(queries, kernel, floor, ridge, sample) if score == "leverage" else as_score(score, 32)
    heads = Pooled(safeguard) if allocate == "pooled" else as_allocation(allocate)
    if rehearsed:
        return Method(Rehearsed(chosen), heads, Refit())
    return Method(chosen, heads, Drop() if merge is None else KeepKV("fixed", threshold=merge))
