"""The norm of values, averaged over the neighbourhood of a patch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from keepkv.core.options import Kernel, one_of
from keepkv.core.slots import LayerView
from keepkv.observe.lengths import lengths
from keepkv.observe.vision import Sight, sight
from keepkv.score.base import Score, register_score

KERNELS = (7, 5, 3, 1)
STRIDE = 1 << 24  # of a step, in a number that tells step and cell
Pool = Annotated[str, one_of("depth", "variation")] | Kernel


@register_score("van")
@dataclass(frozen=True)
class VaN(Score):
    """VaN of InfiniPot-V (arXiv 2506.15745): ‖v‖₂, averaged over a k × k neighbourhood of cells of the same step.

    pool: k of each layer. "depth": 7, 5, 3 and 1 in the quarters of the model, which is how the layers fall in the
    paper's figure; "variation": the first of these below whose threshold the layer's std(VaN)/mean(VaN) stays, as the
    paper has it, with ``thresholds`` that it does not print; or one odd number for all, 1 for no pooling. Only slots
    that are there are counted: neither borders nor dropped neighbours lower the mean, as zero padding does in the
    authors' code.
    """

    pool: Pool = "depth"
    thresholds: tuple[float, ...] = ()

    def __call__(self, view: LayerView) -> Tensor:
        return value_norms(view, sight(view), self.pool, self.thresholds)


def value_norms(view: LayerView, seen: Sight, pool: str | int, thresholds: tuple[float, ...] = ()) -> Tensor:
    """Pooled norms (B,H,S) float32; 0 at slots that are no vision."""
    norms = lengths(view.slots.values).float().masked_fill(~seen.vision, 0.0)
    if pool == "depth":
        pool = KERNELS[min(len(KERNELS) - 1, view.layer * len(KERNELS) // max(1, view.layers))]
    if isinstance(pool, int):
        return pooled(norms, seen, pool)
    mean, spread = _moments(norms, seen.vision)
    beyond = sum((spread / mean >= x).long() for x in thresholds) + torch.zeros_like(mean, dtype=torch.int64)
    out = norms
    for i, kernel in enumerate(KERNELS[: len(thresholds) + 1]):
        out = torch.where(beyond[:, None, None] == i, pooled(norms, seen, kernel), out)
    return out


def pooled(norms: Tensor, seen: Sight, kernel: int) -> Tensor:
    """Mean of ``norms`` (B,H,S) over the ``kernel`` × ``kernel`` cells around each, of its step, that are there."""
    if kernel == 1 or not norms.numel():
        return norms
    steps, width = seen.steps, seen.width
    # Ascending, as slots are: text stands behind the step before it, empty slots first.
    where = steps * STRIDE + torch.where(seen.vision, seen.cells, STRIDE - 1)
    where = where.cummax(-1).values.contiguous()
    row, column, reach = seen.cells // width, seen.cells % width, kernel // 2
    total, count = torch.zeros_like(norms), torch.zeros_like(norms)
    for down in range(-reach, reach + 1):
        for right in range(-reach, reach + 1):
            inside = (column + right >= 0) & (column + right < width) & (row + down >= 0) & seen.vision
            wanted = steps * STRIDE + (row + down) * width + column + right
            at = torch.searchsorted(where, wanted.contiguous()).clamp(max=where.shape[-1] - 1)
            there = inside & (where.gather(-1, at) == wanted)
            total += norms.gather(-1, at) * there
            count += there
    return total / count.clamp(min=1)


def _moments(norms: Tensor, among: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (B,) of ``norms`` over the slots and heads of each row."""
    count = among.sum((1, 2)).clamp(min=1)
    mean = norms.sum((1, 2)) / count
    away = (norms - mean[:, None, None]).square() * among
    return mean.clamp(min=1e-12), (away.sum((1, 2)) / count).sqrt()
