"""Which tokens are still held."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def survival(layers: Sequence[Tensor], tokens: int) -> Tensor:
    """(B,tokens) float64 on the CPU: the share of the KV heads, over all layers, that still hold each token of a row.

    layers: positions (B,H,S) of the slots of each layer, −1 where empty; at least one. Of a merged slot only its anchor
    counts.
    """
    counts = torch.zeros(layers[0].shape[0], tokens + 1, dtype=torch.float64)
    for positions in layers:
        held = positions.flatten(1).long().cpu()
        held = held.where((held >= 0) & (held < tokens), tokens)  # the last column takes what is not asked for
        counts.scatter_add_(1, held, torch.ones_like(held, dtype=counts.dtype))
    return counts[:, :tokens] / sum(positions.shape[1] for positions in layers)
