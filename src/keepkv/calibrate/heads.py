"""How alike the KV heads of a layer are, and what the mean over them saves."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from keepkv.engine.cache import Cache
from keepkv.engine.passes.reread import feed
from keepkv.methods import Method
from keepkv.score.base import Score


class Alike:
    """Sums over the tokens of one layer, float64, by which its H heads x_h (D numbers each) are compared."""

    def __init__(self) -> None:
        self.tokens = 0
        self.own = self.joint = self.saved = 0.0  # Σ_h‖x_h‖², ‖Σ_h x_h‖², Σ_h log₂ of ranges: of all tokens together
        self.total = torch.zeros(0)

    def add(self, x: Tensor) -> None:
        """Heads of more tokens, x (B,H,S,D), none of them padding."""
        wide = torch.float32 if x.device.type == "mps" else torch.float64
        x = x.to(wide)
        total = x.sum((0, 2)).cpu().double()
        self.total = total if not self.tokens else self.total + total
        self.tokens += x.shape[0] * x.shape[2]
        self.own += x.square().sum().item()
        self.joint += x.sum(1).square().sum().item()
        away = x.mean(1, keepdim=True) - x
        ranges = [(y.amax(-1) - y.amin(-1)).clamp_min(torch.finfo(torch.float32).tiny) for y in (x, away)]
        self.saved += (ranges[0] / ranges[1]).log2().sum().item()

    @property
    def heads(self) -> int:
        """H"""
        return self.total.shape[0]

    @property
    def width(self) -> int:
        """D"""
        return self.total.shape[1]

    @property
    def rho(self) -> float:
        """Mean over pairs of heads of x_h·x_g, over the mean of ‖x_h‖²: 1 where all are equal; 0 for one head.

        Deviations from the mean over heads have exactly (1 − 1/H)(1 − ρ) of the energy of heads.
        """
        return self._correlation(self.own, self.joint)

    @property
    def varying(self) -> float:
        """ρ of what is left of each head without its mean over tokens."""
        own, joint = (x.square().sum().item() / self.tokens for x in (self.total, self.total.sum(0)))
        return self._correlation(self.own - own, self.joint - joint)

    @property
    def energy(self) -> float:
        """Energy of deviations over that of heads."""
        return (1 - 1 / self.heads) * (1 - self.rho)

    @property
    def by_energy(self) -> float:
        """Bits that centring saves for each number, where ranges go with energies; 0 for one head."""
        return -0.5 * math.log2(max(self.energy, 2.0**-32)) if self.heads > 1 else 0.0

    @property
    def by_range(self) -> float:
        """Bits that centring saves for each number, as ranges of the tokens are: these set the scale of codes."""
        return self.saved / (self.tokens * self.heads) if self.heads > 1 else 0.0

    def _correlation(self, own: float, joint: float) -> float:
        return (joint - own) / ((self.heads - 1) * own) if self.heads > 1 and own > 0 else 0.0

    def facts(self) -> dict[str, float]:
        """The numbers above, by name."""
        return {name: getattr(self, name) for name in ("rho", "varying", "energy", "by_energy", "by_range")}


@dataclass(frozen=True)
class Look(Score):
    """Scores nothing; asks for the rotary embedding of each layer."""

    needs_rope: ClassVar[bool] = True


@torch.no_grad()
def compare_heads(model: PreTrainedModel, texts: Iterable[Tensor]) -> dict[int, dict[str, Alike]]:
    """By layer, of those that a cache compresses: "keys", "values", and keys "before_rope".

    texts: token ids (B,T) each, without padding.
    """
    cache = Cache(model, Method(Look()), 1.0).copy(observing=True)
    found = {layer.info.index: {x: Alike() for x in ("before_rope", "keys", "values")} for layer in cache.compressible}
    for ids in texts:
        cache.reset()
        feed(model, cache, ids, ids.new_ones(len(ids), 0))
        for layer in cache.compressible:
            slots, rope, sums = layer.store.view(), layer.info.rope, found[layer.info.index]
            keys = slots.keys.float()
            sums["before_rope"].add(keys if rope is None else rope.of_text.unrotate(keys, slots.positions))
            sums["keys"].add(slots.keys)
            sums["values"].add(slots.values)
    return found
