"""What attention outputs at rehearsed questions would lose with a slot."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from keepkv.core.options import Amount
from keepkv.core.slots import LayerView
from keepkv.observe import attention
from keepkv.observe.rehearsal import NAMES, parts, sizes
from keepkv.score.base import Score, Wrapped


@dataclass(frozen=True)
class Listen(Score):
    """Remembers every query of a forward, and what the tokens of that forward are to it; scores nothing.

    Sets in ``view.state`` ``asked`` (B,H*G,R,D), queries after RoPE; ``asked_positions`` (B,R); ``asked_mass``
    (B,H*G,R), ln of the softmax mass of the tokens read in the same forward, attention sinks included, and
    ``asked_said`` (B,H*G,R,Dv), what they say: their part of the output over their mass.
    """

    observes: ClassVar[bool] = True

    def observe(self, view: LayerView) -> None:
        slots, t = view.slots, view.queries.shape[2]
        new = (slots.positions >= (view.seen - t)[:, None, None]).flatten(0, 1).any(0).nonzero()[:, 0]
        near = replace(view, slots=slots.map(lambda x: x[:, :, new]), weights=None)
        near.slots.positions = near.slots.positions.where(
            near.slots.positions >= (view.seen - t)[:, None, None], torch.full_like(near.slots.positions, -1)
        )
        u = attention.logits(near, view.queries, view.query_positions)
        z = attention.log_normalizer(near, u)
        output = (u - z[..., None]).exp().flatten(2, 3) @ near.slots.values.to(u.dtype)
        output = output.unflatten(2, u.shape[2:4]).flatten(1, 2).to(slots.values.dtype)
        view.state.update(zip(NAMES, (view.queries, view.query_positions, z.flatten(1, 2), output), strict=True))


@dataclass(frozen=True)
class Rehearsed(Wrapped):
    """S_i·(E_i + ``floor``·Ē)^``power``, S_i the ``score``, and E_i what rehearsed questions would lose with the slot:

        E_i = mean_q (a_i/(1−a_i))²‖v_i − o(q)‖² / ‖o(q)‖²

    the mean squared change of a head's output o(q) if slot i alone were dropped, over that of the whole layer; sum over
    the query heads of the KV head. a is the attention over the context and what was read of the question. Ē is the mean
    of E over the row's slots in the layer: what no rehearsed question needs keeps a part of its score.
    ``keepkv.rehearse`` makes the model read questions behind the context.
    """

    floor: Amount = 0.05
    power: Amount = 0.5

    needs_questions: ClassVar[bool] = True

    def __call__(self, view: LayerView) -> Tensor:
        effect = effects(view)  # 0 at empty slots
        mean = effect.sum((1, 2), keepdim=True) / view.slots.valid.sum((1, 2), keepdim=True).clamp(min=1)
        return self.score(view) * (effect + self.floor * mean).pow(self.power)


def effects(view: LayerView) -> Tensor:
    """E (B,H,S) of ``Rehearsed``, float32 or float64 as the keys."""
    exact = torch.float32 if view.slots.keys.device.type == "mps" else torch.float64
    weight = sizes(view).square().reciprocal()
    out = torch.zeros(view.slots.shape, dtype=weight.dtype, device=weight.device)
    for part in parts(view):
        # In float64: where a slot has all attention, ‖v − o‖² is a small difference that is multiplied by 10¹².
        attn, o = part.attn.to(exact), part.output.to(exact)
        odds = attn / (1 - attn).clamp(min=1e-6)
        odds = odds.square_() * weight[:, None, None, part.queries].expand(-1, 1, view.query_groups, -1).reshape(
            len(weight), 1, -1, 1
        )
        # Σ_q w(‖o‖² − 2 o·v + ‖v‖²): no tensor of queries × slots × D.
        values = view.slots.values[:, part.heads].to(exact)
        gram = odds.mT @ torch.cat((o, o.square().sum(-1, keepdim=True), torch.ones_like(o[..., :1])), dim=-1)
        far = gram[..., -2] - 2 * (values * gram[..., :-2]).sum(-1) + gram[..., -1] * values.square().sum(-1)
        out[:, part.heads] += far.clamp_(min=0.0).to(out.dtype)
    return out / (view.state[NAMES[1]] >= 0).sum(-1).clamp(min=1)[:, None, None]
