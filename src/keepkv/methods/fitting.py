"""Fit what stays to what leaves: biases, values or a few slots that stand for the rest."""

from __future__ import annotations

from keepkv.allocate.adakv import AdaKV
from keepkv.allocate.base import Allocate
from keepkv.core.when import When
from keepkv.methods.base import Method, register_method
from keepkv.methods.pieces import as_allocation, as_score
from keepkv.reduce.grkv import GRKV
from keepkv.reduce.matching import Matching
from keepkv.reduce.residual import Residual
from keepkv.score.base import Score
from keepkv.score.queries import matching
from keepkv.score.queries.remembering import Remembering


@register_method("attention-matching", paper="arXiv 2602.16284")
def attention_matching(
    queries: int = 64, pool: str = "rms", allocate: str | Allocate = "uniform", iterations: int = 200,
    bound: float = 3.0, ridge: float = 1e-2, prior: str = "kept",
    sinks: int = 4, window: int = 32, when: When = When(),
) -> Method:  # fmt: skip
    """Keeps the keys of largest attention, and fits their biases and values to the mass and output of past queries.

    With reference queries q, ``queries`` of the text's own spread over it, Z(q) the mass of all slots and o(q) their
    output:

        keys    those of largest sqrt(mean a²) (``pool="rms"``) or max a
        bias    β = ln w, w = argmin Σ_q (Σ_r w_r e^{u_r(q)}/Z(q) − 1)², e^−bound ≤ w ≤ e^bound
        values  ridge regression of o(q) on the attention over the kept slots with β

    Not as published: there tens of thousands of reference queries, also from repeating the text or from questions on
    it that the model asks itself, attend to all of the text; here there are few, and each sees what stands before it.
    They leave many values undetermined, and the ridge holds those near the kept ones (``prior="zero"``: near 0, as the
    least-norm solution of the paper is). Layers are fitted in the same forward, not one after the other on compressed
    predecessors ("on-policy"), and head budgets are not optimised beforehand: ``allocate="adakv"`` adapts them. sinks,
    window: first and most recent tokens, kept exact; they take no part in the fit.

    Options:
        queries: queries of the text that are matched
        pool: rms or max over these queries
        iterations: steps of the fit of the biases
        bound: largest bias, in nats
        ridge: of the regression of the values
        prior: kept or zero: what the ridge draws the values to
    """
    reduce = Matching(queries, iterations, bound, ridge, prior)
    return Method(matching.Matching(queries, pool), as_allocation(allocate), reduce)


@register_method("grkv", paper="arXiv 2605.31105")
def grkv(
    score: str | Score = "snapkv", allocate: str | Allocate | None = None, alpha: float = 0.2, queries: int = 32,
    penalty: float = 0.01, value_cap: float = 0.1, key_cap: float = 0.025,
    sinks: int = 4, window: int = 32, when: When = When(),
) -> Method:  # fmt: skip
    """AdaKV's selection, then one round of ridge regression of the outputs of recent queries on values and keys.

    With O the outputs of the last ``queries`` queries and Â their attention over the kept slots:

        values  ΔV = Âᵀ(ÂÂᵀ + λI)⁻¹(O − ÂV)
        keys    the same for the outputs linearised in the keys

    λ = ``penalty``; changes of at most ``value_cap`` and ``key_cap`` of a value's and key's norm; each head takes the
    best of no change, V, K and V. No votes.

    Not as published: the regression is written from a summary of the paper, as no code is public, so that caps apply
    to each slot, keys are solved for by conjugate gradients, and the choice is by head. The paper selects by Critical
    AdaKV, which weighs scores by projected value norms. sinks and window, which the queries attend to most, stay as
    they are. allocate: ``None`` is AdaKV with the safeguard ``alpha``.

    Options:
        allocate: an allocation by name; none: AdaKV with alpha
        alpha: share of its budget that each head keeps for itself
        queries: recent queries whose outputs are matched
        penalty: of the regression
        value_cap: largest change of a value, as a share of its norm
        key_cap: largest change of a key, as a share of its norm
    """
    heads = AdaKV(alpha) if allocate is None else as_allocation(allocate)
    return Method(Remembering(as_score(score, window), queries), heads, GRKV(queries, penalty, value_cap, key_cap))


@register_method("reskv", paper="arXiv 2607.29591")
def reskv(
    score: str | Score = "snapkv", allocate: str | Allocate = "uniform", residual: float = 0.1, bias: str = "count",
    alpha: float = 0.9, sinks: int = 4, window: int = 32, when: When = When(),
) -> Method:  # fmt: skip
    """Exact slots, and a few residual ones that hold the means of everything that leaves, in the style of ResKV.

    A share ``residual`` of each head's budget is taken from its weakest kept slots; what leaves is cut into as many
    runs, in the order of the text, and each becomes one slot:

        count   k_r = mean k, v_r = mean v, b_r = ln(number of tokens), as published
        mass    k_r, v_r weighted by the mass that the last ``window`` queries give, b_r keeps the mean mass of the run

    Not as published, where no code is public: runs instead of clusters; one ``residual`` share for all heads instead of
    a choice for each by held-out queries; no gate that damps residual slots where the exact ones hold the attention.

    Options:
        residual: share of each head's budget that goes to slots of means
        bias: count or mass: what such a slot weighs
        alpha: decay of the mass with the age of the query
    """
    chosen = as_score(score, window)
    chosen = Remembering(chosen, window) if bias == "mass" else chosen
    return Method(chosen, as_allocation(allocate), Residual(residual, bias, max(1, window), alpha))
