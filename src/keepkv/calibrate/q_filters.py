"""Kind "q-filters": the direction that the queries of each KV head have in common (arXiv 2503.02812)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from keepkv.calibrate.base import Tensors, register_kind
from keepkv.core.slots import LayerView
from keepkv.engine.cache import Cache
from keepkv.engine.passes.reread import feed
from keepkv.errors import CalibrationError
from keepkv.methods import Method
from keepkv.score.base import Score
from keepkv.score.learned.qfilter import KIND, NAME

MOMENT, MEAN = STATE = ("qfilter_moment", "qfilter_mean")  # of each row: Σ q qᵀ (H*G,D,D) and Σ q (H*G,D)
PUBLISHED = "q_filters"  # the tensor (layers, KV heads, head dim) in a file of the authors


@dataclass(frozen=True)
class Watch(Score):
    """Adds up the queries after RoPE and their products; scores nothing."""

    observes: ClassVar[bool] = True

    def observe(self, view: LayerView) -> None:
        wide = torch.float32 if view.queries.device.type == "mps" else torch.float64
        queries = view.queries.to(wide) * (view.query_positions >= 0)[:, None, :, None]
        for name, more in zip(STATE, (queries.mT @ queries, queries.sum(2)), strict=True):
            view.state[name] = view.state[name] + more if name in view.state else more


@register_kind(KIND)
@torch.no_grad()
def q_filters(model: PreTrainedModel, batches: Iterable[Tensor], published: str | None = None) -> Tensors:
    """The filter (H,D) float32 of each KV head: less the first right singular vector of its queries after RoPE, on the
    side of their mean, averaged over the query heads that share the KV head.

    published: a folder or file in the format of the authors, "model.safetensors" with the tensor "q_filters"; it is
    read instead of the texts. Theirs takes 3,000 queries at random for the decomposition, and the side on which more
    than half of them lie; here all queries count.
    """
    cache = Cache(model, Method(Watch()), 1.0).copy(observing=True)
    if published is not None:
        return _published(Path(published).expanduser(), [layer.info.index for layer in cache.compressible])
    held: dict[int, list[Tensor]] = {}
    heads = 1
    for ids in batches:
        cache.reset()
        feed(model, cache, ids, ids.new_ones(len(ids), 0))
        for layer in cache.compressible:
            heads = layer.store.view().shape[1]
            found = [layer.score_state[name].sum(0) for name in STATE]
            before = held.get(layer.info.index)
            held[layer.info.index] = found if before is None else [a + b for a, b in zip(before, found, strict=True)]
    return {index: {NAME: _filter(found[0], found[1], heads)} for index, found in held.items()}


def _filter(moment: Tensor, mean: Tensor, heads: int) -> Tensor:
    """(heads,D) from Σ q qᵀ (H*G,D,D) and Σ q (H*G,D)."""
    main = torch.linalg.eigh(moment.cpu()).eigenvectors[..., -1]
    side = torch.where((main * mean.cpu()).sum(-1, keepdim=True) < 0, 1.0, -1.0)
    by_head: Tensor = (side * main).view(heads, -1, main.shape[-1])
    made: Tensor = by_head.mean(1).float()
    return made


def _published(path: Path, layers: list[int]) -> Tensors:
    file = path / "model.safetensors" if path.is_dir() else path
    try:
        found = load_file(file).get(PUBLISHED)
    except Exception as error:  # whatever the library raises for what is no such file
        raise CalibrationError(f"published={str(path)!r} cannot be read: {error}") from error
    if found is None or found.dim() != 3 or not layers or found.shape[0] <= max(layers):
        what = "no such tensor" if found is None else str(tuple(found.shape))
        raise CalibrationError(
            f"{file}: expected a tensor {PUBLISHED!r} (layers, KV heads, head dim) with layer "
            f"{max(layers, default=0)}, found {what}"
        )
    return {index: {NAME: found[index].float().contiguous()} for index in layers}
