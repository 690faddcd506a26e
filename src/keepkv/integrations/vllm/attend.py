"""Attention over slots that a stock kernel cannot read: votes, heads of different lengths, a hole."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from keepkv.attention.attend import attend
from keepkv.attention.part import Part
from keepkv.core.slots import Slots
from keepkv.integrations.vllm import book
from keepkv.integrations.vllm.compress import Layer
from keepkv.kernels import PagedSlots, choose, paged_attention


def attend_slots(
    query: Tensor, slots: Slots, scaling: float, votes: bool, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """Output (T,Hq,Dv) of ``query`` (T,Hq,D), whose tokens are the newest T of ``slots`` (1,H,S,…).

    votes: whether any slot may have votes. softcap, sinks (Hq,): of the model's attention, None where it has none.
    """
    tokens = query.shape[0]
    block = None
    if tokens > 1:
        block = torch.ones(tokens, tokens, dtype=torch.bool, device=query.device).tril()[None, None]
    part = Part(slots.keys, slots.values, slots.log_votes if votes else None, slots.positions)
    done = attend(query.transpose(0, 1)[None], [part], scaling, block=block, softcap=softcap, sinks=sinks)
    return done.output[0].transpose(0, 1)


def decodes(part: book.Part, layer: Layer, query: Tensor) -> bool:
    """Whether ``attend_blocks`` takes the part: one token, over slots that a stock kernel cannot read, by a kernel."""
    one = part.end - part.begin == 1 and not part.exact and not layer.pages.pool.transposed
    return one and choose(None, query, layer.pages.pool.keys) == "triton"


def attend_blocks(rows: Sequence[tuple[book.Part, Layer]], query: Tensor, output: Tensor) -> None:
    """Attention of one token of each of ``rows``, parts of one layer whose pages lie in one pool, from ``query``
    (tokens,Hq,D) into ``output``: their slots are read where they lie."""
    parts, layers = zip(*rows, strict=True)
    first, device = layers[0], query.device
    pool, site, lanes = first.pages.pool, first.site, first.pages.pool.layers * first.pages.pool.heads

    def numbers(each: Sequence[int], dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.tensor(each, dtype=dtype, device=device)

    helds, plans = [x.held for x in layers], [x.row.plan for x in parts]
    none = numbers([0] * lanes, torch.int64)
    slots = PagedSlots(
        pool.keys,
        pool.values,
        pool.votes if any(x.wish.method.reduce.merges for x in plans) else None,
        torch.stack([x.table for x in parts]),
        numbers([x.event for x in helds]),
        numbers([x.end for x in parts]),
        torch.stack([none if x.counts is None else x.counts for x in helds]),
        numbers([plan.first_block(x.event) for plan, x in zip(plans, helds, strict=True)]),
        numbers([x.packed for x in plans], torch.bool),
        max(x.most + part.end - x.event for x, part in zip(helds, parts, strict=True)),
        site.rank if pool.layers > 1 else 0,
    )
    at = numbers([x.first for x in parts], torch.int64)
    done = paged_attention(query[at], slots, scaling=site.scaling, softcap=site.softcap, sinks=site.sinks)
    output[at] = done.output.view(len(at), *output.shape[1:])
