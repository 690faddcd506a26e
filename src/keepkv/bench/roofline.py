"""The floor: bytes that every implementation must read for a decoded token, and how long memory takes for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from keepkv.errors import UnsupportedModel


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


def seconds(weights: float, slots: float, votes: float, bandwidth: float) -> float:
    """The least a decoded token can take: bytes over bytes per second."""
    return (weights + slots + votes) / bandwidth
