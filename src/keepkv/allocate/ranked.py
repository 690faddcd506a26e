"""All or the ends of the text alone: heads, or layers, that are filled one after the other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from keepkv.allocate.base import Allocate, Known, register_allocate
from keepkv.allocate.profile import FULL, KIND, PROFILES, check, profile, room
from keepkv.allocate.water_filling import above
from keepkv.core.options import one_of


@register_allocate("retrieval-heads")
@dataclass(frozen=True)
class RetrievalHeads(Allocate):
    """DuoAttention (arXiv 2410.10819): retrieval heads keep everything, streaming heads their sinks and window.

    Heads of all layers in the order of their ``profile``, the largest first: each keeps all that it holds as long as
    the budget lasts, the next one the rest, and the others what is protected. The budget says how many heads retrieve,
    where the paper has a share of the heads.
    """

    profile: Annotated[str, one_of(*PROFILES)] = FULL
    ragged: ClassVar[bool] = True
    joint: ClassVar[bool] = True
    needs_calibration: ClassVar[str | None] = KIND

    def check_calibration(self, known: Known) -> None:
        check(known, self.profile)

    def across(
        self, scores: list[Tensor], tiers: list[Tensor], budgets: list[Tensor], known: Known = ()
    ) -> list[Tensor]:
        heads, held, must, total = room(tiers, budgets)
        mine = profile(known, self.profile, heads).to(held.device)
        order = mine.argsort(descending=True, stable=True).expand(held.shape)
        return list((must + filled(order, held - must, total - must.sum(-1))).split(heads, dim=1))


@register_allocate("lazy-layers")
@dataclass(frozen=True)
class LazyLayers(Allocate):
    """SimLayerKV (arXiv 2410.13846): lazy layers keep their sinks and window, the others everything.

    Needs a score that is an attention, such as ``tova``: a layer is the lazier the less attention leaves what is
    protected, mean over heads. Layers in that order, the least lazy first, keep all that they hold as long as the
    budget lasts, the next one the rest, its heads alike. The paper has a threshold instead of a budget.
    """

    ragged: ClassVar[bool] = True
    joint: ClassVar[bool] = True

    def across(
        self, scores: list[Tensor], tiers: list[Tensor], budgets: list[Tensor], known: Known = ()
    ) -> list[Tensor]:
        heads, held, must, total = room(tiers, budgets)
        away = torch.stack([x.where(t == 1, 0).sum(-1).mean(-1) for x, t in zip(scores, tiers, strict=True)], dim=1)
        free = held - must
        size = torch.stack([x.sum(-1) for x in free.split(heads, dim=1)], dim=1)  # (B,L)
        order = away.nan_to_num(nan=0.0).argsort(dim=-1, descending=True, stable=True)
        each = filled(order, size, total - must.sum(-1))
        parts = zip(each.unbind(1), free.split(heads, dim=1), strict=True)
        counts = [above(torch.zeros_like(f), torch.ones_like(f), n, f) for n, f in parts]
        return list((must + torch.cat(counts, dim=1)).split(heads, dim=1))


def filled(order: Tensor, size: Tensor, total: Tensor) -> Tensor:
    """(B,K) int64: how much of ``size`` (B,K) each has where those first in ``order`` (B,K) take all they can of
    ``total`` (B,)."""
    sorted_ = size.gather(-1, order)
    before = sorted_.cumsum(-1) - sorted_
    taken = (total[:, None] - before).clamp(min=0).minimum(sorted_)
    return torch.empty_like(taken).scatter_(-1, order, taken)
