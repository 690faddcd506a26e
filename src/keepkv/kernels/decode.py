"""Attention of one new token per row over its slots, with log votes: the step that decoding repeats."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from keepkv.kernels.dispatch import choose
from keepkv.kernels.layout import Layout, agree, layout, spread


class Decoded(NamedTuple):
    """output (B,Hq,Dv) in the query's dtype, zero where a head sees nothing; lse (B,Hq), the log of the softmax
    denominator, −inf there; weights (B,H,G,S) as ``lse``, or (G,N) for ragged slots, zero for empty slots; or None."""

    output: Tensor
    lse: Tensor
    weights: Tensor | None


def decode(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    log_votes: Tensor | None = None,
    positions: Tensor | None = None,
    *,
    scaling: float,
    offsets: Tensor | None = None,
    lengths: Tensor | None = None,
    longest: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    weights: bool = False,
    backend: str | None = None,
) -> Decoded:
    """softmax(softcap(q·k·scaling) + log_votes) V for one query (B,Hq,D) per query head.

    keys (B,H,S,D), values (B,H,S,Dv), log_votes (B,H,S) float32 or None, positions (B,H,S) int or None: slots with a
    position below 0 are empty, wherever they stand. With lengths (B,H): only the last ``lengths`` columns count. With
    offsets and lengths (B,H): ragged slots, keys (N,D) and so on, see ``layout``. Any strides; the elements of one slot
    side by side, or they are copied. Query heads of a KV head are adjacent.

    sinks (Hq,): logit of an extra softmax entry without value. weights: also return the attention weights; keys are not
    read again for them. Softmax and sums in float32 (float64 for float64). backend: see ``dispatch.choose``.
    """
    space = layout(keys, 1, offsets, lengths, longest)
    b, heads, d = query.shape
    agree(space, (b, heads, d), keys, sinks, values=values[..., 0], log_votes=log_votes, positions=positions)
    if choose(backend, query, keys, values) == "reference":
        return reference(query, keys, values, log_votes, positions, space, scaling, softcap, sinks, weights)
    from keepkv.kernels import decode_triton  # Triton is needed only here

    return decode_triton.decode(query, keys, values, log_votes, positions, space, scaling, softcap, sinks, weights)


def reference(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    log_votes: Tensor | None,
    positions: Tensor | None,
    space: Layout,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
    weights: bool,
) -> Decoded:
    """The same in plain torch: what the kernel is compared with."""
    b, heads, d = query.shape
    wide = torch.promote_types(query.dtype, torch.float32)
    index, inside = space.index()
    grouped = query.to(wide).view(b, space.heads, -1, d)
    u = grouped @ space.take(keys, index, inside).to(wide).transpose(-1, -2) * scaling  # (B,H,G,longest)
    if softcap is not None:
        u = torch.tanh(u / softcap) * softcap
    if log_votes is not None:
        u = u + space.take(log_votes, index, inside)[:, :, None]
    if positions is not None:
        u = u.masked_fill((space.take(positions, index, inside) < 0)[:, :, None], float("-inf"))
    if inside is not None:
        u = u.masked_fill(~inside[:, :, None], float("-inf"))
    lse = u.logsumexp(-1)
    if sinks is not None:
        sink = sinks.to(wide).view(1, *lse.shape[1:])
        lse = torch.where(lse.isneginf(), lse, torch.logaddexp(lse, sink))
    share = (u - lse.masked_fill(lse.isneginf(), 0.0)[..., None]).exp()
    output = share @ space.take(values, index, inside).to(wide)
    output, lse = output.view(b, heads, -1).to(query.dtype), lse.view(b, heads)
    return Decoded(output, lse, spread(share, keys, space, index, inside) if weights else None)
