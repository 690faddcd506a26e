"""Vectors in a few bits, as they lie in memory: what codecs write and packed attention reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from keepkv.kernels.dispatch import check

BITS = (2, 4, 8)  # of a code
ONE_THREAD, PIECES = 1 << 15, 4  # numbers up to which torch computes on one thread; so many at a time, and how often


class Codes(NamedTuple):
    """Vectors x of W numbers: x ≈ (scale · level(code) + zero) @ turn.

    codes (…,⌈W·bits/8⌉) uint8: W codes of ``bits`` bits, the first in the lowest bits of the first byte; or (…,W) int8,
    codes of 8 bits that stand for themselves, from −128 on. scale (…,G),
    zero (…,G) or None, floating: of each W/G numbers that lie side by side. levels (2^bits,) float32: what a code
    stands for; None: its number. turn (W,W) float32, or (H,W,W) where every KV head has its own: orthogonal; None: the
    identity. Leading dimensions are those of the slots: (B,H,S) in a rectangle, (N,) where they are ragged.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    bits: int
    width: int
    levels: Tensor | None = None
    turn: Tensor | None = None

    def check(self, name: str) -> None:
        """Raise ``UnsupportedInput``, which calls the vectors ``name``, unless the fields fit together."""
        check(self.bits in BITS, f"{name} in {self.bits} bits: a code has {', '.join(map(str, BITS))}")
        slots, bytes_ = self.codes.shape[:-1], -(-self.width * self.bits // 8)
        whole = self.codes.dtype == torch.uint8 or (self.signed and self.bits == 8 and self.levels is None)
        check(
            whole and self.codes.shape[-1] == bytes_,
            f"{name} of {self.width} numbers in {self.bits} bits lie in {bytes_} uint8 each, not in "
            f"{self.codes.shape[-1]} {self.codes.dtype}",
        )
        groups = self.scale.shape[-1]
        check(
            self.scale.shape[:-1] == slots and groups > 0 and self.width % groups == 0,
            f"scales {tuple(self.scale.shape)} for {name} of {tuple(slots)} slots and {self.width} numbers: as many "
            "slots, and groups that divide the numbers",
        )
        check(
            self.zero is None or self.zero.shape == self.scale.shape,
            f"zeros of {name} must have the shape of their scales, {tuple(self.scale.shape)}",
        )
        check(
            self.levels is None or self.levels.shape == (2**self.bits,),
            f"{name} in {self.bits} bits stand for {2**self.bits} levels, not "
            f"{None if self.levels is None else tuple(self.levels.shape)}",
        )
        check(
            self.turn is None or self.turn.shape[-2:] == (self.width, self.width),
            f"the turn of {name} must be {self.width} × {self.width}, not "
            f"{None if self.turn is None else tuple(self.turn.shape)}",
        )

    @property
    def signed(self) -> bool:
        """Whether a code is a number of two's complement."""
        return self.codes.dtype == torch.int8

    def each(self, change: Callable[[Tensor], Tensor]) -> Codes:
        """With ``change`` made to every tensor that has one entry a slot: a slice, a gather, a copy."""
        zero = None if self.zero is None else change(self.zero)
        return self._replace(codes=change(self.codes), scale=change(self.scale), zero=zero)

    def turned(self, queries: Tensor) -> Tensor:
        """queries (…,W) as they meet the vectors before their turn, float32 or wider: q·(x @ turn) = (q @ turnᵀ)·x."""
        wide = queries.to(torch.promote_types(queries.dtype, torch.float32))
        return wide if self.turn is None else _by_head(wide, self.turn.to(wide.dtype).mT)

    def turn_back(self, sums: Tensor) -> Tensor:
        """Σ p·(x @ turn) of sums Σ p·x (B,Hq,W), in their dtype."""
        return sums if self.turn is None else _by_head(sums, self.turn.to(sums.dtype))

    def expand(self, dtype: torch.dtype, more: Tensor | None = None) -> Tensor:
        """The vectors (…,W) in ``dtype``, computed in float32 or wider; ``more`` is added to them before."""
        wide = torch.promote_types(dtype, torch.float32)
        code = unpack(self.codes, self.bits, self.width)
        if self.levels is None:
            x = code.to(wide)
        else:
            x = self.levels.to(wide).index_select(0, code.flatten().int()).view(code.shape)
        grouped = x.unflatten(-1, (self.scale.shape[-1], -1)).mul_(self.scale.to(wide)[..., None])
        if self.zero is not None:
            grouped.add_(self.zero.to(wide)[..., None])
        x = grouped.flatten(-2)
        turned: Tensor = x if self.turn is None else x @ self.turn.to(wide)
        return (turned if more is None else turned + more.to(wide)).to(dtype)


def _by_head(x: Tensor, turn: Tensor) -> Tensor:
    """``x`` (B,Hq,W) times ``turn`` (W,W), or times that of its KV head, (H,W,W)."""
    if turn.dim() > 2:
        by_head: Tensor = x.unflatten(1, (turn.shape[0], -1))
        return (by_head @ turn).view_as(x)
    rows, each = x.flatten(0, 1), ONE_THREAD // turn.numel()
    if x.device.type != "cpu" or not 0 < len(rows) <= PIECES * each:
        return x @ turn
    # A product of matrices wakes every thread and waits for it: milliseconds where other processes are busy.
    pieces = [(piece[..., None] * turn).sum(-2) for piece in rows.split(each)]
    return (pieces[0] if len(pieces) == 1 else torch.cat(pieces)).view_as(x)


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
    """The codes (…,width) that ``pack`` made bytes of, uint8; those of int8 as they are."""
    if bits == 8:
        return packed
    mask = 2**bits - 1
    columns: list[Tensor] = [(packed >> (bits * i)) & mask for i in range(8 // bits)]
    return torch.stack(columns, -1).flatten(-2)[..., :width]
