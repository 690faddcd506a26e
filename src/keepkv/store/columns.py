"""A growing rectangle: every (row, head) has the same number of columns."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from keepkv.core.slots import EMPTY


class Columns:
    """Fields (B,H,capacity,…), of which the first ``length`` columns are used, oldest first.

    starts: what a field holds where nothing was written, 0 if it is not named. A field that some columns lack is filled
    with it: votes, say, are allocated only once a slot has any.
    """

    def __init__(self, starts: Mapping[str, float]) -> None:
        self.starts = {"positions": float(EMPTY), **starts}
        self.fields: dict[str, Tensor] = {}
        self.length = 0

    @property
    def capacity(self) -> int:
        return self.fields["positions"].shape[2] if self.fields else 0

    def used(self) -> dict[str, Tensor]:
        """The fields (B,H,length,…), sharing memory."""
        return {name: x[:, :, : self.length] for name, x in self.fields.items()}

    def set(self, fields: dict[str, Tensor]) -> None:
        """Hold ``fields`` (B,H,S,…) and nothing else."""
        self.fields = {name: _own(x) for name, x in fields.items()}
        self.length = fields["positions"].shape[2]

    def add(self, new: dict[str, Tensor], ahead: int) -> None:
        """Append the columns of ``new`` (B,H,T,…). ahead: columns to allocate beyond them where they do not fit."""
        t = new["positions"].shape[2]
        if not self.fields:
            self.set(new)
            return
        if self.length + t > self.capacity:
            self._grow(self.length + t + ahead)
        for name in new.keys() - self.fields.keys():
            x = new[name]
            self.fields[name] = self._blank(name, x, (*x.shape[:2], self.capacity, *x.shape[3:]))
        for name, held in self.fields.items():
            column = held[:, :, self.length : self.length + t]
            column.copy_(new[name]) if name in new else column.fill_(self.starts.get(name, 0.0))
        self.length += t

    def take_oldest(self, count: int) -> dict[str, Tensor]:
        """Remove the first ``count`` columns and return them, (B,H,count,…), in memory of their own."""
        used = self.used()
        taken = {name: x[:, :, :count].clone() for name, x in used.items()}
        self.set({name: x[:, :, count:] for name, x in used.items()})
        return taken

    def crop(self, count: int) -> None:
        """Remove the last ``count`` columns."""
        end = self.length - count
        for name, x in self.fields.items():  # unused columns hold start values
            x[:, :, end : self.length] = self.starts.get(name, 0.0)
        self.length = end

    def hide(self, first: Tensor) -> None:
        """Make columns empty whose position is ``first`` (B,) of their row or later."""
        if self.fields:
            at = self.fields["positions"]
            at.masked_fill_(at >= first[:, None, None], EMPTY)

    def index(self, rows: Tensor) -> None:
        """Row i becomes the present row ``rows[i]``."""
        self.fields = {name: x.index_select(0, rows.to(x.device)) for name, x in self.fields.items()}

    def join(self, other: Columns, rows: tuple[int, int]) -> None:
        """Add the rows of ``other``; the shorter ones start with empty columns. rows: how many each of the two has."""
        halves = [(x.used(), x.length, count) for x, count in zip((self, other), rows, strict=True)]
        length, joined = max(self.length, other.length), {}
        for name in self.fields.keys() | other.fields.keys():
            like = next(fields[name] for fields, _, _ in halves if name in fields)
            parts = []
            for fields, used, count in halves:
                parts.append(self._blank(name, like, (count, like.shape[1], length, *like.shape[3:])))
                if name in fields:
                    parts[-1][:, :, length - used :] = fields[name]
            joined[name] = torch.cat(parts)
        if joined:
            self.set(joined)

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor held, and ``counts``."""
        return {**self.fields, "counts": torch.tensor([self.length])} if self.fields else {}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Take over what ``tensors`` returned."""
        self.fields = {name: x for name, x in tensors.items() if name != "counts"}
        self.length = int(tensors["counts"][0]) if "counts" in tensors else self.capacity

    def _grow(self, capacity: int) -> None:
        for name, x in self.fields.items():
            grown = self._blank(name, x, (*x.shape[:2], capacity, *x.shape[3:]))
            grown[:, :, : self.length] = x[:, :, : self.length]
            self.fields[name] = grown

    def _blank(self, name: str, like: Tensor, shape: tuple[int, ...]) -> Tensor:
        return torch.full(shape, self.starts.get(name, 0.0), dtype=like.dtype, device=like.device)


def _own(x: Tensor) -> Tensor:
    """``x`` in a storage that keeps nothing else alive, head after head: attention reads keys that lie token by token,
    as projections leave them, a sixth slower than the copy costs."""
    x = x.contiguous()
    return x if x.untyped_storage().nbytes() == x.numel() * x.element_size() else x.clone()
