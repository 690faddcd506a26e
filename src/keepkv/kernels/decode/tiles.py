"""One token's attention over ragged slots in plain torch, on any device: the buffer is read once, where it lies."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from keepkv.kernels.decode.reference import Decoded
from keepkv.kernels.logits import MASKED, cap_logits
from keepkv.kernels.segments import Segments, Tiles


def decode_in_tiles(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    log_votes: Tensor | None,
    segments: Segments,
    scaling: float,
    softcap: float | None = None,
) -> Decoded:
    """``decode_attention`` of slots whose ``segments.tiles`` is not None; output and lse float32 (float64 for float64).

    query (B,Hq,D); keys (N,D), values (N,Dv), log_votes (N,) float32 or None; no slot is empty.
    """
    work = segments.tiles
    assert work is not None
    b, heads, d = query.shape
    wide = torch.promote_types(query.dtype, torch.float32)
    grouped = (query.to(wide) * scaling).view(b * segments.heads, -1, d)[work.owner]  # (E,G,D)
    u = cap_logits(_products(work, grouped, [x.to(wide).mT for x in work.of(keys)]), softcap)  # (E,G,TILE)
    if log_votes is not None:
        u = u.add_(torch.cat(work.of(log_votes))[:, None]).clamp_(min=MASKED)
    u.masked_fill_(work.outside, MASKED)
    # Each tile by itself, then the tiles of a segment by their shares.
    means = _products(work, u.softmax(-1), [x.to(wide) for x in work.of(values)])  # (E,G,Dv)
    lses = pad(u.logsumexp(-1), (0, 0, 0, 1), value=float("-inf"))[work.entries]  # (B·H,M,G)
    shares = lses.softmax(1).nan_to_num_(0.0)  # NaN: a segment without slots
    out = (shares[..., None] * pad(means, (0, 0, 0, 0, 0, 1))[work.entries]).sum(1)
    lse = lses.logsumexp(1)
    return Decoded(out.view(b, heads, -1), lse.masked_fill_(lse <= MASKED, float("-inf")).view(b, heads), None)


def _products(work: Tiles, x: Tensor, parts: list[Tensor]) -> Tensor:
    """x (E,G,K) times the tiles of ``work``, parts (whole,K,N) and (E − whole,K,N): (E,G,N)."""
    whole, extra = parts
    if not len(extra):
        return torch.bmm(x, whole)
    return torch.cat((torch.bmm(x[: work.whole], whole), torch.bmm(x[work.whole :], extra)))
