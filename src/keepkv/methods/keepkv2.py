"""keepkv2: what leaves is chosen by what its absence would change, and its mass goes to the most similar kept slot."""

from __future__ import annotations

from keepkv.allocate.base import Allocate
from keepkv.methods.base import Method, register_method
from keepkv.methods.keepkv import as_allocation
from keepkv.reduce.merge import KeepKV
from keepkv.score.future import Future
from keepkv.when import When


@register_method("keepkv2")
def keepkv2(
    queries: int = 256,
    span: int = 128,
    allocate: str | Allocate = "uniform",
    threshold: float | None = None,
    coverage: float = 0.98,
    sinks: int = 4,
    window: int = 16,
    when: When = When(),
) -> Method:
    """Keeps the slots whose absence would change later outputs most, and gives the mass of the others to them.

    A first form, being studied: where questions are unlike the text that is read, as on the embedded model, it is far
    behind ``keydiff``. More ``queries`` help, and cost.

    1. Queries to come: ``queries`` of the text's own, spread over it, turned back by RoPE and on to positions 1 to
       ``span`` behind its end.
    2. Score: S_i = E_q[(a_i/(1−a_i))²‖v_i − o(q)‖²], the mean squared change of the head's output if slot i alone were
       dropped; see ``score.future``.
    3. Merge: each leaving slot into the kept slot of largest key cosine, whose key stays. Its bias becomes
       ln(Σ mass of the group / its own), its value the mean by mass, of the masses E_q[a_i].

    allocate: "uniform", or "adakv" for budgets by head: scores are in units of the output. threshold: least cosine of
    a merge; None: none. coverage: share of the leaving mass that is merged, the largest first; the rest is dropped.
    sinks, window: first and most recent tokens that are always kept and receive no merge. ``when=When(every=128)``
    recompresses while decoding.
    """
    return Method(
        score=Future(queries=queries, span=span),
        allocate=as_allocation(allocate),
        reduce=KeepKV(key="fixed", threshold=threshold, coverage=coverage),
        when=when,
        sinks=sinks,
        window=window,
        name="keepkv2",
        options={
            "queries": queries, "span": span, "allocate": allocate, "threshold": threshold, "coverage": coverage,
        },
    )  # fmt: skip
