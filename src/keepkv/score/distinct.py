"""The queries of a row that are least like its others, remembered between forwards."""

from __future__ import annotations

import torch
from torch import Tensor

from keepkv.score.sample import spread
from keepkv.slots import EMPTY, LayerView

BLOCK = 256  # tokens; a query is compared with those of the blocks before its own
TILE = 2048  # queries that are looked at together
NAMES = ("distinct", "distinct_positions", "distinct_likeness", "distinct_sum", "distinct_part")


def remember_distinct(view: LayerView, size: int) -> None:
    """Keep the ``size`` queries of each query head that are least like the queries before them.

    A query q of block n (``BLOCK`` tokens) has the likeness cos(q, Σ of the queries of blocks 0 … n−1), after RoPE; the
    queries of block 0 the largest there is, as what is common is not known yet. Uniform samples are of little use where
    most of a text is alike and questions go to the rest; see ``docs/keepkv2.md``.

    Sets in ``view.state`` ``distinct`` (B,H*G,size,D), queries after RoPE, ``distinct_positions`` (B,H*G,size)
    ascending, ``EMPTY`` first where fewer were seen, and what is needed to go on: nothing depends on where forwards
    begin and end, nor on padding. In place, as compiled decode requires.
    """
    state, (_, heads, t, d) = view.state, view.queries.shape
    if NAMES[0] not in state:
        state.update(zip(NAMES, _nothing(view, size), strict=True))
    if not t:
        return
    likeness = _likeness(view)
    held, held_at, held_likeness = (state[name] for name in NAMES[:3])
    at = torch.cat((held_at, view.query_positions[:, None].expand(-1, heads, -1).to(held_at.dtype)), dim=2)
    everything = torch.cat((held_likeness, likeness), dim=2)
    chosen = everything.topk(size, dim=2, largest=False, sorted=False).indices
    chosen = chosen.gather(2, at.gather(2, chosen).argsort(dim=2, stable=True))
    old = chosen < size

    def take(x: Tensor, index: Tensor) -> Tensor:
        return x.gather(2, index[..., None].expand(-1, -1, -1, d))

    new = take(view.queries, (chosen - size).clamp(min=0))
    held.copy_(torch.where(old[..., None], take(held, chosen.clamp(max=size - 1)), new))
    held_at.copy_(at.gather(2, chosen))
    held_likeness.copy_(everything.gather(2, chosen))


def distinct(view: LayerView, size: int) -> tuple[Tensor, Tensor]:
    """Queries (B,H*G,size,D) and positions (B,H*G,size): what ``remember_distinct`` keeps, or the choice of the latest
    forward where it never ran."""
    if NAMES[0] not in view.state:
        scratch = LayerView(view.slots, view.queries, view.query_positions, view.seen, view.scaling)
        remember_distinct(scratch, size)
        return scratch.state[NAMES[0]], scratch.state[NAMES[1]]
    return view.state[NAMES[0]], view.state[NAMES[1]]


def _nothing(view: LayerView, size: int) -> tuple[Tensor, ...]:
    b, heads, _, d = view.queries.shape
    queries, positions = view.queries, view.query_positions
    sums = torch.zeros(b, heads, d, dtype=torch.promote_types(queries.dtype, torch.float32), device=queries.device)
    return (
        queries.new_zeros(b, heads, size, d),
        positions.new_full((b, heads, size), EMPTY),
        sums.new_full((b, heads, size), float("inf")),
        sums,
        sums.clone(),
    )


def _likeness(view: LayerView) -> Tensor:
    """(B,H*G,T) of the latest queries, +inf for padding; moves the sums in ``view.state`` on."""
    queries, positions, seen = view.queries, view.query_positions, view.seen
    whole, part = view.state[NAMES[3]], view.state[NAMES[4]]
    t, real = queries.shape[2], positions >= 0
    start = (seen - real.sum(-1)) // BLOCK  # (B,): the block that each row is in
    blocks = t // BLOCK + 2
    place = (positions // BLOCK - start[:, None]).clamp(min=0)  # (B,T)
    member = (place[:, None] == torch.arange(blocks, device=place.device)[:, None]) & real[:, None]  # (B,blocks,T)
    sums = (member[:, None].to(queries.dtype) @ queries).to(whole.dtype)  # (B,H*G,blocks,D)
    sums[:, :, 0] += part
    before = whole[:, :, None] + sums.cumsum(2) - sums
    length = torch.linalg.vector_norm(before, dim=-1).clamp(min=1e-12)[..., None]
    direction = (before / length).to(queries.dtype)
    parts = []
    for first in range(0, t, TILE):
        few = slice(first, first + TILE)
        index = place[:, None, few, None].expand(-1, queries.shape[1], -1, queries.shape[3])
        along = torch.linalg.vecdot(queries[:, :, few], direction.gather(2, index)).to(whole.dtype)
        norm = torch.linalg.vector_norm(queries[:, :, few], dim=-1, dtype=whole.dtype)
        parts.append(along / norm.clamp(min=1e-12))
    # In block 0 nothing is common yet: those come last, spread evenly among themselves.
    unknown = 2 + spread(positions.clamp(min=0)).to(whole.dtype) / (1 << 32)
    likeness = torch.where((positions < BLOCK)[:, None], unknown[:, None], torch.cat(parts, dim=2))
    done = seen // BLOCK - start  # (B,): blocks that are complete now
    index = done[:, None, None, None].expand(-1, queries.shape[1], 1, queries.shape[3])
    whole.copy_(before.gather(2, index)[:, :, 0])
    part.copy_(sums.gather(2, index)[:, :, 0])
    return likeness.masked_fill(~real[:, None], float("inf"))
