"""What codecs do to the next-token distributions of a model, without a store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from keepkv.engine.versions import CACHE
from keepkv.metrics.difference import kl
from keepkv.store.codec import Codec

PLACES = 32  # of a text, evenly spread, whose next token is looked at


class Rounded(DynamicLayer):
    """A layer that hands on keys and values as its codec reads them back, the newest too, and holds nothing."""

    def __init__(self, codec: Codec) -> None:
        super().__init__()
        self.codec = codec

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return self.codec.decode(self.codec.encode(key_states, value_states))


def rounded(model: PreTrainedModel, codecs: Mapping[int, Codec]) -> DynamicCache:
    """A cache for one forward of ``model`` that writes and reads by these ``codecs``, by layer; others as they are."""
    cache = DynamicCache(config=model.config)
    for index, codec in codecs.items():
        cache.layers[index] = Rounded(codec)
    return cache


class Divergence:
    """KL(full ‖ written by codecs) of what follows texts, in nats, mean over places of each.

    texts: token ids (1,T) each, without padding, read in one forward. Logits of the full cache are kept.
    """

    def __init__(self, model: PreTrainedModel, texts: Sequence[Tensor]) -> None:
        self.model, self.texts = model, texts
        self.full = [self._logits(ids, {}) for ids in texts]

    def of(self, text: int, codecs: Mapping[int, Codec]) -> float:
        """For the ``text``-th of them, with these ``codecs`` by layer of the model, others as they are."""
        return kl(self.full[text], self._logits(self.texts[text], codecs)).mean().item()

    @torch.no_grad()
    def _logits(self, ids: Tensor, codecs: Mapping[int, Codec]) -> Tensor:
        """(P,V)"""
        places = torch.arange(ids.shape[1] - 1, -1, -max(1, ids.shape[1] // PLACES), device=ids.device)
        given: dict[str, Any] = {CACHE: rounded(self.model, codecs), "use_cache": True, "logits_to_keep": places}
        found: Tensor = self.model(input_ids=ids, **given).logits[0]
        return found
