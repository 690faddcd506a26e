"""How much each query resembles those of its head before it."""

from __future__ import annotations

import torch
from torch import Tensor

from keepkv.kernels.dispatch import check, choose
from keepkv.spread import NEVER, spread

_TILE = 512  # tokens that plain torch looks at together: few blocks, and what it reads twice stays in a cache


def likeness(
    queries: Tensor,
    positions: Tensor,
    seen: Tensor,
    whole: Tensor,
    part: Tensor,
    *,
    groups: int,
    block: int,
    backend: str | None = None,
) -> Tensor:
    """cos(q, Σ of the queries of its head in the blocks of ``block`` positions before its own), float32 (B,H,T,G).

    queries (B,Hq,T,D) at consecutive positions (B,T) up to ``seen`` (B,) − 1, below 0 for padding, which has +inf. In
    the first block nothing is known yet: its queries, of all G = ``groups`` query heads of a KV head together, are
    spread evenly from 2 to 3. whole, part (B,Hq,D) float32: sums of the complete blocks so far, and of the one that is
    not; both are moved on in place, so where forwards end makes no difference. Queries are read twice.
    """
    b, heads, t, d = queries.shape
    check(
        positions.shape == (b, t) and seen.shape == (b,) and whole.shape == part.shape == (b, heads, d),
        f"queries {tuple(queries.shape)} with positions {tuple(positions.shape)}, seen {tuple(seen.shape)} and sums "
        f"{tuple(whole.shape)}, {tuple(part.shape)}: give (B,Hq,T,D), (B,T), (B,) and (B,Hq,D) twice",
    )
    check(whole.is_contiguous() and part.is_contiguous(), "whole and part are written in place: make them contiguous")
    if choose(backend, queries) == "reference":
        return reference(queries, positions, seen, whole, part, groups, block)
    from keepkv.kernels.likeness_triton import likeness as kernel  # Triton is needed only here

    return kernel(queries, positions, seen, whole, part, groups, block)


def reference(
    queries: Tensor, positions: Tensor, seen: Tensor, whole: Tensor, part: Tensor, groups: int, block: int
) -> Tensor:
    """The same in plain torch, some tokens at a time."""
    (b, heads, t, _), real = queries.shape, positions >= 0
    begin, parts = seen - real.sum(-1), []
    for first in range(0, t, _TILE):
        few = slice(first, first + _TILE)
        end = begin + real[:, few].sum(-1)
        parts.append(_tile(queries[:, :, few], positions[:, few], begin, end, whole, part, block))
        begin = end
    order = positions.clamp(min=0)[:, None] * groups + torch.arange(heads, device=positions.device)[:, None] % groups
    unknown = 2 + spread(order).to(whole.dtype) / NEVER
    found: Tensor = torch.where((positions < block)[:, None], unknown, torch.cat(parts, dim=2))
    return found.masked_fill_(~real[:, None], float("inf")).view(b, -1, groups, t).transpose(2, 3)


def _tile(
    queries: Tensor, positions: Tensor, begin: Tensor, end: Tensor, whole: Tensor, part: Tensor, block: int
) -> Tensor:
    """Cosines of some tokens, those from ``begin`` (B,) up to before ``end``; moves the sums on."""
    _, heads, t, d = queries.shape
    queries, start = queries.to(whole.dtype), begin // block
    place = (positions // block - start[:, None]).clamp(min=0)  # (B,T): block, from that of the first token
    blocks = torch.arange(t // block + 2, device=place.device)
    member = (place[:, None] == blocks[:, None]) & (positions >= 0)[:, None]  # (B,blocks,T)
    sums = member[:, None].to(queries.dtype) @ queries  # (B,Hq,blocks,D)
    sums[:, :, 0] += part
    before = whole[:, :, None] + sums.cumsum(2) - sums
    direction = before / torch.linalg.vector_norm(before, dim=-1, keepdim=True).clamp(min=1e-12)
    # With every block, and the own one taken: cheaper than a copy of its direction for each query.
    along: Tensor = (queries @ direction.mT).gather(3, place[:, None, :, None].expand(-1, heads, -1, 1))[..., 0]
    index = (end // block - start)[:, None, None, None].expand(-1, heads, 1, d)  # of the first incomplete block
    whole.copy_(before.gather(2, index)[:, :, 0])
    part.copy_(sums.gather(2, index)[:, :, 0])
    length: Tensor = torch.linalg.vector_norm(queries, dim=-1).clamp(min=1e-12)
    return along / length
