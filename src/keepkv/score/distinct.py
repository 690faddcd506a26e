"""The queries of a row that are least like its others, remembered between forwards."""

from __future__ import annotations

import torch
from torch import Tensor

from keepkv.kernels.likeness import likeness
from keepkv.kernels.pick import pick
from keepkv.slots import EMPTY, LayerView

BLOCK = 256  # tokens; a query is compared with those of the blocks before its own
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
    state, g = view.state, view.groups
    if NAMES[0] not in state:
        state.update(zip(NAMES, _nothing(view, size), strict=True))
    if not view.queries.shape[2]:
        return
    held, held_order, held_likeness, whole, part = (state[name] for name in NAMES)
    new = likeness(view.queries, view.query_positions, view.seen, whole, part, groups=g, block=BLOCK)
    every = torch.cat((held_likeness, new.flatten(2)), dim=2)
    # Ascending: what is held comes first, then the new ones by position and query head.
    chosen = every.topk(size, dim=2, largest=False, sorted=False).indices.sort(dim=2).values
    found, places = pick(chosen, held, held_order, view.queries, view.query_positions)
    held.copy_(found)
    held_order.copy_(places)
    held_likeness.copy_(every.gather(2, chosen))


def distinct(view: LayerView, size: int) -> tuple[Tensor, Tensor]:
    """Queries (B,H,size,D) and positions (B,H,size), ``EMPTY`` first: what ``remember_distinct`` keeps, or would of the
    latest forward where it never ran."""
    state = view.state
    if NAMES[0] not in state:
        scratch = LayerView(view.slots, view.queries, view.query_positions, view.seen, view.scaling)
        remember_distinct(scratch, size)
        state = scratch.state
    return state[NAMES[0]], state[NAMES[1]] // view.groups  # rounded down: EMPTY stays so


def _nothing(view: LayerView, size: int) -> tuple[Tensor, ...]:
    (b, heads, _, d), h = view.queries.shape, view.slots.shape[1]
    wide = torch.promote_types(view.queries.dtype, torch.float32)
    sums = view.queries.new_zeros(b, heads, d, dtype=wide)
    return (
        view.queries.new_zeros(b, h, size, d),
        view.query_positions.new_full((b, h, size), EMPTY),
        sums.new_full((b, h, size), torch.finfo(wide).max),  # rather than padding, whose likeness is infinite
        sums,
        sums.clone(),
    )
