"""Rehearsed questions: what their queries attend to and what they get, a tile of queries at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from keepkv.core.slots import LayerView
from keepkv.errors import CacheStateError
from keepkv.observe import attention

NAMES = ("asked", "asked_positions", "asked_mass", "asked_said")
SIZE = "asked_size"


@dataclass(frozen=True)
class QueryTile:
    """Some heads and rehearsed queries, N = G·R of each KV head. attn (B,h,N,S): their attention to the slots of
    ``view``; output (B,h,N,Dv); own_mass (B,h,N,1): the share of it that the question's own tokens have, and own_output
    (B,h,N,Dv), what these alone would give."""

    heads: slice
    queries: slice
    attn: Tensor
    output: Tensor
    own_mass: Tensor
    own_output: Tensor


def parts(view: LayerView, queries: int = 0, heads: int = 0) -> Iterator[QueryTile]:
    """All rehearsed queries of a layer, ``heads`` KV heads and ``queries`` queries of each query head at a time; 0: as
    many as fit into a processor's cache."""
    asked, positions, mass, outputs = remembered(view)
    (b, h, s), g, r = view.slots.shape, view.query_groups, positions.shape[1]
    heads = heads or max(1, min(h, attention.temp_elements(asked) // max(1, b * g * s * attention.ROWS)))
    queries = queries or max(1, attention.temp_elements(asked) // max(1, b * heads * g * s))
    for first in range(0, h, heads):
        near = attention.of_heads(replace(view, sink_logits=None), first, heads)
        values = near.slots.values.to(torch.promote_types(near.slots.values.dtype, torch.float32))
        some = slice(first * g, (first + heads) * g)
        for start in range(0, r, queries):
            few = slice(start, start + queries)
            u = attention.logits(near, asked[:, some, few], positions[:, few]).flatten(2, 3)
            own = mass[:, some, few].reshape(*u.shape[:3]).to(u.dtype)
            z = torch.logaddexp(u.logsumexp(-1), own)[..., None]
            attn, own = u.sub_(z).exp_(), (own[..., None] - z).exp_()
            output = outputs[:, some, few].reshape(*attn.shape[:3], -1).to(attn.dtype)
            yield QueryTile(slice(first, first + heads), few, attn, attn @ values + own * output, own, output)


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
        total[:, part.queries] += part.output.square().sum(-1).unflatten(2, (view.query_groups, -1)).sum((1, 2))
    view.memo[SIZE] = total.sqrt_().clamp_(min=1e-12)
    return view.memo[SIZE]
