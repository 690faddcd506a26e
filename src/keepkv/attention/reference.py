"""Attention over slots in plain torch: the reference that every faster path is compared with.

Works part by part with a running log-sum-exp, so a store may hand over its slots in tiles.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from keepkv.kernels.decode import Decoded, decode
from keepkv.kernels.decode_tiles import decode_tiles
from keepkv.kernels.dispatch import choose
from keepkv.kernels.layout import Layout
from keepkv.slots import EMPTY

MASKED = -1e30  # finite, so that a query that sees nothing yields a finite, unused output instead of NaN
TILE_BYTES = 64 << 20  # logits held at once for long query blocks
COLUMNS = 512  # slots of each segment that are gathered at once where several queries meet ragged slots


class Part(NamedTuple):
    """A rectangle of slots: keys (B,H,s,D), values (B,H,s,Dv), log_votes (B,H,s) or None, positions (B,H,s).

    With ``space``: ragged, keys (N,D) and so on, none of them empty, in segments that ``space`` names.
    """

    keys: Tensor
    values: Tensor
    log_votes: Tensor | None
    positions: Tensor
    space: Layout | None = None

    def bias(self) -> Tensor:
        """(B,H,s) float32 added to the logits: log votes, ``MASKED`` for empty slots."""
        empty = self.positions < 0
        if self.log_votes is None:
            return torch.zeros(empty.shape, device=empty.device).masked_fill_(empty, MASKED)
        return self.log_votes.masked_fill(empty, MASKED)

    def rectangles(self) -> Iterator[Part]:
        """The same slots as rectangles: itself, or copies of ``COLUMNS`` slots of each segment at a time."""
        if self.space is None:
            yield self
            return
        for start in range(0, self.space.longest, COLUMNS):
            index, inside = self.space.index(start, start + COLUMNS)
            taken = (None if x is None else self.space.take(x, index, inside) for x in self[:4])
            keys, values, votes, positions = taken
            assert keys is not None and values is not None and positions is not None and inside is not None
            yield Part(keys, values, votes, positions.masked_fill_(~inside, EMPTY))


class Attended(NamedTuple):
    """output (B,Hq,T,Dv) in the query's dtype; weights (B,H,G,S), float32 or float64, of one token, or None."""

    output: Tensor
    weights: Tensor | None = None


