"""Whether a model leaves its cache alone, found by running it on three made-up tokens as far as its first attention."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from keepkv.engine.devices import input_device
from keepkv.engine.handle import KVHandle
from keepkv.engine.kv_form import is_latent
from keepkv.engine.mask_rule import MaskRule, note_cache
from keepkv.engine.versions import CACHE, holds_nothing
from keepkv.errors import UnsupportedInput, UnsupportedModel

MASK = "does not build its attention mask through transformers' mask interface"
STATE = "keeps what it has read in its own modules, or ignores the cache that its forward is given"

_known: WeakKeyDictionary[nn.Module, frozenset[type]] = WeakKeyDictionary()


class _Reached(Exception):
    """Ends a forward where the attention function was handed what the cache had returned, untouched."""


class _Probe(DynamicCache):
    """A cache that keeps nothing: it returns handles of keys and values, and leads them to itself."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(config=model.config.get_text_config(decoder=True))
        self.latent = any(is_latent(module) for module in model.modules())
        self.asked_for_mask = False
        self.updated: int | None = None  # the first layer that was

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        note_cache(self, layer_idx)
        sizes: tuple[int, int] = super().get_mask_sizes(query_length, layer_idx)
        return sizes

    def begin_step(self, rule: MaskRule, layer_idx: int) -> None:
        self.asked_for_mask = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        index: Any = args[0] if args else kwargs.get("layer_idx", 0)
        self.updated = index if self.updated is None else self.updated
        if self.latent:
            raise _Reached  # the model expands what it gets back; that is seen by ``LatentForm``
        length = key_states.shape[2]
        return KVHandle(self, key_states, length), KVHandle(self, value_states, length)

    def state_is_elsewhere(self) -> bool:
        """Whether the forward passed layers that should have left something here, recurrent ones say, and did not."""
        passed = [x for x in self.layers[: self.updated or 0] if not holds_nothing(x)]
        recurrent = [x for x in passed if not isinstance(x, CacheLayerMixin)]
        if any(getattr(x, "is_sliding", False) for x in passed):
            return True
        return bool(recurrent) and not any(_holds_tensor(x) for x in recurrent)

    def check_input(self, kwargs: dict[str, Any]) -> None:
        """What an attention layer passes besides is looked at in real forwards."""

    def attend(self, *args: Any, **kwargs: Any) -> Tensor:
        raise _Reached


def check_forward(model: PreTrainedModel, kinds: frozenset[type]) -> None:
    """Refuse a model that would not use a cache as keepkv does: with ``UnsupportedModel``, the reason and the remedy.

    kinds: classes of its attention modules; a model is looked at again only if these change. Costs the embedding of
    three tokens and the projections of one layer, after layers without attention if these come first. A model that
    cannot be run on tokens alone is let through: its first real forward shows.
    """
    if _known.get(model) == kinds:
        return
    name = type(model).__name__
    supports = getattr(model, "_supports_default_dynamic_cache", None)
    if supports is not None and not supports():
        raise UnsupportedModel(
            f"{name} keeps its past in a cache class of its own. Use transformers' own cache with it."
        )
    before = [(module, dict(module.__dict__)) for module in model.modules()]
    try:
        reason = _fault(model)
    finally:
        for module, attributes in before:  # a model with state of its own may be in the midst of a text
            module.__dict__.update(attributes)
    if reason is not None:
        raise UnsupportedModel(f"{name} {reason}, so it cannot be compressed. Use transformers' own cache with it.")
    _known[model] = kinds


@torch.no_grad()
def _fault(model: PreTrainedModel) -> str | None:
    """Why ``model`` cannot be served, or None."""
    probe = _Probe(model)
    tokens = torch.arange(1, 4, device=input_device(model))[None]
    try:
        model(input_ids=tokens, use_cache=True, **{CACHE: probe})
    except _Reached:
        if not probe.asked_for_mask:
            return MASK
        return STATE if probe.state_is_elsewhere() else None
    except UnsupportedInput:
        return MASK
    except UnsupportedModel as error:
        what = str(error).split(" of a keepkv")[0]
        return f"uses the cached keys or values outside the attention function ({what})"
    except Exception:  # it needs more than tokens
        return "fails on what a cache that compresses returns instead of keys" if probe.updated is not None else None
    return STATE


def _holds_tensor(layer: Any) -> bool:
    values = list(vars(layer).values())
    lists = [x for some in values if isinstance(some, (list, tuple)) for x in some]
    dicts = [x for some in values if isinstance(some, dict) for x in some.values()]
    return any(isinstance(x, Tensor) for x in (*values, *lists, *dicts))
