"""KeepKV: any score and allocation, and what leaves is merged so that its attention mass stays."""

from __future__ import annotations

from keepkv.allocate.base import Allocate
from keepkv.core.when import When
from keepkv.methods.base import Method, register_method
from keepkv.methods.pieces import as_allocation, as_score
from keepkv.reduce.merge import KeepKV
from keepkv.score.base import Score
from keepkv.score.queries.remembering import Remembering


@register_method("keepkv", paper="arXiv 2504.09936")
def keepkv(
    key: str = "fixed", score: str | Score = "keydiff", allocate: str | Allocate = "uniform",
    threshold: float | None = 0.8, alpha: float = 0.9, window: int = 32, sinks: int = 4, when: When = When(),
) -> Method:  # fmt: skip
    """Merges each leaving slot into the kept slot with the most similar key, and keeps the group's attention mass.

    A slot with log votes b attends as softmax(q·k/√d + b). For a group of slots 𝒢 that becomes one, with mean masses
    m_i (attention of the last ``window`` queries, weights ∝ alpha^age, averaged over the query heads of the slot):

        value   v_r = Σ m_i v_i / Σ m_i
        fixed   k_r = k_c, the kept key; b_r = b_c + ln(Σ m_i / m_c)
        bias    k_r = Σ m_i k_i / Σ m_i; b_r matches the mass Σ m_i at those queries
        zip     k_r = (ℓ*/ℓ̄)·k̄, b_r = ln P: the paper (Eq. 7) with raw scores e^{q·k}, many-to-one in log space
        code    k_r = k̄, b_r = ln P, the number of tokens: the released code

    ``zip`` is here to be compared with, not to be used: at 20 % of SmolLM2-135M's tokens its KL to the full cache is
    7.2 nats, where dropping at random has 0.83.

    At one query and one query head, ``fixed``, ``bias`` and ``zip`` change neither numerator nor denominator of the
    attention. The defaults are what measured best where the context is compressed before the question is known
    (``docs/keepkv.md``): keys chosen by ``keydiff`` and left in place. Moving a key that was worth
    keeping costs more than its merge brings, and merging everything makes each kept slot speak for too many others.

    Any score works, and ``snapkv`` is the choice where the question stands at the end of the prompt. Neither sinks nor
    the window receive a merge. ``when=When(every=128)`` recompresses while decoding.

    Options:
        key: fixed, bias, zip or code: the key of a merged slot
        threshold: least key cosine of a merge, the rest is dropped; none: all is merged
        alpha: decay of the mass with the age of the query
        window: most recent tokens that are always kept, and queries that predict the masses
        score: a score by name; snapkv where the question ends the prompt
    """
    chosen = Remembering(as_score(score, window), window)
    return Method(chosen, as_allocation(allocate), KeepKV(key, threshold, alpha, window))
