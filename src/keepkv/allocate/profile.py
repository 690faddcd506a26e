"""Budgets of layers and heads from what was measured of the heads once: a calibration of kind "heads"."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from keepkv.allocate.base import Allocate, Known, register_allocate
from keepkv.allocate.water_filling import above
from keepkv.core.options import Amount, at_least, one_of
from keepkv.errors import CalibrationError

KIND = "heads"  # of calibration
PREFIX = "heads_"  # of its tensors
FULL, CURVE = "full", "curve"  # DuoAttention's pattern, and LU-KV's curves
MEASURED = ("inf", "precision", "recall", "found", "copy", "compose", "area")
PROFILES = (*MEASURED, "copy+compose", FULL)


@register_allocate("profile")
@dataclass(frozen=True)
class HeadBudget(Allocate):
    """Budgets of layers and heads by how much each head matters, measured once (``keepkv calibrate heads``): the two
    stages of SurfaceLogicKV (arXiv 2508.15806) as its predecessor's code has them, and HeadKV's (2410.19258) without
    ``eps_layer`` and ``eps_head``.

    With b slots a head on average beyond protected ones, N heads and S their profile:

        S' = S + eps_layer · S / Σ of its layer,   pool = max(0, N·⌊b/beta⌋ − N·eps_head)
        c  = (b − ⌊b/beta⌋) + eps_head + pool · S' / ΣS'

    Then exactly: b − ⌊b/beta⌋ ≤ c ≤ what the head holds, Σc is the budget to the slot by largest remainders, and what a
    head cannot take goes to the others in proportion. beta = 1 is all by the profile, a large one uniform.

    integration: "flat" is the above. "two_level" has the layers share first, by their ``layers`` ("sum" or "std" of
    their heads), and then the heads of each, both with the floor that ``beta`` says; it is the same where all layers
    share equally. profile: which numbers, see ``PROFILES``; "copy+compose" is the mean of two, each made to sum to 1.

    No layer is compressed before all can be: a prompt stands in memory as a whole until its forward ends.
    """

    profile: Annotated[str, one_of(*PROFILES)] = "inf"
    beta: Annotated[float, at_least(1)] = 1.351
    eps_layer: Amount = 0.01
    eps_head: Amount = 0.5
    integration: Annotated[str, one_of("flat", "two_level")] = "flat"
    layers: Annotated[str, one_of("sum", "std")] = "sum"
    ragged: ClassVar[bool] = True
    joint: ClassVar[bool] = True
    needs_calibration: ClassVar[str | None] = KIND

    def check_calibration(self, known: Known) -> None:
        check(known, self.profile)

    def across(
        self, scores: list[Tensor], tiers: list[Tensor], budgets: list[Tensor], known: Known = ()
    ) -> list[Tensor]:
        heads, held, must, total = room(tiers, budgets)
        found = profile(known, self.profile, heads)
        free, total = held - must, total - must.sum(-1)
        mine = found.to(free.device).expand(free.shape)
        share = self._flat if self.integration == "flat" else self._two_level
        return list((must + share(mine, total, free, heads)).split(heads, dim=1))

    def parts(self, scores: Tensor, base: Tensor, heads: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Floors (…,N) int64 and what each head is to have above them (…,N) float64: their sum is the formula's c.

        scores (…,N): the profile, layer after layer of so many ``heads``. base (…) int64: b.
        """
        pooled = (base.double() / self.beta + 1e-9).floor()
        floor = (base - pooled.long())[..., None].expand(scores.shape)
        lifted = scores + self.eps_layer * torch.cat(
            [x / _sum(x) for x in scores.double().split(list(heads), dim=-1)], dim=-1
        )
        pool = (scores.shape[-1] * (pooled - self.eps_head)).clamp(min=0)
        return floor, pool[..., None] * lifted / _sum(lifted) + self.eps_head

    def _flat(self, scores: Tensor, total: Tensor, free: Tensor, heads: Sequence[int]) -> Tensor:
        floor, extra = self.parts(scores, total // scores.shape[-1], heads)
        return above(floor, extra, total, free)

    def _two_level(self, scores: Tensor, total: Tensor, free: Tensor, heads: Sequence[int]) -> Tensor:
        mine, room = scores.double().split(list(heads), dim=-1), free.split(list(heads), dim=-1)
        wide = torch.tensor(heads, device=total.device)
        weights = torch.stack([x.sum(-1) if self.layers == "sum" else x.std(-1, correction=0) for x in mine], dim=-1)
        base = total // scores.shape[-1]
        floor = (base - (base / self.beta + 1e-9).floor().long())[..., None] * wide
        each = above(floor, weights, total, torch.stack([x.sum(-1) for x in room], dim=-1))
        shares = [self._flat(x, n, r, [x.shape[-1]]) for x, n, r in zip(mine, each.unbind(-1), room, strict=True)]
        return torch.cat(shares, dim=-1)


def room(tiers: Sequence[Tensor], budgets: Sequence[Tensor]) -> tuple[list[int], Tensor, Tensor, Tensor]:
    """KV heads of each layer; of all heads, layer after layer, slots that are held and that must be kept, (B,ΣH) int64
    each; and slots that all may keep together, (B,)."""
    heads = [x.shape[1] for x in tiers]
    held, must = (torch.cat([(x >= least).sum(-1) for x in tiers], dim=1) for least in (1, 2))
    budget = sum(b * h for b, h in zip(budgets, heads, strict=True))
    return heads, held, must, torch.as_tensor(budget).minimum(held.sum(-1)).maximum(must.sum(-1))


def profile(known: Sequence[Mapping[str, Tensor]], name: str, heads: Sequence[int]) -> Tensor:
    """(ΣH,) float64: the numbers ``name`` of all heads, layer after layer; "a+b": the mean of two, each of sum 1."""
    parts = [torch.cat(read(known, one, heads)).double() for one in name.split("+")]
    return parts[0] if len(parts) == 1 else torch.stack([x / _sum(x) for x in parts]).mean(0)


def check(known: Sequence[Mapping[str, Tensor]], name: str) -> None:
    """Raise ``CalibrationError`` where there is no profile ``name``, "a+b" for two, or one of zeros alone."""
    heads = [next(iter(layer.values())).shape[-1] for layer in known]
    for one in name.split("+"):
        if not any(bool((x > 0).any()) for x in read(known, one, heads)):
            raise CalibrationError(
                f"the profile {one!r} of the calibration {KIND!r} is 0 in every head: the model gave no answer of that "
                "kind that it is measured on. Give more --tokens to keepkv calibrate heads, or choose another profile"
            )


def read(known: Sequence[Mapping[str, Tensor]], name: str, heads: Sequence[int]) -> list[Tensor]:
    """The numbers ``name`` (…,H) of each layer. Raises ``CalibrationError`` where there are none, or of other heads."""
    found = []
    for layer, count in zip(known, heads, strict=True):
        if PREFIX + name not in layer:
            has = ", ".join(sorted(x.removeprefix(PREFIX) for x in layer if x.startswith(PREFIX))) or "nothing"
            raise CalibrationError(
                f"the calibration {KIND!r} has no profile {name!r}; it has {has}: choose one of these"
            )
        if layer[PREFIX + name].shape[-1] != count:
            raise CalibrationError(
                f"the calibration {KIND!r} is of {layer[PREFIX + name].shape[-1]} KV heads, the layer has {count}: "
                "make one for this model"
            )
        found.append(layer[PREFIX + name])
    return found


def _sum(x: Tensor) -> Tensor:
    """(…,1), 1 where the sum is 0."""
    total = x.sum(-1, keepdim=True)
    return torch.where(total > 0, total, 1.0)
