"""How slots lie in memory, as kernels are told: a rectangle, or segments of one buffer."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from keepkv.kernels.dispatch import check
from keepkv.kernels.tiling import Tiles, tiles

MASKED = -1e30  # logit of what is not seen: finite, so that a query that sees nothing yields no NaN


@dataclass(frozen=True)
class Layout:
    """Where the slots of each (row, head) lie in tensors (B,H,S,…), or in ragged ones (N,…).

    rows B, heads H; longest: slots of the longest (row, head), or a bound; total: slots of all, or a bound.
    first, lengths (B,H) int64 or None: first slot, counted from the start of the row and head (of the buffer where
    ``ragged``), and number of slots; None: every column of the rectangle.
    """

    rows: int
    heads: int
    longest: int
    total: int
    ragged: bool
    first: Tensor | None = None
    lengths: Tensor | None = None

    @property
    def whole(self) -> bool:
        """Whether every slot of the tensors belongs to a (row, head)."""
        return self.first is None

    def strides(self, x: Tensor) -> tuple[int, int, int]:
        """Elements of ``x`` from row to row, head to head, slot to slot."""
        return (0, 0, x.stride(0)) if self.ragged else (x.stride(0), x.stride(1), x.stride(2))

    @cached_property
    def tiles(self) -> Tiles | None:
        """How ``decode_tiles`` reads the segments; None where it cannot."""
        return None if self.first is None or self.lengths is None else tiles(self.first, self.lengths, self.total)

    def index(self, start: int = 0, stop: int | None = None) -> tuple[Tensor | None, Tensor | None]:
        """Columns (B,H,longest) of the slots of each (row, head), from the ``start``-th to before the ``stop``-th, and
        which exist; None, None for a whole rectangle."""
        if self.first is None or self.lengths is None:
            return None, None
        columns = torch.arange(start, min(self.longest, stop or self.longest), device=self.first.device)
        inside = columns < self.lengths[..., None]
        return (self.first[..., None] + columns).masked_fill(~inside, 0), inside

    def take(self, x: Tensor, index: Tensor | None, inside: Tensor | None) -> Tensor:
        """``x`` as a rectangle (B,H,longest,…), zero where no slot is."""
        if index is None or inside is None:
            return x
        if self.ragged:
            taken = x[index] if x.shape[0] else x.new_zeros(*index.shape, *x.shape[1:])
        else:
            taken = x.gather(2, index if x.dim() == 3 else index[..., None].expand(*index.shape, x.shape[-1]))
        return taken.masked_fill_(~(inside if taken.dim() == 3 else inside[..., None]), 0)


def layout(x: Tensor, tail: int, offsets: Tensor | None, lengths: Tensor | None, longest: int | None) -> Layout:
    """The layout of ``x``, which has ``tail`` dimensions behind that of the slots.

    offsets (B,H) int: given for a ragged ``x`` (N,…), with ``lengths``: the first slot of each (row, head), which
    needs not be the end of the one before. lengths (B,H) int alone: of each (row, head) the last ``lengths`` columns
    of a rectangle (B,H,S,…) hold slots, those before are empty. longest: the largest of ``lengths``; where it is not
    given it is read from the device.
    """
    dims = x.dim() - tail
    check(
        dims == (3 if offsets is None else 1),
        f"slots of shape {tuple(x.shape)} {'without' if offsets is None else 'with'} offsets: give a rectangle "
        "(rows, heads, slots, …), or one buffer (slots, …) with offsets and lengths (rows, heads)",
    )
    if lengths is not None and longest is None:
        longest = int(lengths.max()) if lengths.numel() else 0
    if offsets is None:
        b, h, s = x.shape[:3]
        if lengths is None:
            return Layout(b, h, s, b * h * s, False)
        check(lengths.shape == (b, h), f"lengths {tuple(lengths.shape)} for slots of {b} rows and {h} heads")
        assert longest is not None
        return Layout(b, h, longest, b * h * s, False, (s - lengths).long().contiguous(), lengths.long().contiguous())
    check(
        lengths is not None and lengths.shape == offsets.shape and offsets.dim() == 2,
        f"offsets {tuple(offsets.shape)} need lengths of the same shape (rows, heads), not "
        f"{None if lengths is None else tuple(lengths.shape)}",
    )
    assert lengths is not None and longest is not None
    b, h = offsets.shape
    return Layout(b, h, longest, x.shape[0], True, offsets.long().contiguous(), lengths.long().contiguous())


def agree(
    space: Layout, query: tuple[int, int, int], keys: Tensor, sinks: Tensor | None, **fields: Tensor | None
) -> None:
    """``UnsupportedInput`` unless ``query`` = (B, Hq, D), sinks (Hq,) and fields, one number a slot, fit ``keys``."""
    b, heads, d = query
    check(
        b == space.rows and heads % space.heads == 0 and d == keys.shape[-1],
        f"queries of {b} rows, {heads} query heads, dimension {d}, for keys of {space.rows} rows, {space.heads} heads, "
        f"dimension {keys.shape[-1]}: query heads must be a multiple of heads, the rest equal",
    )
    check(sinks is None or sinks.numel() == heads, f"{heads} query heads need as many sinks")
    for name, x in fields.items():
        if x is not None:
            slots = tuple(keys.shape[:-1])
            check(x.shape == slots, f"{name} for slots {tuple(x.shape)}, keys for slots {slots}: they must be the same")


def rowwise(x: Tensor) -> Tensor:
    """``x`` with the elements of a slot side by side, as kernels read them; copied only if they are not."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def spread(scores: Tensor, keys: Tensor, space: Layout, index: Tensor | None, inside: Tensor | None) -> Tensor:
    """``scores`` (B,H,G,longest) of the slots at ``index``, laid out as the slots of ``keys`` are: see ``room``."""
    if index is None or inside is None:
        return scores
    out = room(space, keys, scores.shape[2], scores.dtype)
    if space.ragged:
        out[:, index[inside]] = scores.movedim(2, 0)[:, inside]
        return out
    # What lies outside of a segment has score 0 and points at column 0: it adds nothing.
    return out.scatter_add_(3, index[:, :, None].expand_as(scores), scores)


def room(space: Layout, keys: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
    """An empty tensor for one number per query head and slot: (B,H,G,S), or (G,N) for ragged slots."""
    shape = (groups, keys.shape[0]) if space.ragged else (*keys.shape[:2], groups, keys.shape[2])
    # Slots of no head are never written.
    return (torch.empty if space.whole else torch.zeros)(shape, dtype=dtype, device=keys.device)


def room_strides(space: Layout, x: Tensor) -> tuple[int, int, int]:
    """Elements of a ``room`` from row to row, head to head, query head to query head; slots lie side by side."""
    return (0, 0, x.stride(0)) if space.ragged else (x.stride(0), x.stride(1), x.stride(2))
