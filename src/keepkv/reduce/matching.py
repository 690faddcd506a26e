"""Attention Matching: biases and values of the kept slots fitted so that attention stays (arXiv 2602.16284)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from keepkv.core.options import Amount, Count, Positive, Window, one_of
from keepkv.core.slots import LayerView
from keepkv.errors import CacheStateError
from keepkv.observe import attention
from keepkv.observe.masses import exact_dtype
from keepkv.observe.rehearsal import remembered
from keepkv.observe.sample import sample
from keepkv.reduce.base import Reduce, Reduced, register_reduce
from keepkv.reduce.drop import Drop
from keepkv.reduce.fit import Fit, Target, ridge, widest
from keepkv.score.base import Score

_LEAST = 1e-4  # mean squared row norm below which the ridge no longer shrinks with it


@register_reduce("matching")
@dataclass(frozen=True)
class Matching(Reduce):
    """Kept keys stay; each gets a bias β and a value such that reference queries find the mass and the output they had.

    The reference queries q are ``queries`` of the row's own at their own positions (``observe.sample``), or, where
    ``rehearsed``, all that ``keepkv.rehearse`` left, which see every slot; those of the G query heads of a KV head
    together. With u the biased logits over the slots q sees, Z(q) = Σ_all e^u, and o(q) the output over these slots:

        β = ln w    w = argmin Σ_q (Σ_r w_r e^{u_r(q)}/Z(q) − 1)²  with  e^−bound ≤ w ≤ e^bound
        V           argmin Σ_q ‖Σ_r â_r(q) v_r − o(q)‖² + λ‖V − V₀‖²,  â the attention over kept slots with β

    bound, ridge: bound 3 as in the released code. λ = ridge · mean_q Σ_r â_r², because few queries leave values of
    many slots undetermined; V₀ are the kept values (prior="kept") or 0 ("zero": the published minimum-norm solution,
    where a slot that no reference query sees loses its value). iterations: of multiplicative updates of w, each of
    which lowers the objective; none of them has a step size. Protected slots keep β = 0 and their values, and what
    they hold is taken off both targets; so does a head from which nothing leaves.
    """

    queries: Window = 64
    iterations: Count = 200
    bound: Amount = 3.0
    ridge: Positive = 1e-2
    prior: Annotated[str, one_of("kept", "zero")] = "kept"
    rehearsed: bool = False

    merges: ClassVar[bool] = True

    def __call__(self, view: LayerView, keep: Tensor, scores: Tensor, score: Score) -> Reduced:
        queries, positions = remembered(view)[:2] if self.rehearsed else sample(view, self.queries)
        dropped = Drop()(view, keep & view.slots.valid, scores, score)
        if not bool(dropped.lost.any()):
            return dropped
        if bool((dropped.lost.flatten(1).any(-1) & ~(positions >= 0).any(-1)).any()):
            raise CacheStateError(
                "attention matching: a row has slots to give up but none of its queries is known. Use the method "
                "'attention-matching', or the score 'matching', which remembers them."
            )
        fit = Fit.of(view, dropped)
        log_votes = fit.kept.log_votes.to(exact_dtype(fit.kept.keys), copy=True)
        values = torch.empty_like(fit.kept.values)
        for part in fit.tiles(positions.shape[1]):
            held, asking = fit.held(part), fit.queries(queries, part)
            target = fit.target(asking, positions, part)
            log_votes[:, part] += self._bias(held, asking, positions, target, fit.free[:, part]).to(log_votes.dtype)
            held = replace(held, slots=held.slots.with_(log_votes=log_votes[:, part]))
            values[:, part] = self._values(held, asking, positions, target, fit.free[:, part]).to(values.dtype)
        return replace(dropped, slots=fit.kept.with_(log_votes=log_votes, values=values))

    def _bias(self, held: LayerView, queries: Tensor, positions: Tensor, target: Target, free: Tensor) -> Tensor:
        """β (B,h,K) of the kept slots of ``held``, 0 where they are not free."""
        u = attention.logits(held, queries, positions)
        a = u.sub_(target.log_z[..., None]).exp_().flatten(2, 3) * free[:, :, None]
        bound = torch.tensor(self.bound, dtype=torch.float64).exp().item()
        w = nonnegative(a, target.mass, 1 / bound, bound, self.iterations)
        return w.log_().masked_fill_(~free, 0.0)

    def _values(self, held: LayerView, queries: Tensor, positions: Tensor, target: Target, free: Tensor) -> Tensor:
        """Values (B,h,K,Dv) of the kept slots of ``held``, whose biases are fitted already."""
        a = attention.weights(held, queries, positions).flatten(2, 3)
        values = held.slots.values.to(a.dtype)
        start = values if self.prior == "kept" else values * ~free[..., None]
        missing = target.output - a @ start
        a = a * free[:, :, None]
        per_query = queries.shape[1] // free.shape[1]
        rows = per_query * (positions >= 0).sum(-1, keepdim=True).clamp(min=1)  # (B,1), padding not counted
        return start + ridge(a, missing, self.ridge * (a.square().sum((-1, -2)) / rows).clamp(min=_LEAST))


def nonnegative(a: Tensor, target: Tensor, lower: float, upper: float, iterations: int) -> Tensor:
    """w (…,K) in [lower, upper] with a·w ≈ target in least squares; a (…,N,K) and target (…,N) not negative.

    From w = 1, w ← w · aᵀt / aᵀa w, cut to the bounds: the minimum over them of a separable upper bound of the
    objective, which therefore never rises. A column of zeros keeps w = 1.
    """
    dtype, a = a.dtype, a.to(widest(a))  # hundreds of roundings in a row add up where the objective is flat
    tiny = torch.finfo(a.dtype).tiny
    wanted = (a.mT @ target[..., None].to(a.dtype)) + tiny
    w = torch.ones_like(wanted)
    gram = a.mT @ a if a.shape[-2] > a.shape[-1] else None  # the smaller of the two to go on with
    for _ in range(iterations):
        w = (w * wanted / ((a.mT @ (a @ w) if gram is None else gram @ w) + tiny)).clamp_(lower, upper)
    return w[..., 0].to(dtype)
