"""Attention over slots in plain torch: the reference that every faster path is compared with.

Works part by part with a running log-sum-exp, so a store may hand over its slots in tiles.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from keepkv.attention.part import Part
from keepkv.attention.step import Attended, attend_one_token
from keepkv.kernels.logits import MASKED, cap_logits

TILE_BYTES = 64 << 20  # logits held at once for long query blocks


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
    sinks (Hq,): logit of an extra softmax entry without value. Softmax and accumulation are float32 (float64 for
    float64 input); log votes are added after the soft cap. weights: return the attention weight of each slot too, for
    one token over rectangles; no key is read again for it.
    """
    t = query.shape[2]
    parts = list(parts)
    if t == 1 and block is None:
        return attend_one_token(query, parts, scaling, softcap, sinks, weights)
    parts = [rectangle for part in parts for rectangle in part.rectangles()]
    b, heads = query.shape[:2]
    tile = max(1, TILE_BYTES // (4 * b * heads * max(p.positions.shape[-1] for p in parts)))
    if t > tile:  # long chunk on a compressed past: bound the logits held at once
        blocks = [None if block is None else block[:, :, i : i + tile] for i in range(0, t, tile)]
        queries = query.split(tile, dim=2)
        pieces = [_attend(q, parts, scaling, m, softcap, sinks) for q, m in zip(queries, blocks, strict=True)]
        return Attended(torch.cat(pieces, dim=2))
    return Attended(_attend(query, parts, scaling, block, softcap, sinks))


def _attend(
    query: Tensor, parts: list[Part], scaling: float, block: Tensor | None, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """Output (B,Hq,T,Dv) over rectangles."""
    b, heads, t, d = query.shape
    h = parts[0].positions.shape[1]
    wide = torch.promote_types(query.dtype, torch.float32)
    grouped = (query.to(wide) * scaling).reshape(b, h, heads // h * t, d)
    out: Tensor | None = None
    lse: Tensor | None = None
    for i, part in enumerate(parts):
        logits = cap_logits(grouped @ part.keys.to(wide).mT, softcap)
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
