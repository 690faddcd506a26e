"""Where a compressed cache still holds the tokens of its first row."""

from __future__ import annotations

from keepkv.cache import Cache
from keepkv.layer import Layer


def survival(cache: Cache, tokens: int) -> tuple[list[list[int]], list[float]]:
    """Slots kept by layer and KV head, and for each of the row's first ``tokens`` tokens the share of (layer, head)
    that still hold it (of a merged slot: its anchor)."""
    kept: list[list[int]] = []
    held = [0] * tokens
    heads = 0
    for layer in cache.layers:
        if isinstance(layer, Layer):
            positions = layer.store.view().positions[0]
            kept.append((positions >= 0).sum(-1).tolist())
            heads += positions.shape[0]
            for position in positions[(positions >= 0) & (positions < tokens)].tolist():
                held[position] += 1
    return kept, [count / heads for count in held]
