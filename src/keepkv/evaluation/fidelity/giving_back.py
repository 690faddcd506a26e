"""Giving slots back: a compressed cache in which one layer, or one KV head, holds all that it held before."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from keepkv.core.slots import EMPTY, Slots
from keepkv.engine.cache import Cache
from keepkv.engine.layer import Layer
from keepkv.errors import KeepKVError


def with_layers(small: Cache, whole: Cache, layers: Iterable[int]) -> Cache:
    """A copy of ``small`` whose ``layers`` hold what those of ``whole`` hold; it compresses no more.

    small: compressed from ``whole`` or a copy of it, with nothing read since. Neither is changed. What the slots of a
    layer given back are written in stays: with a codec they are codes.
    """
    twin = small.copy()
    twin.compressing = False
    for index in layers:
        twin.layers[index] = _layer(whole, index).copy(twin.shared)
    return twin


def with_head(small: Cache, whole: Cache, layer: int, head: int) -> Cache:
    """As ``with_layers``, of one KV head of ``layer``; its other heads hold what those of ``small`` hold.

    Raises ``KeepKVError`` as ``check_heads`` does, and where there is no such head.
    """
    check_heads(small, [layer])
    twin = with_layers(small, whole, ())
    mine, every = _layer(twin, layer), _layer(whole, layer).store.view()
    if not 0 <= head < every.shape[1]:
        raise KeepKVError(f"layer {layer} has {every.shape[1]} KV heads, numbered from 0: there is no head {head}")
    slots, store = _as_wide(mine.store.view(), every), mine.store.successor()
    for name in ("keys", "values", "log_votes", "positions"):
        getattr(slots, name)[:, head] = getattr(every, name)[:, head]
    for name, x in slots.stats.items():
        x[:, head] = every.stats[name][:, head]
    store.load(slots)
    mine.store, mine.progress.compressed = store, True
    return twin


def check_heads(cache: Cache, layers: Iterable[int]) -> None:
    """Raise ``KeepKVError`` where heads of ``layers`` cannot be given back alone: with a codec, which would write the
    other heads anew and change them, or where a layer is not compressed."""
    for layer in layers:
        _layer(cache, layer)
        if cache.codec != "none":
            raise KeepKVError(
                f"a head of a cache with codec={cache.codec!r} cannot be given back alone, as the others would be "
                "encoded once more. Give whole layers back, or leave out the codec."
            )


def _layer(cache: Cache, index: int) -> Layer:
    known = {layer.info.index: layer for layer in cache.compressible}
    if index not in known:
        raise KeepKVError(f"layer {index} is not compressed; those of this model are {', '.join(map(str, known))}")
    return known[index]


def _as_wide(few: Slots, every: Slots) -> Slots:
    """A copy of ``few``, as wide as ``every``: with empty slots in front."""
    more = every.shape[2] - few.shape[2]
    empty = every.map(lambda x: x[:, :, :more])
    return empty.with_(positions=empty.positions.new_full(empty.positions.shape, EMPTY)).join(few)


def held(cache: Cache, whole: Cache, layer: int) -> list[float]:
    """Of each KV head of ``layer``, the share of the slots of ``whole`` that ``cache`` holds, mean over rows."""
    some, every = (_layer(one, layer).store.lengths.double() for one in (cache, whole))
    shares: list[Any] = (some / every).mean(0).tolist()
    return shares
