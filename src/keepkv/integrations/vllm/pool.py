"""The tensors of vLLM's blocks, addressed by lane, block and offset: the one place that knows how slots lie in them.

Behind the keys and values of each page, ``KeepKVSpec`` makes room for a log vote, a position and a statistic of each
slot. Knows no vLLM.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from keepkv.errors import KeepKVError

FIELDS = 3  # 4-byte numbers beside each slot: log votes float32, position int32, one statistic float32
SLOT_BYTES = 4 * FIELDS


class Pool:
    """The blocks of some layers: of one, or of all those over which pages roam.

    caches: of each layer, (blocks,H,slots,2D) in the dtype of keys and values, D numbers of a key and D of a value for
    each slot. transposed: within a page the keys of a head come first, as (D,slots), then its values, as vLLM's CPU
    backend stores them. All tensors are views: what is written here is what attention reads.
    """

    def __init__(self, caches: Sequence[Tensor], transposed: bool) -> None:
        kv = _stacked(caches)  # (L,blocks,H,slots,2D)
        layers, blocks, self.heads, self.block, double = kv.shape
        self.layers, self.transposed, self.device, d = layers, transposed, kv.device, double // 2
        if transposed:
            halves = kv.view(layers, blocks, self.heads, 2, self.block * d)
            self.keys = halves[..., 0, :].view(layers, blocks, self.heads, d, self.block)
            self.values = halves[..., 1, :].view(layers, blocks, self.heads, self.block, d)
        else:
            self.keys, self.values = kv[..., :d], kv[..., d:]
        self.votes = _beside(kv, 0, torch.float32)
        self.positions = _beside(kv, 1, torch.int32)
        self.stats = _beside(kv, 2, torch.float32)

    def _at(self, block: Tensor, lane: Tensor, offset: Tensor) -> tuple[Tensor, ...]:
        return lane // self.heads, block, lane % self.heads, offset

    def read(self, name: str, block: Tensor, lane: Tensor, offset: Tensor) -> Tensor:
        """Field ``name`` of the slots at physical ``block``, ``lane`` and ``offset``, all int64 of one shape."""
        field: Tensor = getattr(self, name)
        layer, block, head, offset = self._at(block, lane, offset)
        return field[layer, block, head, :, offset] if self._split(name) else field[layer, block, head, offset]

    def write(self, name: str, block: Tensor, lane: Tensor, offset: Tensor, x: Tensor) -> None:
        """Set field ``name`` of these slots to ``x``."""
        field: Tensor = getattr(self, name)
        layer, block, head, offset = self._at(block, lane, offset)
        if self._split(name):
            field[layer, block, head, :, offset] = x.to(field.dtype)
        else:
            field[layer, block, head, offset] = x.to(field.dtype)

    def _split(self, name: str) -> bool:
        """Whether the numbers of one slot lie apart."""
        return self.transposed and name == "keys"


def _stacked(caches: Sequence[Tensor]) -> Tensor:
    """One view (L,…) of the tensors of several layers, which must lie at equal distances in one buffer."""
    first = caches[0]
    starts = [x.storage_offset() for x in caches]
    steps = {b - a for a, b in pairwise(starts)} or {first.stride(0)}
    alike = {(x.shape, x.stride(), x.dtype, x.untyped_storage().data_ptr()) for x in caches}
    if len(steps) > 1 or len(alike) > 1:
        raise KeepKVError(
            "the layers of this model do not lie alike in one buffer, so budgets cannot be shared between them. Choose "
            "a method that budgets each layer by itself: allocate='adakv' or 'uniform'"
        )
    return torch.as_strided(first, (len(caches), *first.shape), (steps.pop(), *first.stride()), starts[0])


def _beside(kv: Tensor, number: int, dtype: torch.dtype) -> Tensor:
    """Field ``number`` (L,blocks,H,slots) in the padding behind each page of ``kv`` (L,blocks,H,slots,2D)."""
    layers, blocks, heads, slots, double = kv.shape
    size, each = kv.element_size(), heads * slots
    page, start = each * double * size, kv.storage_offset() * size
    steps = [kv.stride(i) * size for i in (0, 1)]
    apart = min(steps if layers > 1 else steps[1:])
    if apart < page + SLOT_BYTES * each or any(x % 4 for x in (start, page, *steps)):
        raise KeepKVError(
            f"pages of {page} bytes, {apart} apart, have no room for {SLOT_BYTES} bytes beside each slot: was the "
            "engine started with keepkv's attention backend?"
        )
    field = torch.empty(0, dtype=dtype, device=kv.device)
    shape, strides = (layers, blocks, heads, slots), (steps[0] // 4, steps[1] // 4, slots, 1)
    return field.set_(kv.untyped_storage(), (start + page) // 4 + number * each, shape, strides)
