"""Switch a model to the "keepkv" attention, and refuse models that a compressed cache cannot serve."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, DynamicCache, DynamicIndexedLayer, DynamicLayer, StaticCache

from keepkv.core.layer_info import LayerInfo
from keepkv.core.rope import Rope
from keepkv.engine.busy import unwatch, watch
from keepkv.engine.devices import compute_device
from keepkv.engine.forward_probe import check_forward
from keepkv.engine.guard import guard, unguard
from keepkv.engine.hidden import follow_hidden, unfollow_hidden
from keepkv.engine.interface import NAME
from keepkv.engine.kv_form import KVForm, form_of
from keepkv.engine.offsets import follow_offsets, unfollow_offsets
from keepkv.engine.output_probe import UnknownOutput, projection_of
from keepkv.engine.places import follow_places, unfollow_places
from keepkv.engine.rope_probe import UnknownRope, rope_of
from keepkv.engine.versions import warn_if_untested
from keepkv.errors import UnsupportedModel
from keepkv.methods.base import Method

BEFORE = "keepkv_before"  # attribute of a model on "keepkv": the implementation that it had


@dataclass(frozen=True)
class PreparedModel:
    """A model as the cache needs it: transformers' cache layers, and by index those that ours take over."""

    stock: list[Any]
    ours: dict[int, tuple[LayerInfo, KVForm]]


def inner_model(model: Any) -> PreTrainedModel:
    """The model of transformers in ``model``, which may be wrapped by PEFT or ``torch.compile``.

    Raises ``UnsupportedModel`` where there is none, or where the wrapper does not leave its cache alone.
    """
    inner = getattr(model, "_orig_mod", model)  # torch.compile
    if callable(getattr(inner, "get_base_model", None)):  # PEFT
        kind = str(getattr(getattr(inner, "active_peft_config", None), "peft_type", "")).split(".")[-1]
        if kind in ("PREFIX_TUNING", "CARTRIDGE"):
            raise UnsupportedModel(
                f"{type(model).__name__}: {kind} puts its trained keys and values into a cache of its own and ignores "
                "the one that it is given. Use transformers' DynamicCache with it."
            )
        inner = inner.get_base_model()
    if isinstance(inner, PreTrainedModel):
        return inner
    if isinstance(model, str):
        raise UnsupportedModel(
            f"{model!r} is the name of a model. Give the model itself: AutoModelForCausalLM.from_pretrained({model!r})."
        )
    remedy = "Give the model inside: model.module" if isinstance(getattr(model, "module", None), nn.Module) else (
        "Give a model that AutoModelForCausalLM.from_pretrained returns"
    )  # fmt: skip
    raise UnsupportedModel(f"{type(model).__name__} is no PreTrainedModel of transformers. {remedy}.")


def prepare_model(
    model: PreTrainedModel, method: Method, static_length: int | None = None, unrotated: str | None = None
) -> PreparedModel:
    """Switch the text part of ``model`` to "keepkv" and describe its layers.

    static_length: build the layers that stay stock for compiled decode, for so many tokens. unrotated: name of a codec
    that writes keys as they are before the rotary embedding. Raises
    ``UnsupportedModel`` with the reason and the remedy; the model is then left as it was.
    """
    warn_if_untested()
    name, config = type(model).__name__, model.config.get_text_config(decoder=True)
    if model.config.is_encoder_decoder:
        raise UnsupportedModel(
            f"{name} is an encoder-decoder; keepkv serves decoder-only models. Use transformers' own cache with it."
        )
    try:
        layers = DynamicCache(config=config).layers
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise UnsupportedModel(
            f"{name}: transformers makes no cache of its {type(config).__name__} ({error}), so it has no keys and "
            "values that keepkv could find. Give the language model inside, or leave it as it is."
        ) from error
    if any(isinstance(layer, DynamicIndexedLayer) for layer in layers):
        raise UnsupportedModel(
            f"{name} selects past tokens with its own index over every token (sparse attention); dropping tokens would "
            "break that index. Use transformers' DynamicCache with it."
        )
    if not any(isinstance(layer, CacheLayerMixin) for layer in layers):
        raise UnsupportedModel(
            f"{name}: every layer has a recurrent state of fixed size, so there is nothing to compress. Use "
            "transformers' own cache with it."
        )
    previous = set_attention(model, NAME)
    try:
        indices = [i for i, layer in enumerate(layers) if type(layer) is DynamicLayer]
        modules = _interfaced(model, indices)
        _check_devices(name, [modules[i] for i in indices])
        check_forward(model, frozenset(type(modules[i]) for i in indices))
        ours = _ours(model, modules, indices, method, unrotated)
        if method.score.needs_hidden:
            follow_hidden(modules[i] for i in ours)
    except UnsupportedModel:
        set_attention(model, previous)
        raise
    _warn_of_what_stays(name, layers, ours)
    if (processes := getattr(model, "_tp_size", None) or 1) > 1:
        warnings.warn(
            f"{name} is split over {processes} processes, and each compresses its own heads: budgets in bytes and "
            "receipts are those of one process, and methods that compare heads with each other (such as 'adakv', "
            "'tova' or 'keepkv2') choose among the heads of one process.",
            stacklevel=3,
        )
    if static_length is not None:
        layers = StaticCache(config=config, max_cache_len=static_length).layers
    return PreparedModel(layers, ours)


