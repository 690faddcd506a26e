"""One token's attention over ragged slots in plain torch, on any device: the buffer is read once, where it lies."""

from __future__ import annotations

import torch
from torch import Tensor

from keepkv.kernels.decode.reference import Decoded
from keepkv.kernels.dispatch import by_cpp, choose
from keepkv.kernels.logits import MASKED, cap_logits
from keepkv.kernels.native import decode as cpp
from keepkv.kernels.segments import Segments, Tiles


def reads_in_tiles(keys: Tensor, values: Tensor) -> bool:
    """Whether one token attends to ragged slots like these, of its own dtype, in plain torch: that holds an index of
    their tiles beside them, and the kernels hold none."""
    return choose(None, keys, values) != "triton" and not by_cpp(None, lambda: cpp.obstacle(keys, keys, values))


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
    # Of each segment the largest logit, then the sums of its tiles. index_put_ adds in the same order in every run.
    owners = work.owner[:, None].expand(-1, u.shape[1])
    top = u.new_full((b * segments.heads, u.shape[1]), float("-inf")).scatter_reduce_(0, owners, u.amax(-1), "amax")
    share = u.sub_(top[work.owner][..., None]).exp_()
    sums = _products(work, share, [x.to(wide) for x in work.of(values)])  # (E,G,Dv)
    total = torch.zeros_like(top).index_put_((work.owner,), share.sum(-1), accumulate=True)  # (B·H,G)
    out = sums.new_zeros(*top.shape, sums.shape[-1]).index_put_((work.owner,), sums, accumulate=True)
    out = out.div_(total.clamp(min=1.0)[..., None])  # below 1: a segment without slots
    lse = top.add_(total.log_())
    return Decoded(out.view(b, heads, -1), lse.masked_fill_(lse <= MASKED, float("-inf")).view(b, heads), None)


def _products(work: Tiles, x: Tensor, parts: list[Tensor]) -> Tensor:
    """x (E,G,K) times the tiles of ``work``, parts (whole,K,N) and (E − whole,K,N): (E,G,N)."""
    whole, extra = parts
    if not len(extra):
        return torch.bmm(x, whole)
    return torch.cat((torch.bmm(x[: work.whole], whole), torch.bmm(x[work.whole :], extra)))
