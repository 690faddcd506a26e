"""One token's attention in plain torch: what the kernel is compared with."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from keepkv.kernels.logits import KeySlots, with_sinks


class Decoded(NamedTuple):
    """Attention of one token per row.

    output (B,Hq,Dv): zero where a head sees nothing. lse (B,Hq): log of the softmax denominator, −inf there.
    weights (B,H,G,S), or (G,N) for ragged slots: zero for empty slots; None where nobody asked.
    """

    output: Tensor
    lse: Tensor
    weights: Tensor | None


def decode_attention(query: Tensor, slots: KeySlots, values: Tensor, weights: bool) -> Decoded:
    """``kernels.decode_attention`` with its arguments checked: output in the query's dtype, the rest float32 or 64."""
    (b, heads, d), segments = query.shape, slots.segments
    index, inside = segments.index()
    u = slots.logits(query.reshape(b, segments.heads, -1, d), index, inside)  # (B,H,G,longest)
    if (held := slots.held(index, inside)) is not None:
        u = u.masked_fill((held < 0)[:, :, None], float("-inf"))
    lse = with_sinks(u.logsumexp(-1), slots.sinks)
    share = (u - lse.masked_fill(lse.isneginf(), 0.0)[..., None]).exp()
    output = (share @ segments.take(values, index, inside).to(share.dtype)).view(b, heads, -1).to(query.dtype)
    placed = segments.to_layout(share, slots.keys, index, inside) if weights else None
    return Decoded(output, lse.view(b, heads), placed)
