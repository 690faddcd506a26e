"""What the outputs of rehearsed questions would lose with a slot."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from keepkv.errors import CacheStateError, KeepKVError
from keepkv.score import attention
from keepkv.score.base import Score, Wrapped
from keepkv.slots import LayerView

NAMES = ("asked", "asked_positions", "asked_mass", "asked_said")
SIZE = "asked_size"


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
        said = (u - z[..., None]).exp().flatten(2, 3) @ near.slots.values.to(u.dtype)
        said = said.unflatten(2, u.shape[2:4]).flatten(1, 2).to(slots.values.dtype)
        view.state.update(zip(NAMES, (view.queries, view.query_positions, z.flatten(1, 2), said), strict=True))


@dataclass(frozen=True)
class Rehearsed(Wrapped):
    """S_i·(E_i + ``floor``·Ē)^``power``, S_i the ``score``, and E_i what rehearsed questions would lose with the slot:

        E_i = mean_q (a_i/(1−a_i))²‖v_i − o(q)‖² / ‖o(q)‖²

    the mean squared change of a head's output o(q) if slot i alone were dropped, over that of the whole layer; sum over
    the query heads of the KV head. a is the attention over the context and what was read of the question. Ē is the mean
    of E over the row's slots in the layer: what no rehearsed question needs keeps a part of its score.
    ``keepkv.rehearse`` makes the model read questions behind the context.
    """

    floor: float = 0.05
    power: float = 0.5

    rehearses: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.floor < 0 or self.power < 0:
            raise KeepKVError(f"{self}: floor and power must be at least 0")

    def __call__(self, view: LayerView) -> Tensor:
        effect = effects(view)  # 0 at empty slots
        mean = effect.sum((1, 2), keepdim=True) / view.slots.valid.sum((1, 2), keepdim=True).clamp(min=1)
        return self.score(view) * (effect + self.floor * mean).pow(self.power)


@dataclass(frozen=True)
class Part:
    """Some heads and rehearsed queries, N = G·R of each KV head. given (B,h,N,S): their attention to the slots of
    ``view``; output (B,h,N,Dv); own (B,h,N,1) and said (B,h,N,Dv): the mass and the words of the question itself."""

    heads: slice
    queries: slice
    given: Tensor
    output: Tensor
    own: Tensor
    said: Tensor


def parts(view: LayerView, queries: int = 0, heads: int = 0) -> Iterator[Part]:
    """All rehearsed queries of a layer, ``heads`` KV heads and ``queries`` queries of each query head at a time; 0: as
    many as fit into a processor's cache."""
    asked, positions, mass, said = remembered(view)
    (b, h, s), g, r = view.slots.shape, view.groups, positions.shape[1]
    heads = heads or max(1, min(h, attention.room(asked) // max(1, b * g * s * attention.ROWS)))
    queries = queries or max(1, attention.room(asked) // max(1, b * heads * g * s))
    for first in range(0, h, heads):
        near = attention.of_heads(replace(view, sinks=None), first, heads)
        values = near.slots.values.to(torch.promote_types(near.slots.values.dtype, torch.float32))
        some = slice(first * g, (first + heads) * g)
        for start in range(0, r, queries):
            few = slice(start, start + queries)
            u = attention.logits(near, asked[:, some, few], positions[:, few]).flatten(2, 3)
            own = mass[:, some, few].reshape(*u.shape[:3]).to(u.dtype)
            z = torch.logaddexp(u.logsumexp(-1), own)[..., None]
            given, own = u.sub_(z).exp_(), (own[..., None] - z).exp_()
            told = said[:, some, few].reshape(*given.shape[:3], -1).to(given.dtype)
            yield Part(slice(first, first + heads), few, given, given @ values + own * told, own, told)


def remembered(view: LayerView) -> tuple[Tensor, ...]:
    """What ``Listen`` left. Raises where no question was rehearsed."""
    if NAMES[0] not in view.state:
        raise CacheStateError(
            "no question was rehearsed. Make the cache with when=keepkv.When('deferred'), feed the whole context, call "
            "keepkv.rehearse(model, cache, input_ids, questions=…), and then cache.compress()."
        )
    return tuple(view.state[name] for name in NAMES)


def sizes(view: LayerView) -> Tensor:
    """(B,R): norm of the layer's output, all heads together, at each rehearsed query; kept in ``view.memo``."""
    if SIZE in view.memo:
        return view.memo[SIZE]
    b, r = remembered(view)[1].shape
    total = torch.zeros(b, r, dtype=torch.promote_types(view.slots.keys.dtype, torch.float32), device=view.seen.device)
    for part in parts(view):
        total[:, part.queries] += part.output.square().sum(-1).unflatten(2, (view.groups, -1)).sum((1, 2))
    view.memo[SIZE] = total.sqrt_().clamp_(min=1e-12)
    return view.memo[SIZE]


def effects(view: LayerView) -> Tensor:
    """E (B,H,S) of ``Rehearsed``, float32 or float64 as the keys."""
    wide = torch.float32 if view.slots.keys.device.type == "mps" else torch.float64
    weight = sizes(view).square().reciprocal()
    out = torch.zeros(view.slots.shape, dtype=weight.dtype, device=weight.device)
    for part in parts(view):
        # In float64: where a slot has all attention, ‖v − o‖² is a small difference that is multiplied by 10¹².
        given, o = part.given.to(wide), part.output.to(wide)
        odds = given / (1 - given).clamp(min=1e-6)
        odds = odds.square_() * weight[:, None, None, part.queries].expand(-1, 1, view.groups, -1).reshape(
            len(weight), 1, -1, 1
        )
        # Σ_q w(‖o‖² − 2 o·v + ‖v‖²): no tensor of queries × slots × D.
        values = view.slots.values[:, part.heads].to(wide)
        gram = odds.mT @ torch.cat((o, o.square().sum(-1, keepdim=True), torch.ones_like(o[..., :1])), dim=-1)
        far = gram[..., -2] - 2 * (values * gram[..., :-2]).sum(-1) + gram[..., -1] * values.square().sum(-1)
        out[:, part.heads] += far.clamp_(min=0.0).to(out.dtype)
    return out / (view.state[NAMES[1]] >= 0).sum(-1).clamp(min=1)[:, None, None]
