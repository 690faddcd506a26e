"""Kind "query-statistics": what queries of a model are like, for expected attention (arXiv 2510.00636)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from keepkv.calibrate.base import Tensors, register_kind
from keepkv.core.slots import LayerView
from keepkv.engine.cache import Cache
from keepkv.engine.passes.reread import feed
from keepkv.errors import CalibrationError
from keepkv.methods import Method
from keepkv.observe.gaussian import KIND, NAMES, STORED, pooled, remember_queries
from keepkv.score.base import Score

SINKS = 4  # first tokens of each text that are left out: their queries are like no other


@dataclass(frozen=True)
class Watch(Score):
    """Remembers moments of the queries before RoPE, in float64 where the device has it; scores nothing."""

    needs_rope: ClassVar[bool] = True
    observes: ClassVar[bool] = True

    def observe(self, view: LayerView) -> None:
        wide = torch.float32 if view.queries.device.type == "mps" else torch.float64
        remember_queries(view, SINKS, True, wide)


@register_kind(KIND)
@torch.no_grad()
def query_statistics(model: PreTrainedModel, batches: Iterable[Tensor]) -> Tensors:
    """Count N (), mean (H*G,D) and covariance Σ (H*G,D,D) of the queries before RoPE, per layer, float32.

    Taken over every token of the texts but the first four of each. Σ divides by N. Only layers that a cache compresses
    have entries. Raises ``UnsupportedModel`` where a layer's rotary embedding cannot be undone.
    """
    cache = Cache(model, Method(Watch()), 1.0).copy(observing=True)
    held: dict[int, tuple[Tensor, ...]] = {}
    for ids in batches:
        cache.reset()
        feed(model, cache, ids, ids.new_ones(len(ids), 0))
        for layer in cache.compressible:
            rows, before = tuple(layer.score_state[name] for name in NAMES), held.get(layer.info.index)
            if before is not None:
                rows = tuple(map(torch.cat, zip(before, rows, strict=True)))
            held[layer.info.index] = pooled(rows)
    made: Tensors = {}
    for index, (count, mean, spread) in held.items():
        if not count:
            raise CalibrationError(f"no text is longer than the {SINKS} tokens that are left out: give longer texts")
        found = (count[0], mean[0], spread[0] / count)
        made[index] = {name: x.float().cpu() for name, x in zip(STORED, found, strict=True)}
    return made
