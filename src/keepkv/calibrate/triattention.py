"""Kind "triattention": what queries of a model are like on average, pair by pair of their dims (arXiv 2604.04921)."""

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
from keepkv.methods import Method
from keepkv.observe.gaussian import TILE
from keepkv.score.base import Score
from keepkv.score.decoding.triattention import KIND, LENGTH, MEAN

COUNT = "triattention_count"


@dataclass(frozen=True)
class Watch(Score):
    """Adds up queries before RoPE and the lengths of their pairs, in float64 where the device has it."""

    needs_rope: ClassVar[bool] = True
    observes: ClassVar[bool] = True

    def observe(self, view: LayerView) -> None:
        rope, wide = view.rope, torch.float32 if view.queries.device.type == "mps" else torch.float64
        for queries, positions in zip(view.queries.split(TILE, 2), view.query_positions.split(TILE, 1), strict=True):
            real = (positions >= 0)[:, None, :, None]
            plain = (
                queries.to(wide) if rope is None else rope.unrotate(queries.to(wide), view.places(positions[:, None]))
            )
            lengths = plain[..., :0] if rope is None else rope.magnitudes(plain)
            for name, x in ((COUNT, real.to(wide)), (MEAN, plain * real), (LENGTH, lengths * real)):
                view.state[name] = view.state.get(name, 0) + x.sum(2)


@register_kind(KIND)
@torch.no_grad()
def triattention(model: PreTrainedModel, batches: Iterable[Tensor]) -> Tensors:
    """Mean (H*G,D) of the queries before RoPE, and mean length (H*G,R/2) of each pair that rotates, per layer, float32.

    Over every token of the texts. Only layers that a cache compresses have entries. Raises ``UnsupportedModel`` where a
    layer's rotary embedding cannot be undone.
    """
    cache = Cache(model, Method(Watch()), 1.0).copy(observing=True)
    held: dict[int, dict[str, Tensor]] = {}
    for ids in batches:
        cache.reset()
        feed(model, cache, ids, ids.new_ones(len(ids), 0))
        for layer in cache.compressible:
            sums = held.setdefault(layer.info.index, {})
            for name in (COUNT, MEAN, LENGTH):
                sums[name] = sums.get(name, 0) + layer.score_state[name].sum(0)
    return {
        index: {name: (sums[name] / sums[COUNT]).float().cpu() for name in (MEAN, LENGTH)}
        for index, sums in held.items()
    }