def _check_devices(name: str, modules: list[nn.Module]) -> None:
    devices = sorted({str(compute_device(module)) for module in modules})
    if len(devices) > 1:
        raise UnsupportedModel(
            f"{name} computes on several devices ({', '.join(devices)}), and the layers of a keepkv cache share what "
            "they know of its rows. Load it on one device, what does not fit with device_map to 'cpu' or 'disk', or "
            "split each layer over processes (tp_plan='auto')."
        )


def _warn_of_what_stays(name: str, layers: list[Any], ours: Mapping[int, Any]) -> None:
    """Warn of layers that could be thought compressed and are not."""
    beside = [i for i, x in enumerate(layers) if isinstance(x, DynamicLayer) and hasattr(x, "update_recurrent_state")]
    full = [i for i in beside if not layers[i].is_sliding]
    if full:
        warnings.warn(
            f"{name}: layers {full} have full attention beside a recurrent state in one layer, which keepkv does not "
            "compress: they keep every token, as in transformers' own cache.",
            stacklevel=4,
        )
    elif not ours:
        warnings.warn(
            f"{name}: every layer has a sliding window, a recurrent state or no cache, so there is nothing to "
            "compress; the cache behaves like transformers' own.",
            stacklevel=4,
        )


def set_attention(model: PreTrainedModel, implementation: str) -> str:
    """Set the attention implementation of the text part only; returns the previous one.

    On "keepkv" the model also keeps to the cache that it is given, see ``engine.guard`` and ``engine.offsets``, and
    it remembers the previous one.
    """
    config = model.config.get_text_config(decoder=True)
    previous: str = config._attn_implementation
    key = next((k for k in model.config.sub_configs if getattr(model.config, k, None) is config), None)
    model.set_attn_implementation(implementation if config is model.config or key is None else {key: implementation})
    if implementation == NAME:
        guard(model)
        follow_offsets(model)
        follow_places(model)
        watch(model)
        if previous != NAME:
            setattr(model, BEFORE, previous)
    else:
        unguard(model)
        unfollow_offsets(model)
        unfollow_places(model)
        unfollow_hidden(model)
        unwatch(model)
        model.__dict__.pop(BEFORE, None)
    return previous


def _interfaced(model: PreTrainedModel, indices: list[int]) -> dict[int, nn.Module]:
    """The attention modules of the layers ``indices``, all of which must go through the interface."""
    modules = attention_modules(model)
    missing = [i for i in indices if i not in modules]
    if missing:
        raise UnsupportedModel(
            f"{type(model).__name__}: layers {missing} do not use transformers' attention interface, so their cache "
            "cannot be compressed. Use transformers' DynamicCache with it, or a model class that supports "
            "set_attn_implementation."
        )
    crossed = [i for i in indices if "cross" in type(modules[i]).__name__.lower()]
    if crossed:
        raise UnsupportedModel(
            f"{type(model).__name__}: layers {crossed} attend to what an image encoder gives and not to the text. Use "
            "transformers' DynamicCache with it."
        )
    return modules


def _ours(
    model: PreTrainedModel, modules: dict[int, nn.Module], indices: list[int], method: Method, unrotated: str | None
) -> dict[int, tuple[LayerInfo, KVForm]]:
    ropes = rope_of(model) if method.score.needs_rope or unrotated is not None else {}
    found = {}
    for rank, i in enumerate(indices):
        rope: Rope | UnknownRope | None = ropes.get(i)
        if isinstance(rope, UnknownRope) and not method.score.needs_rope:
            raise UnsupportedModel(
                f"codec {unrotated!r} must undo the rotary embedding of {type(model).__name__}: {rope.reason}. "
                "Choose a codec that does not, such as 'int4' or 'hadamard'."
            )
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
        output = projection_of(model, modules[i], i) if method.score.needs_output else None
        if isinstance(output, UnknownOutput):
            raise UnsupportedModel(
                f"method {method.name!r} looks at the output projection of attention, which is not known of layer {i} "
                f"of {type(model).__name__}: {output.reason}. Choose a method that does not, such as 'snapkv'."
            )
        found[i] = LayerInfo(i, rank, len(indices), rope, is_shared, output), form
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
