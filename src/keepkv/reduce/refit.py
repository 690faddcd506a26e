"""Biases and values of the kept slots, fitted to the outputs of rehearsed questions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from keepkv.core.options import Positive
from keepkv.core.slots import LayerView
from keepkv.observe.rehearsal import QueryTile, parts, sizes
from keepkv.reduce.base import Reduce, Reduced, register_reduce
from keepkv.reduce.drop import Drop
from keepkv.reduce.fit import ridge, widest
from keepkv.score.base import Score

VOTES = (0.02, 50.0)  # what a slot is fitted to stand for at least and at most, times what it stood for


@register_reduce("refit")
@dataclass(frozen=True)
class Refit(Reduce):
    """Kept keys stay; biases, then values change as little as rehearsed questions find the outputs they had.

        δ     argmin Σ_q ((Σ_r δ_r a_r(q) − lost(q)) / ‖o(q)‖)² + λ‖δ‖²    bias + ln(1 + δ)
        Δ     argmin Σ_q ‖Σ_r a'_r(q) Δ_r − (o(q) − o'(q))‖² / ‖o(q)‖² + λ'‖Δ‖²    v + Δ

    with a the attention over all slots and the question's own tokens, lost that on slots that leave, a' and o' those
    with the new biases, ‖o‖ the norm of the layer's output. λ is ``ridge`` times the mean of Σ_q a_r²/‖o‖² over kept
    slots, λ' the same of a': a slot that no rehearsed question attends to stays as it was. The form of Attention
    Matching (arXiv 2602.16284), with the questions in place of the text's own queries.
    """

    ridge: Positive = 0.3
    merges: ClassVar[bool] = True

    def __call__(self, view: LayerView, keep: Tensor, scores: Tensor, score: Score) -> Reduced:
        dropped = Drop()(view, keep & view.slots.valid, scores, score)
        if not bool(dropped.lost.any()):
            return dropped
        size, kept = sizes(view), dropped.slots
        index, _ = view.slots.kept_indices(keep)
        votes, values = kept.log_votes.clone(), kept.values.clone()
        touched = (dropped.dropped > 0)[..., None]  # heads from which nothing leaves stay as they are
        for part in _heads(view):
            some, weight = part.heads, size.reciprocal()[:, None, None].expand(-1, 1, view.query_groups, -1)
            weight = weight.reshape(len(size), 1, -1, 1)
            lost = (part.attn * dropped.lost[:, some, None]).sum(-1, keepdim=True)
            column = part.attn.gather(-1, index[:, some, None].expand(-1, -1, part.attn.shape[2], -1))
            column = column * kept.valid[:, some, None]
            x = column * weight
            delta = ridge(x, lost * weight, relative(self.ridge, x, kept.valid[:, some]))[..., 0]
            factor = (1 + delta).clamp(*VOTES).masked_fill(~(touched[:, some] & kept.valid[:, some]), 1.0)
            votes[:, some] += factor.log().to(votes.dtype)
            column = column * factor[:, :, None]
            mass = column.sum(-1, keepdim=True) + part.own_mass
            column, own = column / mass, part.own_mass / mass
            held = kept.values[:, some].to(column.dtype)
            missing = part.output - column @ held - own * part.own_output
            x = column * weight
            change = ridge(x, missing * weight, relative(self.ridge, x, kept.valid[:, some]))
            values[:, some] = (held + change * touched[:, some, :, None]).to(values.dtype)
        return replace(dropped, slots=kept.with_(log_votes=votes, values=values))


def _heads(view: LayerView) -> Iterator[QueryTile]:
    """All queries of one KV head after another."""
    return parts(view, queries=1 << 30, heads=1)


def relative(penalty: float, x: Tensor, valid: Tensor) -> Tensor:
    """``penalty`` times the mean over the columns ``valid`` (…,K) of Σ_n x², (…): x (…,N,K), zero in other columns."""
    pull = penalty * x.to(widest(x)).square().sum((-1, -2)) / valid.sum(-1).clamp(min=1)
    return pull.clamp(min=torch.finfo(torch.float32).tiny)
