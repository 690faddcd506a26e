"""What tells one model from another, weights included."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

# What a cache's tensors follow from, as far as every model has it.
SHAPE = (
    "model_type", "num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "vocab_size",
)  # fmt: skip
# Settings of a text model that change what its keys and queries are, as far as a model has them.
SETTINGS = (
    "head_dim", "layer_types", "sliding_window", "rope_parameters", "partial_rotary_factor", "rotary_pct",
    "no_rope_layers", "attention_bias", "use_qk_norm", "query_pre_attn_scalar", "attention_multiplier",
    "attn_logit_softcapping", "kv_lora_rank", "q_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim",
    "num_kv_shared_layers",
)  # fmt: skip
SLICES, WIDTH = 4, 16  # read of each weight: slices, evenly spread, and elements of a slice


def shape(model: PreTrainedModel) -> dict[str, Any]:
    """What must agree for keys and values of one model to make sense in another: its shape, not its weights."""
    return _shape(model.config.get_text_config(decoder=True)) | {"dtype": str(model.dtype)}


def _shape(config: Any) -> dict[str, Any]:
    return {name: getattr(config, name, None) for name in SHAPE}


def facts_of(config: Any) -> dict[str, Any]:
    """The part of a ``fingerprint`` that the configuration of a text model alone says."""
    facts = _shape(config) | {name: value for name in SETTINGS if (value := getattr(config, name, None)) is not None}
    plain: dict[str, Any] = json.loads(json.dumps(facts, default=str))  # as it comes back from a file
    return plain


def fingerprint(model: PreTrainedModel) -> dict[str, Any]:
    """Facts of ``model``, plain data: equal for the same model, different for any other that matters to its keys.

    Shape, rotary embedding and attention settings of the text model; ``adapters``: names of the active ones;
    ``weights``: SHA-256 of a few slices of every weight of the decoder, None where some cannot be read, and then
    ``unread`` says why; ``name``: where the model was loaded from, which identifies nothing. Slices are rounded to
    bfloat16 and the dtype is left out, so that a model is the same in whatever precision it is loaded.
    """
    config: Any = model.config.get_text_config(decoder=True)
    decoder = decoder_of(model)
    return {
        **facts_of(config),
        "name": model.config._name_or_path,
        "adapters": adapters_of(decoder),
        **weights_of(decoder),
    }


def decoder_of(model: PreTrainedModel) -> nn.Module:
    """The part of ``model`` that makes keys and values."""
    getter = getattr(model, "get_decoder", None)
    decoder: nn.Module = getter() if getter is not None else model
    return decoder


def adapters_of(decoder: nn.Module) -> list[str]:
    """Names of the adapters that PEFT has active in ``decoder``; it marks the modules that it wraps."""
    found: set[str] = set()
    for module in decoder.modules():
        names = getattr(module, "active_adapters", None)
        if isinstance(names, (list, tuple)) and getattr(module, "disable_adapters", False) is not True:
            found.update(names)
    return sorted(found)


def weights_of(decoder: nn.Module) -> dict[str, str | None]:
    """``weights`` and, where they cannot be read, ``unread``; see ``fingerprint``. Takes milliseconds."""
    sha = hashlib.sha256()
    for name, weight in decoder.named_parameters():
        if weight.device.type == "meta":
            return {"weights": None, "unread": f"{name} is not in memory (offloaded, or on the meta device)"}
        flat = weight.detach().reshape(-1)
        apart = max(1, len(flat) // SLICES)
        part = flat[: SLICES * apart].reshape(-1, apart)[:, :WIDTH]
        part = part.to(torch.bfloat16) if part.is_floating_point() else part
        sha.update(f"{name}{tuple(weight.shape)}".encode())
        sha.update(part.contiguous().view(torch.uint8).cpu().numpy().tobytes())
    return {"weights": sha.hexdigest()}
