"""Budgets of layers and heads from curves that were computed before: how much each gives up at each ratio."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from keepkv.allocate.base import Allocate, Known, register_allocate
from keepkv.allocate.profile import CURVE, KIND, check, read, room
from keepkv.allocate.water_filling import above

RATIOS = 99  # of which a curve speaks: .01 to .99 given up on average


@register_allocate("curves")
@dataclass(frozen=True)
class Curves(Allocate):
    """LU-KV (arXiv 2602.08585): each head keeps the share of its tokens that a curve says for the ratio asked.

    A calibration "heads" with the authors' curves (``keepkv calibrate heads -o pattern=FILE.npy``): the share that each
    KV head gives up where .01, .02 … .99 are given up on average. Their row nearest to what the budget gives up is
    taken, as in kvpress; sums are then exact over all layers, where kvpress rounds within each.
    """

    ragged: ClassVar[bool] = True
    joint: ClassVar[bool] = True
    needs_calibration: ClassVar[str | None] = KIND

    def check_calibration(self, known: Known) -> None:
        check(known, CURVE)

    def across(
        self, scores: list[Tensor], tiers: list[Tensor], budgets: list[Tensor], known: Known = ()
    ) -> list[Tensor]:
        heads, held, must, total = room(tiers, budgets)
        curves = torch.cat(read(known, CURVE, heads), dim=-1).double().to(held.device)  # (99,ΣH)
        given_up = 1 - total / held.sum(-1).clamp(min=1)
        at = (given_up * (RATIOS + 1)).round().long().clamp(1, RATIOS) - 1
        wanted = (1 - curves[at]).clamp(0, 1) * held  # (B,ΣH)
        least = must.minimum(held)
        return list(above(least, (wanted - least).clamp(min=0), total, held).split(heads, dim=1))
