"""Attention of one token per row: every part by what serves it best, joined by their log-sum-exps."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from keepkv.attention.part import Part
from keepkv.kernels.decode import Decoded, decode
from keepkv.kernels.decode_tiles import decode_tiles
from keepkv.kernels.dispatch import choose


class Attended(NamedTuple):
    """output (B,Hq,T,Dv) in the query's dtype; weights (B,H,G,S), float32 or float64, of one token, or None."""

    output: Tensor
    weights: Tensor | None = None


def step(
    query: Tensor, parts: list[Part], scaling: float, softcap: float | None, sinks: Tensor | None, weights: bool
) -> Attended:
    """As ``attend`` for a query (B,Hq,1,D); weights of slots that are ragged are not given."""
    first = parts[0]
    fused = choose(None, query, first.keys, first.values) == "triton"
    whole = len(parts) == 1 and first.space is None and softcap is None and sinks is None
    exact = query.dtype in (torch.float32, torch.float64) or first.log_votes is None
    if whole and exact and not fused and not weights:
        return Attended(_sdpa(query, first, scaling))
    weights = weights and all(part.space is None for part in parts)
    piece = _by_kernel if fused else _plain
    done = [piece(query[:, :, 0], part, scaling, softcap, weights) for part in parts]
    if len(done) == 1 and sinks is None:
        return Attended(done[0].output[:, :, None].to(query.dtype), done[0].weights)
    lses = [one.lse for one in done] + ([] if sinks is None else [sinks.to(done[0].lse.dtype).expand_as(done[0].lse)])
    shares = torch.stack(lses).softmax(0).nan_to_num_(0.0)[: len(done)]  # NaN: nothing in sight
    out = torch.stack([one.output for one in done]).mul(shares[..., None]).sum(0)
    given = [one.weights for one in done]
    shares = shares.view(len(done), query.shape[0], first.positions.shape[1], -1, 1) if weights else shares
    seen = [x * share for x, share in zip(given, shares, strict=True) if x is not None]
    return Attended(out[:, :, None].to(query.dtype), torch.cat(seen, dim=-1) if seen else None)


def _sdpa(query: Tensor, part: Part, scaling: float) -> Tensor:
    """One rectangle by torch's fused kernel: the query heads of a KV head become queries of one head, so that no key is
    repeated. Votes would lose precision in a half-precision mask; emptiness does not."""
    b, heads, _, d = query.shape
    lowest = torch.finfo(query.dtype).min / 2  # finite in half precision too: see MASKED
    mask = part.bias().clamp_min(lowest).to(query.dtype)[:, :, None]
    grouped = query.view(b, part.positions.shape[1], -1, d)
    return scaled_dot_product_attention(grouped, part.keys, part.values, mask, scale=scaling).view(b, heads, 1, -1)


def _by_kernel(query: Tensor, part: Part, scaling: float, softcap: float | None, weights: bool) -> Decoded:
    """One part as if it were all, query (B,Hq,D)."""
    if part.space is None:
        return decode(query, *part[:4], scaling=scaling, softcap=softcap, weights=weights)
    return decode(
        query, part.keys, part.values, part.log_votes, scaling=scaling, softcap=softcap,
        offsets=part.space.first, lengths=part.space.lengths, longest=part.space.longest,
    )  # fmt: skip


def _plain(query: Tensor, part: Part, scaling: float, softcap: float | None, weights: bool) -> Decoded:
    """The same in plain torch; output, log-sum-exp and weights float32, or float64."""
    if part.space is not None:
        if part.space.tiles is None:
            return _by_kernel(query, part, scaling, softcap, False)  # its reference: a few slots
        return decode_tiles(
            query, part.keys, part.values, part.log_votes, part.space, part.space.tiles, scaling, softcap
        )
    b, heads, d = query.shape
    wide = torch.promote_types(query.dtype, torch.float32)
    grouped = (query.to(wide) * scaling).view(b, part.positions.shape[1], -1, d)
    u = grouped @ part.keys.to(wide).transpose(-1, -2)  # (B,H,G,s)
    if softcap is not None:
        u = torch.tanh(u / softcap) * softcap
    u = u + part.bias()[:, :, None]
    share = u.softmax(-1)
    out = share @ part.values.to(wide)
    return Decoded(out.view(b, heads, -1), u.logsumexp(-1).view(b, heads), share if weights else None)