def attend(
    query: Tensor,
    parts: Iterable[Part],
    scaling: float,
    *,
    block: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    weights: bool = False,
) -> Attended:
    """Attention of ``query`` (B,Hq,T,D) over all slots of ``parts``.

    block (B|1,1,T,T) bool: which of the last T slots each query sees; None: all. They must lie in the last part.
    sinks (Hq,): logit of an extra softmax entry without value. Softmax and accumulation in float32 (float64 for
    float64 input); log votes are added after the soft cap. weights: of one token over rectangles, the attention weight
    of each slot too, for which no key is read again.
    """
    t = query.shape[2]
    parts = list(parts)
    if t == 1 and block is None:
        return _step(query, parts, scaling, softcap, sinks, weights and all(x.space is None for x in parts))
    parts = [rectangle for part in parts for rectangle in part.rectangles()]
    b, heads = query.shape[:2]
    tile = max(1, TILE_BYTES // (4 * b * heads * max(p.positions.shape[-1] for p in parts)))
    if t > tile:  # long chunk on a compressed past: bound the logits held at once
        blocks = [None if block is None else block[:, :, i : i + tile] for i in range(0, t, tile)]
        queries = query.split(tile, dim=2)
        pieces = [_attend(q, parts, scaling, m, softcap, sinks) for q, m in zip(queries, blocks, strict=True)]
        return Attended(torch.cat(pieces, dim=2))
    return Attended(_attend(query, parts, scaling, block, softcap, sinks))


def _step(
    query: Tensor, parts: list[Part], scaling: float, softcap: float | None, sinks: Tensor | None, weights: bool
) -> Attended:
    """One query per head: each part by what serves it best, joined by their log-sum-exps."""
    first = parts[0]
    by_kernel = not torch.compiler.is_compiling() and choose(None, query, first.keys, first.values) == "triton"
    exact = query.dtype in (torch.float32, torch.float64) or first.log_votes is None
    plain = len(parts) == 1 and first.space is None and softcap is None and sinks is None
    if plain and exact and not by_kernel and not weights:
        return Attended(_fused(query, first, scaling))
    done = [_piece(query[:, :, 0], part, scaling, softcap, weights) for part in parts]
    lses = [one.lse for one in done] + ([] if sinks is None else [sinks.to(done[0].lse.dtype).expand_as(done[0].lse)])
    shares = torch.stack(lses).softmax(0).nan_to_num_(0.0)[: len(done), ..., None]  # NaN: nothing in sight
    out = torch.stack([one.output for one in done]).mul(shares).sum(0) if len(lses) > 1 else done[0].output
    b, heads = query.shape[:2]
    whole = None
    if weights:
        given = [one.weights for one in done]
        shares = shares.view(len(done), b, -1, heads // first.keys.shape[1], 1)
        whole = torch.cat([x * share for x, share in zip(given, shares, strict=True) if x is not None], dim=-1)
    return Attended(out[:, :, None].to(query.dtype), whole)


def _piece(query: Tensor, part: Part, scaling: float, softcap: float | None, weights: bool) -> Decoded:
    """One part, query (B,Hq,D): output and weights as if it were all, and its log-sum-exp."""
    space = part.space
    if space is None:
        return decode(query, *part[:4], scaling=scaling, softcap=softcap, weights=weights)
    if space.tiles is not None and choose(None, query, part.keys, part.values) == "reference":
        out, lse = decode_tiles(query, part.keys, part.values, part.log_votes, space, space.tiles, scaling, softcap)
        return Decoded(out, lse, None)
    return decode(
        query, part.keys, part.values, part.log_votes, scaling=scaling, softcap=softcap,
        offsets=space.first, lengths=space.lengths, longest=space.longest,
    )  # fmt: skip


def _fused(query: Tensor, part: Part, scaling: float) -> Tensor:
    """One query per head over one rectangle, by torch's fused kernel: the query heads of a KV head become queries of
    one head, so that no key is repeated. Votes would lose precision in a half-precision mask; emptiness does not."""
    b, heads, _, d = query.shape
    h = part.positions.shape[1]
    lowest = torch.finfo(query.dtype).min / 2  # finite in half precision too: see MASKED
    mask = part.bias().clamp_min(lowest).to(query.dtype)[:, :, None]
    grouped = query.view(b, h, heads // h, d)
    out = torch.nn.functional.scaled_dot_product_attention(grouped, part.keys, part.values, mask, scale=scaling)
    return out.reshape(b, heads, 1, -1)


def _attend(
    query: Tensor, parts: list[Part], scaling: float, block: Tensor | None, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    b, heads, t, d = query.shape
    h = parts[0].positions.shape[1]
    wide = torch.promote_types(query.dtype, torch.float32)
    grouped = (query.to(wide) * scaling).reshape(b, h, heads // h * t, d)
    out: Tensor | None = None
    lse: Tensor | None = None
    for i, part in enumerate(parts):
        logits = grouped @ part.keys.to(wide).transpose(-1, -2)
        if softcap is not None:
            logits = torch.tanh(logits / softcap) * softcap
        logits = logits.view(b, h, heads // h, t, -1) + part.bias()[:, :, None, None]
        if block is not None and i == len(parts) - 1:
            new = logits[..., logits.shape[-1] - block.shape[-1] :]
            new.masked_fill_(~block[:, :, None], MASKED)
        part_lse = logits.logsumexp(-1, keepdim=True)
        weights = (logits - part_lse).exp_().view(b, h, -1, logits.shape[-1])
        part_out = (weights @ part.values.to(wide)).view(b, h, heads // h, t, -1)
        if out is None or lse is None:
            out, lse = part_out, part_lse
            continue
        total = torch.logaddexp(lse, part_lse)
        out = out * (lse - total).exp() + part_out * (part_lse - total).exp()
        lse = total
    assert out is not None and lse is not None
    if sinks is not None:
        out = out * torch.sigmoid(lse - sinks.to(wide).view(1, h, heads // h, 1, 1))
    return out.reshape(b, heads, t, -1).to(query.dtype)
