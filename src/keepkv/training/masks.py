"""Attention over a whole text in which each query sees what it saw while the cache compressed: one layer at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torch.nn.functional import pad
from transformers.integrations.flex_attention import flex_attention_forward

from keepkv.core.slots import EMPTY
from keepkv.engine.stock import plain_attention
from keepkv.training.record import NEVER


def positions_of(padding: Tensor | None, rows: int, length: int, device: torch.device) -> Tensor:
    """(B,T) int64: which token of its row each column is, ``EMPTY`` for padding; padding (B,T) bool, false there."""
    if padding is None:
        return torch.arange(length, device=device).expand(rows, length)
    real = padding.to(device)
    return (real.cumsum(-1) - 1).masked_fill(~real, EMPTY)


def by_column(evict_at: Tensor, positions: Tensor) -> Tensor:
    """``evict_at`` (B,H,S) of tokens, for the columns at ``positions`` (B,T): (B,H,T); ``EMPTY`` for padding, which
    nobody sees, ``NEVER`` behind the record."""
    index = positions[:, None].clamp(0, evict_at.shape[-1]).expand(-1, evict_at.shape[1], -1)
    found = pad(evict_at, (0, 1), value=NEVER).gather(-1, index)
    return found.masked_fill(positions[:, None] < 0, EMPTY)


def visible(evict_at: Tensor, positions: Tensor, block: Tensor) -> Tensor:
    """(B,H,T,T) bool: which queries of each KV head see which columns.

    evict_at (B,H,T), from ``by_column``; positions (B,T); block (B|1,1,T,T) bool: what the model's own mask shows,
    causality, padding and whatever else. Padding sees itself: a softmax over nothing is not a number.
    """
    seen = block & (positions[:, None, :, None] < evict_at[:, :, None])
    return seen | torch.eye(seen.shape[-1], dtype=torch.bool, device=seen.device)


def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, shown: Tensor, **kwargs: Any) -> Tensor:
    """Output (B,T,Hq,Dv) under ``shown`` (B,H,T,T) bool, which the query heads of a KV head share."""
    groups = query.shape[1] // shown.shape[1]
    return plain_attention(module, query, key, value, shown.repeat_interleave(groups, dim=1), **kwargs)


def flex(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, evict_at: Tensor, positions: Tensor, shown: Any,
    **kwargs: Any,
) -> Tensor:  # fmt: skip
    """The same by FlexAttention, without any dense mask: evict_at (B,H,T), positions (B,T), and ``shown``, the model's
    own mask as transformers writes it, a function of row, head, query and key."""
    out: Tensor = flex_attention_forward(
        module, query, key, value, block_mask(evict_at, positions, shown, query.shape[1]), **kwargs
    )[0]
    return out


def block_mask(evict_at: Tensor, positions: Tensor, shown: Any, query_heads: int) -> BlockMask:
    """What ``visible`` says, as FlexAttention takes it; see ``flex``."""
    (rows, _, length), groups = evict_at.shape, query_heads // evict_at.shape[1]

    def see(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        kept: Tensor = (positions[b, q] < evict_at[b, h // groups, k]) & shown(b, h, q, k)
        return kept | (q == k)

    on_gpu = evict_at.is_cuda  # compiled, it makes no (T,T) mask on the way
    return create_block_mask(see, rows, query_heads, length, length, device=str(evict_at.device), _compile=on_gpu)
