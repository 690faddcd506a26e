"""GRKV: contents of the kept slots by ridge regression on the outputs of recent queries (arXiv 2605.31105)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from keepkv.core.options import Amount, Positive, Size, Window
from keepkv.core.slots import LayerView
from keepkv.errors import CacheStateError
from keepkv.observe import attention
from keepkv.observe.masses import recent
from keepkv.reduce.base import Reduce, Reduced, register_reduce
from keepkv.reduce.drop import Drop
from keepkv.reduce.fit import Fit, ridge, widest
from keepkv.score.base import Score


@register_reduce("grkv")
@dataclass(frozen=True)
class GRKV(Reduce):
    """One round of global regression: values, then keys, of all kept slots that are not protected.

    With O the outputs of the last ``window`` queries over all slots, N rows of the query heads of a KV head together,
    and Â their attention over the kept slots (keys K, values V):

        values  ΔV = Âᵀ(ÂÂᵀ + λI)⁻¹(O − ÂV)
        keys    ΔK = argmin ‖J ΔK − (O − Â(V + ΔV))‖² + λ‖ΔK‖², J the derivative of the outputs by the keys,
                (J ΔK)_n = Σ_i â_ni (v_i − ô_n) s q_n·Δk_i

    λ = ``penalty``. Each Δv, Δk is shortened to ``value_cap``, ``key_cap`` times the norm of what it is added to, and
    each head takes the best of {as it was, V, K and V} by ‖O − output‖². Votes stay as they are.

    J has N·Dv rows and is never formed: conjugate gradients, ``steps`` of them, need its products alone. They stop some
    percent before the minimum, far nearer than the cap leaves it; later steps would make rounding visible.
    """

    window: Window = 32
    penalty: Positive = 0.01
    value_cap: Amount = 0.1
    key_cap: Amount = 0.025
    steps: Size = 8

    merges: ClassVar[bool] = True

    def __call__(self, view: LayerView, keep: Tensor, scores: Tensor, score: Score) -> Reduced:
        dropped = Drop()(view, keep & view.slots.valid, scores, score)
        if not bool(dropped.lost.any()):
            return dropped
        past = recent(view, self.window, alpha=1.0)
        if bool((dropped.lost.flatten(1).any(-1) & past.empty).any()):
            raise CacheStateError("grkv: a row has slots to give up but none of its queries is known")
        fit = Fit.of(view, dropped)
        keys, values = fit.kept.keys.clone(), fit.kept.values.clone()
        for part in fit.tiles(past.positions.shape[1]):
            asking = fit.queries(past.queries, part)
            target = fit.target(asking, past.positions, part).output
            keys[:, part], values[:, part] = self._update(
                fit.held(part), asking, past.positions, target, fit.free[:, part]
            )
        return replace(dropped, slots=fit.kept.with_(keys=keys, values=values))

    def _update(
        self, held: LayerView, queries: Tensor, positions: Tensor, target: Tensor, free: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Keys and values (B,h,K,·) of the kept slots of ``held``: the best of three for each head."""
        keys, values = held.slots.keys, held.slots.values
        a = attention.weights(held, queries, positions).flatten(2, 3)
        missing = target - a @ values.to(a.dtype)
        change = ridge(a * free[:, :, None], missing, self.penalty)
        better = shortened(values, change, self.value_cap)
        output = a @ better.to(a.dtype)
        asked = (queries.to(a.dtype) * held.scaling).reshape(*a.shape[:3], -1)
        slope = a * free[:, :, None]
        if held.softcap is not None:  # d softcap(x)/dx
            raw = asked @ keys.to(a.dtype).mT
            slope = slope * (1 - torch.tanh(raw / held.softcap).square())
        change = key_change(slope, better.to(a.dtype), output, asked, target - output, self.penalty, self.steps)
        moved = shortened(keys, change, self.key_cap)
        turned = replace(held, slots=held.slots.with_(keys=moved))
        with_keys = attention.weights(turned, queries, positions).flatten(2, 3) @ better.to(a.dtype)
        errors = torch.stack([x.square().sum((-1, -2)) for x in (missing, target - output, target - with_keys)])
        best = errors.nan_to_num(nan=float("inf")).argmin(0)[..., None, None]  # (B,h,1,1)
        return torch.where(best == 2, moved, keys), torch.where(best == 0, values, better)


def shortened(x: Tensor, change: Tensor, cap: float) -> Tensor:
    """x + change (…,D) in the dtype of ``x``, each change at most ``cap`` times as long as what it is added to."""
    wide = x.to(change.dtype)
    length = change.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(change.dtype).tiny)
    scale: Tensor = (cap * wide.norm(dim=-1, keepdim=True) / length).clamp(max=1.0)
    return (wide + change * scale).to(x.dtype)


def key_change(
    slope: Tensor, values: Tensor, output: Tensor, queries: Tensor, missing: Tensor, penalty: float, steps: int
) -> Tensor:
    """argmin over ΔK (…,K,D) of ‖J ΔK − missing‖² + penalty‖ΔK‖², by ``steps`` of conjugate gradients.

    slope (…,N,K): attention times the derivative of the logit by q·k·scaling, 0 for keys that stay; values (…,K,Dv);
    output, missing (…,N,Dv); queries (…,N,D), scaled. In float64: each step depends on the roundings of all before it.
    """
    dtype, wide = slope.dtype, widest(slope)
    slope, values, output, queries, missing = (x.to(wide) for x in (slope, values, output, queries, missing))

    def forward(x: Tensor) -> Tensor:
        """J x: (…,K,D) to (…,N,Dv)."""
        shift = slope * (queries @ x.mT)
        return shift @ values - shift.sum(-1, keepdim=True) * output

    def back(e: Tensor) -> Tensor:
        """Jᵀe: (…,N,Dv) to (…,K,D)."""
        return (slope * (e @ values.mT - (e * output).sum(-1, keepdim=True))).mT @ queries

    def dot(x: Tensor, y: Tensor) -> Tensor:
        return (x * y).sum((-1, -2), keepdim=True)

    r = back(missing)
    x, p, size = torch.zeros_like(r), r, dot(r, r)
    # Where the remainder is rounding, a further step would be too.
    least = size * torch.finfo(r.dtype).eps ** 2
    for _ in range(steps):
        product = back(forward(p)) + penalty * p
        go = size > least
        step = torch.where(go, size / dot(p, product), 0.0)
        x, r = x + step * p, r - step * product
        before, size = size, dot(r, r)
        p = torch.where(go, r + size / before * p, p)
    return x.to(dtype)
