"""What of a cache's bytes is slots in use."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from keepkv.engine.layer import Layer

CONTENT, VOTES = ("keys", "values"), "log_votes"


def content(cache: Any) -> tuple[int, int]:
    """Bytes of slots (keys and values, scales included) and of votes that a cache of keepkv or transformers holds.

    Only slots that are in use: not slack, padding, positions or statistics, which attention could do without.
    """
    slots = votes = 0
    for layer in cache.layers:
        if isinstance(layer, Layer):
            mine, biases = store_content(layer.store.tensors())
            slots, votes = slots + mine, votes + biases
        else:
            slots += held(vars(layer))
    return slots, votes


def store_content(tensors: dict[str, Tensor]) -> tuple[int, int]:
    """Bytes of slots and of votes in the tensors of one store. The tensors of a zone ("body.keys") count where its
    positions ("body.positions") are in use, what slots share ("shared.mean") as a whole."""
    slots = votes = 0.0
    for name, x in tensors.items():
        zone, dot, field = name.rpartition(".")
        slots += x.numel() * x.element_size() if zone == "shared" else 0
        if not (field.startswith(CONTENT) or field == VOTES):
            continue
        positions = tensors[f"{zone}{dot}positions"]
        used = x.numel() * x.element_size() * float((positions >= 0).sum()) / max(1, positions.numel())
        slots, votes = (slots, votes + used) if field == VOTES else (slots + used, votes)
    return round(slots), round(votes)


def held(value: Any) -> int:
    """Bytes of the tensors in ``value``; packed ones, which hold tensors themselves, as what they are made of."""
    if isinstance(value, Tensor):
        if hasattr(value, "__tensor_flatten__"):
            return sum(held(getattr(value, name)) for name in value.__tensor_flatten__()[0])
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        return sum(held(one) for one in value.values())
    return sum(held(one) for one in value) if isinstance(value, (tuple, list)) else 0
