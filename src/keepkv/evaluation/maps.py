"""Where a compressed cache still holds the tokens of its first row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from keepkv.engine.layer import Layer


def survival(cache: Any, tokens: int) -> Tensor:
    """(tokens,) float: share of the layers' (row 0) KV heads that still hold each token.

    Of a merged slot only its anchor counts; layers that the cache does not compress are left out.
    """
    counts, heads = torch.zeros(tokens), 0
    for layer in range(len(cache.layers)):
        if not isinstance(cache.layers[layer], Layer):
            continue
        positions = cache.kept_positions(layer)[0]
        heads += positions.shape[0]
        counts += torch.bincount(positions[positions >= 0].long().cpu(), minlength=tokens)[:tokens]
    return counts / max(heads, 1)
