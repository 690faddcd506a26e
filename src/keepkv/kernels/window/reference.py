"""Attention that slots receive, in plain torch with the matrix of queries × slots: what the kernel is compared with."""

from __future__ import annotations

from torch import Tensor

from keepkv.kernels.logits import KeySlots, with_sinks


def window_scores(queries: Tensor, query_positions: Tensor, slots: KeySlots, divisor: Tensor, peak: bool) -> Tensor:
    """``kernels.window_scores`` with its arguments checked; sums are divided by ``divisor`` (B,)."""
    b, heads, w, d = queries.shape
    h = slots.segments.heads
    index, inside = slots.segments.index()
    u = slots.logits(queries.reshape(b, h, heads // h * w, d), index, inside)
    u = u.view(b, h, heads // h, w, u.shape[-1])
    held = slots.held(index, inside)
    assert held is not None
    sees = (held[:, :, None] >= 0) & (held[:, :, None] <= query_positions[:, None, :, None])  # (B,H,W,longest)
    u = u.masked_fill(~sees[:, :, None], float("-inf"))
    z = with_sinks(u.logsumexp(-1), slots.sinks)
    weights = (u - z.masked_fill(z.isneginf(), 0.0)[..., None]).exp()
    total = weights.amax(3) if peak else weights.sum(3)
    return slots.segments.to_layout(total / divisor.view(-1, 1, 1, 1), slots.keys, index, inside)
