"""The floor: bytes that every implementation must read for a decoded token, and how long memory takes for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from keepkv.engine.layer import Layer
from keepkv.errors import UnsupportedModel

CONTENT, VOTES = ("keys", "values"), "log_votes"


def weight_bytes(config: Any, dtype: torch.dtype, batch: int) -> int:
    """Bytes of weights that one forward of ``batch`` tokens reads at least.

    Every parameter once, but of an input embedding that is not also the output's only one row per token, and of a
    mixture of experts as many as one token uses. Built from ``config`` without allocating weights.
    """
    try:
        with torch.device("meta"):
            model: nn.Module = AutoModelForCausalLM.from_config(config)
    except ValueError as error:
        raise UnsupportedModel(
            f"{type(config).__name__} is not the configuration of a causal language model"
        ) from error
    text = config.get_text_config(decoder=True)
    experts = getattr(text, "num_local_experts", None) or getattr(text, "num_experts", None)
    share = getattr(text, "num_experts_per_tok", experts) / experts if experts else 1.0
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings()  # type: ignore[operator]
    total = 0.0
    for name, weight in model.named_parameters():
        if weight is table and (head is None or head.weight is not table):
            total += batch * weight.shape[1]
        else:
            total += weight.numel() * (share if ".experts." in name else 1.0)
    return int(total) * dtype.itemsize


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


def seconds(weights: float, slots: float, votes: float, bandwidth: float) -> float:
    """The least a decoded token can take: bytes over bytes per second."""
    return (weights + slots + votes) / bandwidth
