"""Vectors in a few bits, as they lie in memory: what codecs write and packed attention reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

BITS = (2, 4, 8)  # of a code


class Codes(NamedTuple):
    """Vectors x of W numbers: x ≈ (scale · level(code) + zero) @ turn.

    codes (…,⌈W·bits/8⌉) uint8: W codes of ``bits`` bits, the first in the lowest bits of the first byte. scale (…,G),
    zero (…,G) or None, floating: of each W/G numbers that lie side by side. levels (2^bits,) float32: what a code
    stands for; None: its number. turn (W,W) float32: orthogonal; None: the identity. Leading dimensions are those of
    the slots: (B,H,S) in a rectangle, (N,) where they are ragged.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    bits: int
    width: int
    levels: Tensor | None = None
    turn: Tensor | None = None

    def each(self, change: Callable[[Tensor], Tensor]) -> Codes:
        """With ``change`` made to every tensor that has one entry a slot: a slice, a gather, a copy."""
        zero = None if self.zero is None else change(self.zero)
        return self._replace(codes=change(self.codes), scale=change(self.scale), zero=zero)

    def expand(self, dtype: torch.dtype) -> Tensor:
        """The vectors (…,W) in ``dtype``, computed in float32 or wider."""
        wide = torch.promote_types(dtype, torch.float32)
        code = unpack(self.codes, self.bits, self.width)
        level = code.to(wide) if self.levels is None else self.levels.to(wide)[code.long()]
        grouped = level.unflatten(-1, (self.scale.shape[-1], -1))
        x = (
            (grouped * self.scale.to(wide)[..., None])
            if self.zero is None
            else torch.addcmul(self.zero.to(wide)[..., None], grouped, self.scale.to(wide)[..., None])
        )
        x = x.flatten(-2)
        return x.to(dtype) if self.turn is None else (x @ self.turn.to(wide)).to(dtype)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes (…,W) uint8 below 2^bits as bytes (…,⌈W·bits/8⌉) uint8, the first in the lowest bits of the first byte."""
    if bits == 8:
        return codes
    each = 8 // bits
    if lacking := -codes.shape[-1] % each:
        codes = torch.nn.functional.pad(codes, (0, lacking))
    columns = codes.unflatten(-1, (-1, each))
    packed: Tensor = columns[..., 0]
    for i in range(1, each):
        packed = packed | (columns[..., i] << (bits * i))
    return packed.contiguous()


def unpack(packed: Tensor, bits: int, width: int) -> Tensor:
    """The codes (…,width) uint8 that ``pack`` made bytes of."""
    if bits == 8:
        return packed
    mask = 2**bits - 1
    columns: list[Tensor] = [(packed >> (bits * i)) & mask for i in range(8 // bits)]
    return torch.stack(columns, -1).flatten(-2)[..., :width]
