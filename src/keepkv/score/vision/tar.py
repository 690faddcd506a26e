"""Redundancy in time: a patch whose key is what the recent keys at its place are says nothing new."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from keepkv.core.options import Share, one_of
from keepkv.core.slots import LayerView
from keepkv.observe.vision import Sight, sight
from keepkv.score.base import Score, register_score

Alignment = Annotated[str, one_of("cell", "slot")]
Space = Annotated[str, one_of("unrotated", "rotated")]


@register_score("tar")
@dataclass(frozen=True)
class TaR(Score):
    """TaR of InfiniPot-V (arXiv 2506.15745): −(1/r)·Σ_t' cos(k_t,c, k_t',c) over the r recent steps t' at the cell c.

    recent: share of the vision budget that the newest steps take, which are whole. alignment: "cell" compares a slot
    with its own cell, at every compression; "slot" with that of its rank among the vision slots, as the authors' code
    does, which is the same until slots have been dropped. space: keys before RoPE, or as they are cached, which is what
    that code compares: rotation alone makes an unchanged patch look different as it ages.

    Higher is more distinctive. Slots of a cell that no recent step has, of a video of another size say, get the least
    that there is, as text does.
    """

    signed: ClassVar[bool] = True

    recent: Share = 1 / 6
    alignment: Alignment = "cell"
    space: Space = "unrotated"

    needs_rope: ClassVar[bool] = True

    def __call__(self, view: LayerView) -> Tensor:
        return redundancy(view, sight(view), self.recent, self.alignment, self.space)


def redundancy(view: LayerView, seen: Sight, recent: float, alignment: str, space: str) -> Tensor:
    """s_TaR (B,H,S) float32, −inf where there is nothing to compare with.

    In the cheap form: −⟨k/‖k‖, g_c⟩, g_c the mean of the unit keys of cell c over recent steps.
    """
    slots = view.slots
    keys = slots.keys.to(torch.promote_types(slots.keys.dtype, torch.float32))
    if space == "unrotated" and view.rope is not None:
        keys = view.rope.unrotate(keys, view.key_places())
    unit = torch.nn.functional.normalize(keys, dim=-1)
    new, cells = seen.recent(recent), seen.cells
    if alignment == "slot":
        rank = seen.vision.cumsum(-1) - 1
        cells = torch.where(new, cells, rank % seen.size.clamp(min=1)).masked_fill(~seen.vision, -1)
    size = max(1, int(cells.max()) + 1)
    at = cells.clamp(min=0)
    wide = at[..., None].expand_as(unit)
    total = unit.new_zeros(*unit.shape[:2], size, unit.shape[-1]).scatter_add_(2, wide, unit * new[..., None])
    count = unit.new_zeros(*unit.shape[:2], size).scatter_add_(2, at, new.to(unit.dtype))
    g = total / count.clamp(min=1)[..., None]
    score = -(unit * g.gather(2, wide)).sum(-1)
    known = seen.vision & (count.gather(2, at) > 0)
    return score.float().masked_fill(~known, float("-inf"))
