"""What keepkv would do with a model, said without a prompt: ``keepkv.check(model)``."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import transformers
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from keepkv.engine.model import prepare_model, set_attention
from keepkv.engine.shrink import shrink
from keepkv.engine.versions import CACHE, holds_nothing
from keepkv.errors import UnsupportedModel
from keepkv.methods import make_method, methods

_WRITTEN = 4  # numbers of layers that are written out before the rest is counted


@dataclass(frozen=True)
class LayerCheck:
    """One layer of a model.

    kind: what it caches, in words. compressed: whether keepkv takes it over; else transformers keeps it.
    heads, dim: KV heads and the size of a key; None where there are none, or where they could not be seen.
    """

    index: int
    kind: str
    compressed: bool
    heads: int | None = None
    dim: int | None = None

    def __str__(self) -> str:
        shape = "" if self.heads is None else f", {self.heads} KV head{'s' * (self.heads > 1)} × {self.dim}"
        return f"{self.kind}{shape}: {'compressed' if self.compressed else 'as transformers keeps it'}"


@dataclass(frozen=True)
class ModelCheck:
    """What keepkv does with a model, from ``keepkv.check``; prints as a table.

    model: its class. refused: why no method serves it, or None. layers: in order; empty where the model is refused.
    refused_methods: why, by the name of each method that does not serve it. notes: what a cache would warn of.
    """

    model: str
    refused: str | None = None
    layers: tuple[LayerCheck, ...] = ()
    refused_methods: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data."""
        return asdict(self)

    def rows(self) -> list[tuple[str, str]]:
        """Label and value of each line of the printed table."""
        if self.refused is not None:
            return [("model", self.model), ("refused", self.refused)]
        alike: dict[str, list[int]] = {}
        for layer in self.layers:
            alike.setdefault(str(layer), []).append(layer.index)
        reasons: dict[str, list[str]] = {}
        for name, reason in self.refused_methods.items():
            reasons.setdefault(reason, []).append(name)
        return [
            ("model", self.model),
            *((_numbers(indices, len(self.layers)), text) for text, indices in alike.items()),
            *(("refused methods", f"{', '.join(names)}: {reason}") for reason, names in reasons.items()),
            *(("note", text) for text in self.notes),
        ]

    def __str__(self) -> str:
        rows = self.rows()
        width = max(len(label) for label, _ in rows)
        return "\n".join(f"{label:<{width}}  {value}" for label, value in rows)


def check(model: PreTrainedModel | PreTrainedConfig) -> ModelCheck:
    """Which layers of ``model`` are compressed, which stay as transformers keeps them, or why it is refused.

    model: a model, which is left as it was; or its configuration: a small model of the same class and layers, with
    random weights, is then asked in its place, and no weight is read.
    """
    config = model if isinstance(model, PreTrainedConfig) else model.config
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            asked = model_of(shrink(config)) if isinstance(model, PreTrainedConfig) else model
        except UnsupportedModel as error:
            return ModelCheck(type(config).__name__, str(error))
        shapes = dict(_shapes(config))
    compressed, reasons, notes = _prepare(asked)
    every = {info.name: reasons.get(_needs(info.name)) for info in methods()}
    refused = {name: reason for name, reason in every.items() if reason is not None}
    name = type(asked).__name__
    if refused.keys() == every.keys():
        return ModelCheck(name, refused["full"])
    layers = DynamicCache(config=config.get_text_config(decoder=True)).layers
    checked = (LayerCheck(i, kind_of(x), i in compressed, *shapes.get(i, ())) for i, x in enumerate(layers))
    return ModelCheck(name, None, tuple(checked), refused, notes)


def kind_of(layer: Any) -> str:
    """What a cache layer of transformers holds, in words."""
    if holds_nothing(layer):
        return "no cache of its own"
    recurrent = hasattr(layer, "update_recurrent_state")
    if not isinstance(layer, DynamicLayer):
        return "recurrent state" if recurrent else type(layer).__name__
    if not recurrent and type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
        return type(layer).__name__
    attention = "sliding window" if layer.is_sliding else "full attention"
    return f"{attention} beside a recurrent state" if recurrent else attention


def _needs(method: str) -> tuple[bool, ...]:
    """What decides whether a model is served by ``method``: whether rotations are undone, the output projection is
    looked at, and slots merge."""
    made = make_method(method, {})
    return made.score.needs_rope, made.score.needs_output, made.reduce.merges


def _prepare(model: PreTrainedModel) -> tuple[set[int], dict[tuple[bool, ...], str], tuple[str, ...]]:
    """Indices of the layers that are compressed, reasons of refusals by what a method needs, and warnings."""
    by_need = {_needs(info.name): info.name for info in reversed(methods())}
    before = model.config.get_text_config(decoder=True)._attn_implementation
    compressed: set[int] = set()
    reasons: dict[tuple[bool, ...], str] = {}
    notes: dict[str, None] = {}
    for need, name in by_need.items():
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            try:
                compressed |= prepare_model(model, make_method(name, {})).ours.keys()
                set_attention(model, before)
            except UnsupportedModel as error:
                reasons[need] = str(error).replace(f"method {name!r}", "it")
        notes |= {str(one.message): None for one in said}
    return compressed, reasons, tuple(notes)


def model_of(config: PreTrainedConfig) -> PreTrainedModel:
    """A model of a copy of ``config`` with random weights, in evaluation mode: of the class that the configuration
    names, or that transformers makes of it. A copy, for a model writes into its configuration which attention it is on,
    and another may live with this one."""
    mappings = (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
        MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    )
    mapped = next((names[config.model_type] for names in mappings if config.model_type in names), None)
    names = [
        name for name in (*(config.architectures or ()), mapped) if name is not None and hasattr(transformers, name)
    ]
    if not names:
        raise UnsupportedModel(
            f"{type(config).__name__} is no configuration of a model of transformers that generates text. Give one "
            "that AutoModelForCausalLM.from_config takes."
        )
    kind = getattr(transformers, names[0])
    if not isinstance(config, kind.config_class):  # it is of more than the text, and the class of the text alone
        config = config.get_text_config(decoder=True)
    with torch.random.fork_rng(devices=[]):
        made: PreTrainedModel = kind(copy.deepcopy(config)).eval()
    return made


@torch.no_grad()
def _shapes(config: PreTrainedConfig) -> Iterator[tuple[int, tuple[int, int]]]:
    """KV heads and the size of a key by layer, seen in a model without memory that reads three tokens.

    Layers behind one whose code must know numbers, as some with experts do, are left out.
    """
    cache = DynamicCache(config=config.get_text_config(decoder=True))
    ids = torch.ones(1, 3, dtype=torch.long, device="meta")
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        # Whatever a model's own code raises without numbers: what was seen until then is told.
        with suppress(Exception), torch.device("meta"):
            model_of(config)(input_ids=ids, use_cache=True, **{CACHE: cache})
    finally:
        torch.set_default_dtype(before)
    for i, layer in enumerate(cache.layers):
        keys = getattr(layer, "keys", None)
        if keys is not None and keys.dim() == 4:
            yield i, (keys.shape[1], keys.shape[3])


def _numbers(indices: list[int], count: int) -> str:
    """Indices of layers, the first of them written out: "layers 0, 2, 4 … (13)"."""
    if len(indices) == count:
        return f"all {count} layers"
    written = ", ".join(map(str, indices[:_WRITTEN]))
    if len(indices) > _WRITTEN:
        return f"layers {written} … ({len(indices)})"
    return f"layer{'s' * (len(indices) > 1)} {written}"
