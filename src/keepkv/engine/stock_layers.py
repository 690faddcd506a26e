"""Layers that transformers keeps, beside those that are compressed: what they hold, and nothing more."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from keepkv.store.base import allocated, tensors_in


def free_past(layer: Any) -> None:
    """Give keys and values of ``layer`` memory of their own: a layer with a sliding window keeps the newest tokens as a
    view into all that it was fed."""
    for name in ("keys", "values"):
        x = getattr(layer, name, None)
        if isinstance(x, Tensor) and x.untyped_storage().nbytes() > x.nbytes:
            setattr(layer, name, x.clone(memory_format=torch.contiguous_format))


def stock_bytes(layers: Sequence[Any], plain: int, rows: int) -> int:
    """Bytes that ``layers`` take once their windows are full, for so many rows.

    A layer that holds nothing yet is taken to be like one of its kind that does. Where there is none, a token in a
    window takes ``plain`` bytes, and what has no window takes nothing.
    """
    held = {id(layer): allocated(tensors_in(layer)) for layer in layers}
    filled = {type(layer): layer for layer in layers if _tokens(layer) or (held[id(layer)] and not _window(layer))}
    total = 0
    for layer in layers:
        like, window = filled.get(type(layer)), _window(layer)
        if like is None:
            total += plain * window * rows
        elif window:
            total += max(held[id(layer)], (like.keys.nbytes + like.values.nbytes) // _tokens(like) * window)
        else:
            total += held[id(layer)] or held[id(like)]
    return total


def _window(layer: Any) -> int:
    """Tokens that a layer with a sliding window may hold, 0 for another."""
    if not getattr(layer, "is_sliding", False):
        return 0
    return int(getattr(layer, "sliding_window", 0) or layer.max_cache_len)


def _tokens(layer: Any) -> int:
    """Columns that a layer with a sliding window holds now."""
    keys = getattr(layer, "keys", None)
    return keys.shape[2] if _window(layer) and isinstance(keys, Tensor) and keys.dim() == 4 else 0
