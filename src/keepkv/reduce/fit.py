"""What reductions that fit the kept slots share: targets over all slots, and ridge regression on them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from keepkv.core.slots import LayerView, Slots
from keepkv.observe import attention
from keepkv.reduce.base import Reduced

_TILE = 2**24  # attention weights held at a time, of (heads × queries × slots)


@dataclass(frozen=True)
class Target:
    """What N = G·T queries get from all slots: output (B,h,N,Dv); mass (B,h,N), the share of their attention that slots
    hold for which a fit may answer; log_z (B,h,G,T), ln of the softmax denominator, 0 for a padded query."""

    output: Tensor
    mass: Tensor
    log_z: Tensor


@dataclass(frozen=True)
class Fit:
    """Kept slots whose contents are fitted to what queries got from all slots of ``view``.

    kept: what plain eviction leaves. free (B,H,K) bool: kept slots that may change, neither protected nor of a head
    from which nothing leaves. answered (B,H,S) bool: all slots but the kept ones that are not free. Methods take
    ``part``, some KV heads, so that (queries × kept slots) matrices stay bounded.
    """

    view: LayerView
    kept: Slots
    free: Tensor
    answered: Tensor

    @classmethod
    def of(cls, view: LayerView, dropped: Reduced) -> Fit:
        """From the outcome of plain eviction."""
        fixed = view.slots.valid & ~dropped.lost & (dropped.dropped == 0)[..., None]
        if view.protected is not None:
            fixed |= view.protected & ~dropped.lost
        beside = view.slots.with_(stats={"fixed": fixed.float()}).select(view.slots.valid & ~dropped.lost)
        free = dropped.slots.valid & (beside.stats["fixed"] == 0)
        return cls(view, dropped.slots, free, view.slots.valid & ~fixed)

    def tiles(self, rows: int) -> list[slice]:
        """KV heads to be fitted at a time, for ``rows`` queries per query head: all, if that is not too much."""
        b, h, k = self.kept.shape
        count = max(1, min(h, _TILE // max(1, b * self.view.query_groups * rows * k)))
        return [slice(first, min(h, first + count)) for first in range(0, h, count)]

    def held(self, part: slice) -> LayerView:
        """A view of the kept slots of some heads."""
        return attention.of_heads(replace(self.view, slots=self.kept), part.start, part.stop - part.start)

    def queries(self, queries: Tensor, part: slice) -> Tensor:
        """Queries (B,h*G,T,D) of some heads, of those of all (B,H*G,T,D)."""
        return queries[:, part.start * self.view.query_groups : part.stop * self.view.query_groups]

    def target(self, queries: Tensor, positions: Tensor, part: slice) -> Target:
        """What queries (B,h*G,T,D) at positions (B,T) get from all slots of some heads; tiled over queries."""
        view = attention.of_heads(self.view, part.start, part.stop - part.start)
        (b, h, s), g = view.slots.shape, self.view.query_groups
        parts: list[tuple[Tensor, Tensor, Tensor]] = []
        tile = max(1, _TILE // max(1, b * h * g * s))
        for start in range(0, positions.shape[1], tile):
            some = slice(start, start + tile)
            u = attention.logits(view, queries[:, :, some], positions[:, some])
            z = attention.log_normalizer(view, u)
            z = z.masked_fill(z.isneginf(), 0.0)
            a = u.sub_(z[..., None]).exp_().flatten(2, 3)
            output = a @ view.slots.values.to(a.dtype)
            # Summed, not 1 less the rest: where fixed slots hold almost everything, that would be rounding.
            mass = a @ self.answered[:, part, :, None].to(a.dtype)
            parts.append((output.unflatten(2, (g, -1)), mass[..., 0].unflatten(2, (g, -1)), z))
        output, mass, log_z = (torch.cat(x, dim=3) for x in zip(*parts, strict=True))
        return Target(output.flatten(2, 3), mass.flatten(2, 3), log_z)


def widest(x: Tensor) -> torch.dtype:
    """float64, or float32 where the device has none."""
    return torch.float32 if x.device.type == "mps" else torch.float64


def ridge(a: Tensor, missing: Tensor, penalty: Tensor | float) -> Tensor:
    """Δ that minimises ‖aΔ − missing‖² + penalty‖Δ‖².

    a (…,N,K), missing (…,N,D), penalty (…) or a number above 0; result (…,K,D) in the dtype of ``a``. Solved with the
    smaller of the two Gram matrices, in float64 where the device has it: squares of attention span many magnitudes.
    """
    dtype, a, missing = a.dtype, a.to(widest(a)), missing.to(widest(a))
    wide = a.shape[-1] > a.shape[-2]
    gram = a @ a.mT if wide else a.mT @ a
    gram.diagonal(dim1=-2, dim2=-1).add_(penalty[..., None].to(gram) if isinstance(penalty, Tensor) else penalty)
    found: Tensor = a.mT @ torch.linalg.solve(gram, missing) if wide else torch.linalg.solve(gram, a.mT @ missing)
    return found.to(dtype)
