"""Attention over blocks in plain torch: what the kernel is compared with."""

from __future__ import annotations

import torch
from torch import Tensor

from keepkv.kernels.decode.reference import Decoded
from keepkv.kernels.logits import cap_logits, with_sinks
from keepkv.kernels.paged.slots import PagedSlots


def paged_attention(
    query: Tensor, slots: PagedSlots, scaling: float, softcap: float | None, sinks: Tensor | None
) -> Decoded:
    """``kernels.paged_attention`` with its arguments checked: output in the query's dtype, the rest float32 or 64."""
    rows, heads, d = query.shape
    *at, real, held = slots.places()
    wide = torch.promote_types(query.dtype, torch.float32)
    where = tuple(at)
    keys = slots.keys[where].to(wide).masked_fill(~real[..., None], 0.0)  # (R,H,S,D)
    values = slots.values[where].to(wide).masked_fill(~real[..., None], 0.0)
    u = query.to(wide).view(rows, slots.heads, -1, d) @ keys.transpose(-1, -2) * scaling
    u = cap_logits(u, softcap)
    if slots.log_votes is not None:
        u = u + slots.log_votes[where].masked_fill(~held, 0.0)[:, :, None]
    u = u.masked_fill(~real[:, :, None], float("-inf"))
    lse = with_sinks(u.logsumexp(-1), sinks)
    share = (u - lse.masked_fill(lse.isneginf(), 0.0)[..., None]).exp()
    output = (share @ values).view(rows, heads, -1).to(query.dtype)
    return Decoded(output, lse.view(rows, heads), None)
