"""One token's attention over codes in plain torch: a tile of slots is expanded at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from keepkv.kernels.codes import Codes
from keepkv.kernels.decode import reference
from keepkv.kernels.decode.reference import Decoded
from keepkv.kernels.logits import KeySlots, with_sinks
from keepkv.kernels.segments import Segments

TILE_BYTES = 8 << 20  # that one tile may take beside the codes: expanded keys and values, and what comes in between


def decode_packed(query: Tensor, slots: KeySlots, keys: Codes, values: Codes, weights: bool) -> Decoded:
    """``kernels.decode_packed`` with its arguments checked and codes without turns; ``slots.keys`` are those of keys.

    All in the query's dtype, float32 or float64. Tiles are joined by their log-sum-exps.
    """
    b, heads, _ = query.shape
    segments = slots.segments
    out, lse = query.new_zeros(b, heads, values.width), query.new_full((b, heads), float("-inf"))
    parts: list[tuple[Tensor, Tensor]] = []
    columns = _columns(query, segments, keys, values)
    for start in range(0, max(1, segments.longest), columns):  # once without slots, too
        part = reference.decode_attention(
            query, *_tile(slots, keys, values, start, start + columns, query.dtype), weights
        )
        total = torch.logaddexp(lse, part.lse)
        out = out * _share(lse, total) + part.output * _share(part.lse, total)
        lse = total
        if part.weights is not None:
            parts.append((part.weights, part.lse))
    total = with_sinks(lse.view(b, segments.heads, -1), slots.sinks).view_as(lse)
    out, lse = out * _share(lse, total), total
    if not weights:
        return Decoded(out, lse, None)
    share = torch.cat([one * _share(z, lse).view(*one.shape[:3], 1) for one, z in parts], dim=-1)
    return Decoded(out, lse, segments.to_layout(share, slots.keys, *segments.index()))


def _share(lse: Tensor, total: Tensor) -> Tensor:
    """Of a softmax with the log-sum-exp ``total``, the share (B,Hq,1) of a part of it; 0 where the whole is empty."""
    return (lse - total.masked_fill(total.isneginf(), 0.0)).exp()[..., None]


def _columns(query: Tensor, segments: Segments, keys: Codes, values: Codes) -> int:
    """Slots of each head in a tile: expanded vectors twice, for codes and levels in between, and logits four times."""
    numbers = 2 * (keys.width + values.width) * segments.heads + 4 * query.shape[1]
    return max(1, TILE_BYTES // max(1, segments.rows * numbers * query.element_size()))


def _tile(
    slots: KeySlots, keys: Codes, values: Codes, start: int, stop: int, dtype: torch.dtype
) -> tuple[KeySlots, Tensor]:
    """The ``start``-th to before the ``stop``-th slot of each head as a rectangle."""
    segments = slots.segments
    index, inside = segments.index(start, stop)

    def taken(x: Tensor) -> Tensor:
        return x[:, :, start:stop] if index is None else segments.take(x, index, inside)

    held = slots.held(index, inside)
    if index is None and held is not None:
        held = taken(held)
    votes = None if slots.log_votes is None else taken(slots.log_votes)
    key, value = (_expand(codes.each(taken), held, dtype) for codes in (keys, values))
    b, h, count = key.shape[:3]
    place = Segments(b, h, count, b * h * count, ragged=False)
    return KeySlots(key, votes, held, place, slots.scaling, slots.softcap, None), value


def _expand(codes: Codes, held: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The vectors (B,H,s,W) in ``dtype``; 0 in empty slots, whatever their scales hold."""
    if held is not None:
        empty = (held < 0)[..., None]
        codes = codes._replace(
            scale=codes.scale.masked_fill(empty, 0.0),
            zero=None if codes.zero is None else codes.zero.masked_fill(empty, 0.0),
        )
    return codes.expand(dtype)
