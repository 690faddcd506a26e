"""Budgets per head from the scores themselves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from keepkv.allocate.base import Allocate, Known, register_allocate
from keepkv.allocate.select import at_rank, tiers
from keepkv.core.options import Share
from keepkv.core.slots import LayerView


@register_allocate("adakv")
@dataclass(frozen=True)
class AdaKV(Allocate):
    """AdaKV (arXiv 2407.11550): heads of a layer share one budget of H * budget slots.

    Each head first keeps its own top ``⌊alpha · budget⌋`` (the safeguard; protected slots are its first entries),
    the rest of the budget goes to the highest scores over all heads of the row. Works with any score whose values
    can be compared between heads, such as attention weights.
    """

    alpha: Share = 0.2
    ragged: ClassVar[bool] = True

    def __call__(self, scores: Tensor, view: LayerView, budget: Tensor) -> Tensor:
        return self.across([scores], [tiers(view)], [budget])[0]

    def across(
        self, scores: list[Tensor], tiers: list[Tensor], budgets: list[Tensor], known: Known = ()
    ) -> list[Tensor]:
        heads, longest = [x.shape[1] for x in scores], max(x.shape[2] for x in scores)
        score, tier = (torch.cat([_widened(x, longest) for x in parts], dim=1) for parts in (scores, tiers))
        budget = torch.stack(budgets, dim=1)  # (B,L)
        layer = torch.arange(len(heads), device=budget.device).repeat_interleave(budget.new_tensor(heads))
        own = (self.alpha * budget.double() + 1e-9).floor().long()[:, layer]  # 0.29 * 100 is 28.999…
        held, must = (tier > 0).sum(-1), (tier == 2).sum(-1)  # (B,Σ H)
        safe = own.maximum(must).minimum(held) - must  # slots that are not protected but are among a head's own
        total = budget[:, layer].sum(-1).minimum(held.sum(-1)) - must.sum(-1)
        return list((must + _best(score, tier == 1, safe, total)).split(heads, dim=1))


def _widened(x: Tensor, size: int) -> Tensor:
    return x if x.shape[-1] == size else torch.nn.functional.pad(x, (0, size - x.shape[-1]))


def _best(score: Tensor, free: Tensor, safe: Tensor, total: Tensor) -> Tensor:
    """How many of the slots ``free`` (B,H,S) each head keeps, (B,H), if the ``safe`` (B,H) best of each are kept and
    all others compete by ``score`` until there are ``total`` (B,) of them, or no fewer than the safe ones.

    Equal scores go to the earlier head. By thresholds, as a sort of all slots of all layers takes several times the
    memory of the scores.
    """
    score = score.float().nan_to_num(nan=float("-inf"), posinf=float("inf"), neginf=float("-inf"))
    score.masked_fill_(~free, float("-inf"))  # a new tensor since the line above
    left = (total - safe.sum(-1)).clamp(min=0)  # (B,)
    most, rest = torch.stack((safe.amax(), left.amax())).tolist()
    if most:
        best = score.topk(most, dim=-1).indices
        taken = torch.arange(most, device=best.device) < safe[..., None]
        free = free.scatter(-1, best, free.gather(-1, best) & ~taken)
    if not rest:
        return safe
    flat = score.masked_fill_(~free, float("-inf")).flatten(1)
    last = at_rank(flat, left[:, None])[..., None]  # (B,1,1)
    last = last.masked_fill(left[:, None, None] == 0, float("inf"))
    above, equal = ((score > last) & free).sum(-1), ((score == last) & free).sum(-1)
    before = equal.cumsum(-1) - equal
    ties = (left[:, None] - above.sum(-1, keepdim=True) - before).clamp(min=0).minimum(equal)
    return safe + above + ties


@register_allocate("pooled")
@dataclass(frozen=True)
class Pooled(AdaKV):
    """AdaKV over all layers: every head of the model first keeps its own top ``⌊alpha · budget⌋``, and the rest goes to
    the highest scores anywhere, as in KVzip's non-uniform budgets (arXiv 2505.23416).

    For scores that can be compared between layers, such as leverage, which does not depend on the scale of keys.
    No layer can be compressed before all have been scored, so a prompt stands in memory as a whole until its forward
    ends.
    """

    alpha: Share = 0.5
    joint: ClassVar[bool] = True
