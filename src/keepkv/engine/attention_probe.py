"""Attention modules of a model, run by themselves on made-up tokens."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from keepkv.engine.devices import compute_device


def text_part(model: Any) -> tuple[Any, nn.Module]:
    """The configuration of the text model in ``model``, and its decoder."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    getter = getattr(model, "get_decoder", None)
    decoder = getter() if getter is not None else model
    return config, decoder if isinstance(decoder, nn.Module) else model


def attention_layers(decoder: nn.Module) -> Iterator[tuple[int, nn.Module]]:
    """Modules that write to a cache under a layer index; the first of each index is the self-attention."""
    seen = set()
    for module in decoder.modules():
        index = getattr(module, "layer_idx", None)
        inner = any(isinstance(getattr(m, "layer_idx", None), int) for m in module.modules() if m is not module)
        if isinstance(index, int) and index not in seen and not inner:
            seen.add(index)
            yield index, module


def rotary_modules(decoder: nn.Module) -> list[nn.Module]:
    """Modules that hold frequencies of a rotary embedding."""
    return [m for m in decoder.modules() if any(name.endswith("inv_freq") for name, _ in _own_tensors(m))]


def own_rotaries(layer: nn.Module, rotaries: list[nn.Module]) -> list[nn.Module]:
    """Those of ``rotaries`` that ``layer`` may use: its own, or all where it has none."""
    return [m for m in layer.modules() if m in rotaries] or rotaries


def kind_of_layer(config: Any, index: int, rotary: nn.Module) -> tuple[str | None, bool]:
    """The kind of layer ``index``, such as "full_attention", and whether ``rotary`` turns it in a way of its own."""
    kinds = getattr(config, "layer_types", None) or []
    kind = kinds[index] if index < len(kinds) else None
    return kind, kind is not None and hasattr(rotary, f"{kind}_inv_freq")


def computed_in(model: Any, layer: nn.Module) -> torch.dtype:
    """The dtype that ``layer`` takes tokens in: that of its weights, or of ``model`` where these are codes (of 8 bits
    or fewer) or out of reach."""
    weight = next((p.dtype for p in layer.parameters() if p.dim() == 2), None)
    return weight if weight is not None and is_plain(weight) else model.dtype


def is_plain(dtype: torch.dtype) -> bool:
    """Whether a weight of ``dtype`` is multiplied as it is: one of 8 bits stands for something by a scale beside it."""
    return dtype.is_floating_point and dtype.itemsize > 1


@torch.no_grad()
def run_attention(
    model: Any,
    layer: nn.Module,
    cache: Any,
    positions: Tensor,
    rotary: nn.Module | None,
    kind: str | None,
    mask: Any = None,
) -> Any:
    """What the module ``layer`` returns for three fixed tokens at ``positions`` (3[,A]), written to a ``cache``.

    rotary: the module that turns its keys, if there is one; kind: of layer, where it asks for that.
    """
    dtype = computed_in(model, layer)
    size = model.config.get_text_config(decoder=True).hidden_size
    device = compute_device(layer)
    tokens = torch.arange(3 * size, device=device).float().mul(1.7).sin().view(1, 3, size).to(dtype)
    ids = positions.reshape(3, -1).mT[:, None].to(device)  # (A,1,3)
    turned = None if rotary is None else _turned(rotary, tokens, ids if positions.dim() > 1 else ids[0], kind)
    given = {
        "position_embeddings": turned,
        "position_ids": ids[0],
        "attention_mask": mask,
        **dict.fromkeys(("cache", "past_key_values", "layer_past"), cache),  # whichever it takes
        "shared_kv_states": {},
        "use_cache": True,
    }
    known = inspect.signature(layer.forward).parameters
    return layer(tokens, **{name: value for name, value in given.items() if name in known})


def _turned(rotary: nn.Module, tokens: Tensor, ids: Tensor, kind: str | None) -> Any:
    """What ``rotary`` makes of positions ``ids``; some rewrite their frequencies for the length that they last saw."""
    before = [(x, x.clone()) for name, x in _own_tensors(rotary) if name.endswith("inv_freq")]
    try:
        return rotary(tokens, ids, *([] if kind is None else [kind]))
    finally:
        for held, x in before:
            held.data.copy_(x)


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_buffers(recurse=False)
    yield from module.named_parameters(recurse=False)
