"""Codes of rotated vectors: a Hadamard rotation spreads what stands out in a few dimensions over all."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from keepkv.store.codec.base import register_codec
from keepkv.store.codec.per_token import PerToken


@lru_cache(maxsize=64)
def hadamard(width: int, device: torch.device) -> Tensor:
    """A fixed rotation (W,W) float32: random signs, then Hadamard matrices on the diagonal, each as large as the
    greatest power of two that divides W."""
    block = width & -width
    signs = torch.randint(0, 2, (width,), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
    one = torch.ones(1, 1)
    while one.shape[0] < block:
        one = torch.cat((torch.cat((one, one), 1), torch.cat((one, -one), 1)))
    turn: Tensor = torch.block_diag(*[one / block**0.5] * (width // block)) * signs
    return turn.to(device)


@register_codec("hadamard")
class Hadamard(PerToken):
    """Uniform codes of each vector behind a blockwise Hadamard rotation, as SAW-INT4 (arXiv 2604.19157).

    Options as ``PerToken``: bits, key_bits, value_bits, group, centre. The rotation changes no product of a query with
    a key: attention on codes rotates the query once, and not the keys.
    """

    def turn(self, name: str, width: int, device: torch.device) -> Tensor | None:
        return hadamard(width, device)
