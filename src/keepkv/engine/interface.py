"""The one integration point with transformers: the attention implementation "keepkv" and its mask function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from keepkv.engine.handle import Attends, KVHandle
from keepkv.engine.kv_form import is_latent
from keepkv.engine.layer import Layer
from keepkv.engine.mask_rule import MaskRule, mask_rule
from keepkv.engine.stock import plain_attention
from keepkv.errors import UnsupportedInput

NAME = "keepkv"


def attention(
    module: torch.nn.Module, query: Tensor, key: Any, value: Any, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    """The registered attention function; gets every attention call of the model, cached or not.

    A handle leads to its layer, which attends over its slots. Plain tensors take the stock path, so a model that
    is left on "keepkv" without a keepkv cache behaves as on "sdpa"; in a replay each layer hides what had left it.
    """
    rule = attention_mask if isinstance(attention_mask, MaskRule) else None
    if isinstance(key, KVHandle):
        return _over_slots(key.layer, module, query, rule, attention_mask, kwargs), None
    if rule is not None and rule.cache is not None and is_latent(module):
        layer = rule.cache.layers[module.layer_idx]  # type: ignore[index]
        if isinstance(layer, Layer):
            return _over_slots(layer, module, query, rule, attention_mask, {**kwargs, "dense": (key, value)}), None
    if rule is not None and rule.replay is not None:
        return rule.replay.attend(module, query, key, value, rule, **kwargs), None
    mask = attention_mask if rule is None else rule.dense()
    return plain_attention(module, query, key, value, mask, **kwargs), None


def _over_slots(
    layer: Attends, module: torch.nn.Module, query: Tensor, rule: MaskRule | None, given: Any, kwargs: dict[str, Any]
) -> Tensor:
    if rule is None:
        raise UnsupportedInput(
            f"attention over a keepkv cache got {type(given).__name__} instead of its own mask rule: 4-D attention "
            "masks are over columns that a compressed cache no longer has. Pass a 2-D attention mask, or none."
        )
    layer.check_input(kwargs)
    return layer.attend(module, query, rule, **kwargs)


# Importing this module is what enters both functions into transformers' registries: whoever switches a model does.
AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, mask_rule)
