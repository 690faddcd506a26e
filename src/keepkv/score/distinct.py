"""The queries of a row that are least like its others, remembered between forwards."""

from __future__ import annotations

import torch
from torch import Tensor

from keepkv.score.sample import spread
from keepkv.slots import EMPTY, LayerView

BLOCK = 256  # tokens; a query is compared with those of the blocks before its own
TILE = 2048  # tokens whose queries are looked at together
NAMES = ("distinct", "distinct_order", "distinct_likeness", "distinct_sum", "distinct_part")


def remember_distinct(view: LayerView, size: int) -> None:
    """Keep, of all queries that each KV head gets, the ``size`` that are least like those before them.

    A query of block n (``BLOCK`` tokens) has the likeness cos(q, Σ of the queries of its query head in blocks 0 … n−1),
    after RoPE; the queries of block 0 the largest there is, as what is common is not known yet. Uniform samples are of
    little use where most of a text is alike and questions go to the rest; see ``docs/keepkv2.md``.

    Sets in ``view.state`` ``distinct`` (B,H,size,D), queries after RoPE, ``distinct_order`` (B,H,size), position·G +
    query head within the group, ascending, ``EMPTY`` first where fewer were seen, and what is needed to go on: nothing
    depends on where forwards begin and end, nor on padding. In place, as compiled decode requires.
    """
    state, (b, _, t, d), g = view.state, view.queries.shape, view.groups
    if NAMES[0] not in state:
        state.update(zip(NAMES, _nothing(view, size), strict=True))
    if not t:
        return
    held, held_order, held_likeness = (state[name] for name in NAMES[:3])
    within = torch.arange(g, device=view.queries.device)
    order = (view.query_positions[:, None] * g + within[:, None]).masked_fill(view.query_positions[:, None] < 0, EMPTY)
    order = torch.cat((held_order, order.flatten(1)[:, None].expand(-1, held.shape[1], -1)), dim=2)
    likeness = torch.cat((held_likeness, _likeness(view).reshape(b, -1, g * t)), dim=2)
    chosen = likeness.topk(size, dim=2, largest=False, sorted=False).indices
    chosen = chosen.gather(2, order.gather(2, chosen).argsort(dim=2, stable=True))
    old = held.gather(2, chosen.clamp(max=size - 1)[..., None].expand(-1, -1, -1, d))
    index, rows = (chosen - size).clamp(min=0), torch.arange(b, device=chosen.device)[:, None, None]
    heads = torch.arange(held.shape[1], device=chosen.device)[:, None] * g + index // t
    held.copy_(torch.where((chosen < size)[..., None], old, view.queries[rows, heads, index % t]))
    held_order.copy_(order.gather(2, chosen))
    held_likeness.copy_(likeness.gather(2, chosen))


def distinct(view: LayerView, size: int) -> tuple[Tensor, Tensor]:
    """Queries (B,H,size,D) and positions (B,H,size), ``EMPTY`` first: what ``remember_distinct`` keeps, or would of the
    latest forward where it never ran."""
    state = view.state
    if NAMES[0] not in state:
        scratch = LayerView(view.slots, view.queries, view.query_positions, view.seen, view.scaling)
        remember_distinct(scratch, size)
        state = scratch.state
    order = state[NAMES[1]]
    return state[NAMES[0]], torch.where(order < 0, EMPTY, order // view.groups)


def _nothing(view: LayerView, size: int) -> tuple[Tensor, ...]:
    (b, heads, _, d), h = view.queries.shape, view.slots.shape[1]
    wide = torch.promote_types(view.queries.dtype, torch.float32)
    sums = view.queries.new_zeros(b, heads, d, dtype=wide)
    return (
        view.queries.new_zeros(b, h, size, d),
        view.query_positions.new_full((b, h, size), EMPTY),
        sums.new_full((b, h, size), float("inf")),
        sums,
        sums.clone(),
    )


def _likeness(view: LayerView) -> Tensor:
    """(B,H*G,T) of the latest queries, +inf for padding; moves the sums in ``view.state`` on."""
    queries, positions, seen = view.queries, view.query_positions, view.seen
    whole, part = view.state[NAMES[3]], view.state[NAMES[4]]
    (_, heads, t, d), g, real = queries.shape, view.groups, positions >= 0
    start = (seen - real.sum(-1)) // BLOCK  # (B,): the block that each row is in
    place = (positions // BLOCK - start[:, None]).clamp(min=0)  # (B,T)
    blocks = torch.arange(t // BLOCK + 2, device=place.device)
    member = (place[:, None] == blocks[:, None]) & real[:, None]  # (B,blocks,T)
    sums = (member[:, None].to(queries.dtype) @ queries).to(whole.dtype)  # (B,H*G,blocks,D)
    sums[:, :, 0] += part
    before = whole[:, :, None] + sums.cumsum(2) - sums
    length = torch.linalg.vector_norm(before, dim=-1).clamp(min=1e-12)[..., None]
    direction = (before / length).to(queries.dtype)
    parts = []
    for first in range(0, t, TILE):
        few = slice(first, first + TILE)
        # With every block, and the own one taken: cheaper than a copy of its direction for each query.
        along = (queries[:, :, few] @ direction.mT).gather(3, place[:, None, few, None].expand(-1, heads, -1, 1))
        norm = torch.linalg.vector_norm(queries[:, :, few], dim=-1, dtype=whole.dtype)
        parts.append(along[..., 0].to(whole.dtype) / norm.clamp(min=1e-12))
    # In block 0 nothing is common yet: those come last, spread evenly among themselves.
    order = positions.clamp(min=0)[:, None] * g + torch.arange(heads, device=place.device)[:, None] % g
    unknown = 2 + spread(order).to(whole.dtype) / (1 << 32)
    likeness = torch.where((positions < BLOCK)[:, None], unknown, torch.cat(parts, dim=2))
    index = (seen // BLOCK - start)[:, None, None, None].expand(-1, heads, 1, d)  # of the first incomplete block
    whole.copy_(before.gather(2, index)[:, :, 0])
    part.copy_(sums.gather(2, index)[:, :, 0])
    return likeness.masked_fill(~real[:, None], float("inf"))
