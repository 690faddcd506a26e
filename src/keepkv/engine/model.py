"""Switch a model to the "keepkv" attention, and refuse models that a compressed cache cannot serve."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicIndexedLayer, DynamicLayer, StaticCache

from keepkv.core.layer_info import LayerInfo
from keepkv.core.rope import Rope
from keepkv.engine.interface import NAME
from keepkv.engine.kv_form import KVForm, form_of
from keepkv.engine.rope_probe import UnknownRope, rope_of
from keepkv.engine.versions import warn_if_untested
from keepkv.errors import UnsupportedModel
from keepkv.methods.base import Method


@dataclass(frozen=True)
class PreparedModel:
    """A model as the cache needs it: transformers' cache layers, and by index those that ours take over."""

    stock: list[Any]
    ours: dict[int, tuple[LayerInfo, KVForm]]


def prepare_model(model: PreTrainedModel, method: Method, static_length: int | None = None) -> PreparedModel:
    """Switch the text part of ``model`` to "keepkv" and describe its layers.

    static_length: build the layers that stay stock for compiled decode, for so many tokens. Raises
    ``UnsupportedModel`` with the reason and the remedy; the model is then left as it was.
    """
    warn_if_untested()
    config = model.config.get_text_config(decoder=True)
    if model.config.is_encoder_decoder:
        raise UnsupportedModel(
            f"{type(model).__name__} is an encoder-decoder; keepkv serves decoder-only models. "
            "Use transformers' own cache with it."
        )
    layers = DynamicCache(config=config).layers
    if any(isinstance(layer, DynamicIndexedLayer) for layer in layers):
        raise UnsupportedModel(
            f"{type(model).__name__} selects past tokens with its own index over every token (sparse attention); "
            "dropping tokens would break that index. Use transformers' DynamicCache with it."
        )
    previous = set_attention(model, NAME)
    try:
        ours = _ours(model, config, [i for i, layer in enumerate(layers) if type(layer) is DynamicLayer], method)
    except UnsupportedModel:
        set_attention(model, previous)
        raise
    if not ours:
        warnings.warn(
            f"{type(model).__name__}: every layer has a sliding window, a recurrent state or no cache, so there is "
            "nothing to compress; the cache behaves like transformers' own.",
            stacklevel=4,
        )
    if static_length is not None:
        layers = StaticCache(config=config, max_cache_len=static_length).layers
    return PreparedModel(layers, ours)


def set_attention(model: PreTrainedModel, implementation: str) -> str:
    """Set the attention implementation of the text part only; returns the previous one."""
    config = model.config.get_text_config(decoder=True)
    previous: str = config._attn_implementation
    if config is model.config:
        model.set_attn_implementation(implementation)
        return previous
    key = next((k for k in model.config.sub_configs if getattr(model.config, k, None) is config), None)
    model.set_attn_implementation(implementation if key is None else {key: implementation})
    return previous


def _ours(
    model: PreTrainedModel, config: Any, indices: list[int], method: Method
) -> dict[int, tuple[LayerInfo, KVForm]]:
    modules = attention_modules(model)
    missing = [i for i in indices if i not in modules]
    if missing:
        raise UnsupportedModel(
            f"{type(model).__name__}: layers {missing} do not use transformers' attention interface, so their cache "
            "cannot be compressed. Use transformers' DynamicCache with it, or a model class that supports "
            "set_attn_implementation."
        )
    ropes = rope_of(model) if method.score.needs_rope else {}
    found = {}
    for rank, i in enumerate(indices):
        rope: Rope | UnknownRope | None = ropes.get(i)
        if isinstance(rope, UnknownRope):
            raise UnsupportedModel(
                f"method {method.name!r} must undo the rotary embedding of {type(model).__name__}: {rope.reason}. "
                "Choose a method that does not, such as 'snapkv' or 'keydiff'."
            )
        form = form_of(modules[i])
        if form.one_content and method.reduce.merges:
            raise UnsupportedModel(
                f"method {method.name!r} merges keys and values apart, but {type(model).__name__} caches one latent "
                "for both. Choose a method that evicts, such as 'snapkv' or 'expected-attention'."
            )
        # Gemma 3n and 4: later layers attend to the slots of this one.
        is_shared = getattr(modules[i], "store_full_length_kv", False)
        found[i] = LayerInfo(i, rank, len(indices), rope, is_shared), form
    return found


def attention_modules(model: PreTrainedModel) -> dict[int, nn.Module]:
    """Attention modules that go through the interface under "keepkv", by layer index."""
    found: dict[int, nn.Module] = {}
    for module in model.modules():
        index = getattr(module, "layer_idx", None)
        config = getattr(module, "config", None)
        if isinstance(index, int) and getattr(config, "_attn_implementation", None) == NAME:
            if "attention" in type(module).__name__.lower() or index not in found:
                found[index] = module
    return found
