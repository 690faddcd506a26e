"""Attention of one token per row: whatever computes a part fastest, and the parts joined by their log-sum-exps."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from keepkv.attention.part import Part, plain
from keepkv.kernels.codes import Codes
from keepkv.kernels.decode import Decoded, decode_attention
from keepkv.kernels.decode.tiles import decode_in_tiles
from keepkv.kernels.dispatch import by_cpp, choose
from keepkv.kernels.logits import MASKED, KeySlots, cap_logits
from keepkv.kernels.native import decode as cpp
from keepkv.kernels.packed import decode_packed
from keepkv.kernels.segments import segments_of


class Attended(NamedTuple):
    """output (B,Hq,T,Dv) in the query's dtype; weights (B,H,G,S), float32 or float64, of one token, or None."""

    output: Tensor
    weights: Tensor | None = None


def attend_one_token(
    query: Tensor, parts: Iterable[Part], scaling: float, softcap: float | None, sinks: Tensor | None, weights: bool
) -> Attended:
    """``attend`` for a query (B,Hq,1,D). Weights are None where a part is ragged."""
    ahead = iter(parts)
    first, second = next(ahead), next(ahead, None)
    keys, values = first.keys, first.values
    if second is None and isinstance(keys, Tensor) and isinstance(values, Tensor) and not weights:
        simple = first.segments is None and softcap is None and sinks is None
        exact = query.dtype in (torch.float32, torch.float64) or first.log_votes is None
        if simple and exact and choose(None, query, keys, values) != "triton":
            return Attended(_by_sdpa(query, first, scaling))
    heads, decoded = first.positions.shape[1] if first.segments is None else first.segments.heads, []
    parts = chain([first], [] if second is None else [second], ahead)
    del first, second, keys, values  # a store may hand over tiles that it has made for this: one is held at a time
    for part in parts:
        # A soft cap is of the whole logit: what keys have in common cannot be left out of it.
        for piece in part.rectangles() if part.shift is not None and softcap is not None else (part,):
            decoded.append(_of_part(query[:, :, 0], piece, scaling, softcap, weights))
    weights = all(one.weights is not None for one in decoded)
    if len(decoded) == 1 and sinks is None:
        return Attended(decoded[0].output[:, :, None].to(query.dtype), decoded[0].weights)
    lses = [one.lse for one in decoded]
    if sinks is not None:
        lses.append(sinks.to(lses[0].dtype).expand_as(lses[0]))
    shares = _shares(torch.stack(lses))[: len(decoded)]
    out = torch.stack([one.output for one in decoded]).mul(shares[..., None]).sum(0)
    if not weights:
        return Attended(out[:, :, None].to(query.dtype))
    shares = shares.view(len(decoded), query.shape[0], heads, -1, 1)
    shared = [one.weights * share for one, share in zip(decoded, shares, strict=True) if one.weights is not None]
    return Attended(out[:, :, None].to(query.dtype), torch.cat(shared, dim=-1))


def _shares(lses: Tensor) -> Tensor:
    """``lses.softmax(0)``, 0 where nothing is in sight. torch's softmax wakes every thread, for a few numbers too."""
    apart = (lses - lses.amax(0).clamp_min(torch.finfo(lses.dtype).min)).exp()
    return (apart / apart.sum(0)).nan_to_num_(0.0)


def _of_part(query: Tensor, part: Part, scaling: float, softcap: float | None, weights: bool) -> Decoded:
    """Attention of a query (B,Hq,D) over one part alone."""
    if isinstance(part.keys, Codes) and isinstance(part.values, Codes):
        where = part.segments
        if where is None:
            found = decode_packed(
                query, part.keys, part.values, part.log_votes, part.positions, scaling=scaling, softcap=softcap,
                weights=weights,
            )  # fmt: skip
        else:
            found = decode_packed(
                query, part.keys, part.values, part.log_votes, scaling=scaling, softcap=softcap, offsets=where.first,
                lengths=where.lengths, longest=where.longest,
            )  # fmt: skip
        return found if part.shift is None else _shifted(found, query, part.shift, scaling)
    keys, values = plain(part)
    weights = weights and part.segments is None
    of_part = _by_kernel if choose(None, query, keys, values) == "triton" else _on_any_device
    return of_part(query, part, scaling, softcap, weights)


def _shifted(found: Decoded, query: Tensor, shift: Tensor, scaling: float) -> Decoded:
    """``found`` where every key is ``shift`` (B,H,D) more: each logit of a query (B,Hq,D) is more by one number, and
    nothing changes but the log-sum-exp."""
    (b, heads, d), wide = query.shape, found.lse.dtype
    more = (query.to(wide).view(b, shift.shape[1], -1, d) * shift[:, :, None].to(wide)).sum(-1) * scaling
    return found._replace(lse=found.lse + more.view(b, heads))


def _by_sdpa(query: Tensor, part: Part, scaling: float) -> Tensor:
    """Output (B,Hq,1,Dv) over one rectangle by torch's fused attention.

    The query heads of a KV head become queries of one head, so that no key is repeated. Votes would lose precision in a
    half-precision mask; emptiness does not.
    """
    b, heads, _, d = query.shape
    lowest = max(torch.finfo(query.dtype).min / 2, MASKED)  # finite in half precision too
    mask = part.bias(lowest).to(query.dtype)[:, :, None]
    grouped, (keys, values) = query.view(b, part.positions.shape[1], -1, d), plain(part)
    return scaled_dot_product_attention(grouped, keys, values, mask, scale=scaling).view(b, heads, 1, -1)


def _by_kernel(query: Tensor, part: Part, scaling: float, softcap: float | None, weights: bool) -> Decoded:
    """Attention of a query (B,Hq,D) over one part alone, by ``decode_attention``."""
    keys, values = plain(part)
    if part.segments is None:
        return decode_attention(
            query, keys, values, part.log_votes, part.positions, scaling=scaling, softcap=softcap, weights=weights
        )
    return decode_attention(
        query, keys, values, part.log_votes, scaling=scaling, softcap=softcap,
        offsets=part.segments.first, lengths=part.segments.lengths, longest=part.segments.longest,
    )  # fmt: skip


def _on_any_device(query: Tensor, part: Part, scaling: float, softcap: float | None, weights: bool) -> Decoded:
    """As ``_by_kernel``; output, log-sum-exp and weights are float32 or float64, but for the output of a few slots."""
    keys, values = plain(part)
    if by_cpp(None, lambda: cpp.obstacle(query, keys, values)):
        place, positions = (segments_of(keys), part.positions) if part.segments is None else (part.segments, None)
        slots = KeySlots(keys, part.log_votes, positions, place, scaling, softcap, None)
        return cpp.decode_attention(query, slots, keys, values, weights)
    if part.segments is not None:
        if part.segments.tiles is None:
            return _by_kernel(query, part, scaling, softcap, False)  # its reference: a few slots
        return decode_in_tiles(query, keys, values, part.log_votes, part.segments, scaling, softcap)
    b, heads, d = query.shape
    wide = torch.promote_types(query.dtype, torch.float32)
    grouped = (query.to(wide) * scaling).view(b, part.positions.shape[1], -1, d)
    u = cap_logits(grouped @ keys.to(wide).mT, softcap) + part.bias()[:, :, None]  # (B,H,G,s)
    share = u.softmax(-1)
    out = share @ values.to(wide)
    return Decoded(out.view(b, heads, -1), u.logsumexp(-1).view(b, heads), share if weights else None)
