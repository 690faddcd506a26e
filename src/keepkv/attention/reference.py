"""Attention over slots in plain torch: the reference that every faster path is compared with.

Works part by part with a running log-sum-exp, so a store may hand over its slots in tiles.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

MASKED = -1e30  # finite, so that a query that sees nothing yields a finite, unused output instead of NaN
TILE_BYTES = 64 << 20  # logits held at once for long query blocks


class Part(NamedTuple):
    """A rectangle of slots: keys (B,H,s,D), values (B,H,s,Dv), log_votes (B,H,s) or None, positions (B,H,s)."""

    keys: Tensor
    values: Tensor
    log_votes: Tensor | None
    positions: Tensor

    def bias(self) -> Tensor:
        """(B,H,s) float32 added to the logits: log votes, ``MASKED`` for empty slots."""
        empty = self.positions < 0
        if self.log_votes is None:
            return torch.zeros(empty.shape, device=empty.device).masked_fill_(empty, MASKED)
        return self.log_votes.masked_fill(empty, MASKED)


def attend(
    query: Tensor,
    parts: Iterable[Part],
    scaling: float,
    *,
    block: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention output (B,Hq,T,Dv) of ``query`` (B,Hq,T,D) over all slots of ``parts``, in the query's dtype.

    block (B|1,1,T,T) bool: which of the last T slots each query sees; None: all. They must lie in the last part.
    sinks (Hq,): logit of an extra softmax entry without value. Softmax and accumulation in float32 (float64 for
    float64 input); log votes are added after the soft cap.
    """
    b, heads, t, _ = query.shape
    parts = list(parts)
    if t == 1 and len(parts) == 1 and block is None:
        done = _by_kernel(query, parts[0], scaling, softcap, sinks)
        if done is not None:
            return done
    wide_enough = query.dtype in (torch.float32, torch.float64) or parts[0].log_votes is None
    if t == 1 and len(parts) == 1 and softcap is None and sinks is None and wide_enough:
        return _fused(query, parts[0], scaling)
    tile = max(1, TILE_BYTES // (4 * b * heads * max(p.positions.shape[-1] for p in parts)))
    if t > tile:  # long chunk on a compressed past: bound the logits held at once
        blocks = [None if block is None else block[:, :, i : i + tile] for i in range(0, t, tile)]
        queries = query.split(tile, dim=2)
        pieces = [_attend(q, parts, scaling, m, softcap, sinks) for q, m in zip(queries, blocks, strict=True)]
        return torch.cat(pieces, dim=2)
    return _attend(query, parts, scaling, block, softcap, sinks)


def _by_kernel(query: Tensor, part: Part, scaling: float, softcap: float | None, sinks: Tensor | None) -> Tensor | None:
    """One query per head by the fused kernel; None where it does not serve, as on the CPU."""
    if torch.compiler.is_compiling():
        return None
    from keepkv import kernels  # here, since kernels build on the pieces, which build on this file

    if kernels.choose(None, query, part.keys, part.values) == "reference":
        return None
    return kernels.decode(query[:, :, 0], *part, scaling=scaling, softcap=softcap, sinks=sinks).output[:, :, None]


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
