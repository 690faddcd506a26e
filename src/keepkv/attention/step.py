"""Attention of one token per row: whatever computes a part fastest, and the parts joined by their log-sum-exps."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from keepkv.attention.part import Part
from keepkv.kernels.decode import Decoded, decode_attention
from keepkv.kernels.decode.tiles import decode_in_tiles
from keepkv.kernels.dispatch import by_cpp, choose
from keepkv.kernels.logits import KeySlots, cap_logits
from keepkv.kernels.native import decode as cpp


class Attended(NamedTuple):
    """output (B,Hq,T,Dv) in the query's dtype; weights (B,H,G,S), float32 or float64, of one token, or None."""

    output: Tensor
    weights: Tensor | None = None


def attend_one_token(
    query: Tensor, parts: list[Part], scaling: float, softcap: float | None, sinks: Tensor | None, weights: bool
) -> Attended:
    """``attend`` for a query (B,Hq,1,D). Weights are None where a part is ragged."""
    first = parts[0]
    fused = choose(None, query, first.keys, first.values) == "triton"
    simple = len(parts) == 1 and first.segments is None and softcap is None and sinks is None
    exact = query.dtype in (torch.float32, torch.float64) or first.log_votes is None
    if simple and exact and not fused and not weights:
        return Attended(_by_sdpa(query, first, scaling))
    weights = weights and all(part.segments is None for part in parts)
    of_part = _by_kernel if fused else _on_any_device
    decoded = [of_part(query[:, :, 0], part, scaling, softcap, weights) for part in parts]
    if len(decoded) == 1 and sinks is None:
        return Attended(decoded[0].output[:, :, None].to(query.dtype), decoded[0].weights)
    lses = [one.lse for one in decoded]
    if sinks is not None:
        lses.append(sinks.to(lses[0].dtype).expand_as(lses[0]))
    shares = torch.stack(lses).softmax(0).nan_to_num_(0.0)[: len(decoded)]  # NaN: nothing in sight
    out = torch.stack([one.output for one in decoded]).mul(shares[..., None]).sum(0)
    if not weights:
        return Attended(out[:, :, None].to(query.dtype))
    shares = shares.view(len(decoded), query.shape[0], first.positions.shape[1], -1, 1)
    shared = [one.weights * share for one, share in zip(decoded, shares, strict=True) if one.weights is not None]
    return Attended(out[:, :, None].to(query.dtype), torch.cat(shared, dim=-1))


def _by_sdpa(query: Tensor, part: Part, scaling: float) -> Tensor:
    """Output (B,Hq,1,Dv) over one rectangle by torch's fused attention.

    The query heads of a KV head become queries of one head, so that no key is repeated. Votes would lose precision in a
    half-precision mask; emptiness does not.
    """
    b, heads, _, d = query.shape
    lowest = torch.finfo(query.dtype).min / 2  # finite in half precision too: see MASKED
    mask = part.bias().to(query.dtype).clamp_min(lowest)[:, :, None]
    grouped = query.view(b, part.positions.shape[1], -1, d)
    return scaled_dot_product_attention(grouped, part.keys, part.values, mask, scale=scaling).view(b, heads, 1, -1)


def _by_kernel(query: Tensor, part: Part, scaling: float, softcap: float | None, weights: bool) -> Decoded:
    """Attention of a query (B,Hq,D) over one part alone, by ``decode_attention``."""
    if part.segments is None:
        return decode_attention(query, *part[:4], scaling=scaling, softcap=softcap, weights=weights)
    return decode_attention(
        query, part.keys, part.values, part.log_votes, scaling=scaling, softcap=softcap,
        offsets=part.segments.first, lengths=part.segments.lengths, longest=part.segments.longest,
    )  # fmt: skip


def _on_any_device(query: Tensor, part: Part, scaling: float, softcap: float | None, weights: bool) -> Decoded:
    """As ``_by_kernel``; output, log-sum-exp and weights are float32 or float64, but for the output of a few slots."""
    if part.segments is not None:
        if by_cpp(None, lambda: cpp.obstacle(query, part.keys, part.values)):
            slots = KeySlots(part.keys, part.log_votes, None, part.segments, scaling, softcap, None)
            return cpp.decode_attention(query, slots, part.keys, part.values, False)
        if part.segments.tiles is None:
            return _by_kernel(query, part, scaling, softcap, False)  # its reference: a few slots
        return decode_in_tiles(query, part.keys, part.values, part.log_votes, part.segments, scaling, softcap)
    b, heads, d = query.shape
    wide = torch.promote_types(query.dtype, torch.float32)
    grouped = (query.to(wide) * scaling).view(b, part.positions.shape[1], -1, d)
    u = cap_logits(grouped @ part.keys.to(wide).mT, softcap) + part.bias()[:, :, None]  # (B,H,G,s)
    share = u.softmax(-1)
    out = share @ part.values.to(wide)
    return Decoded(out.view(b, heads, -1), u.logsumexp(-1).view(b, heads), share if weights else None)
