"""Ragged slots: each (row, head) has its own number of them, and nothing is allocated beyond it."""

from __future__ import annotations

import torch
from torch import Tensor

from keepkv.core.slots import EMPTY
from keepkv.kernels.segments import Segments


class RaggedFields:
    """Fields (N,…) in one buffer each, (row, head) after (row, head); ``lengths`` (B,H): slots of each."""

    def __init__(self) -> None:
        self.fields: dict[str, Tensor] = {}
        self.lengths: Tensor | None = None
        self.segments: Segments | None = None

    @property
    def length(self) -> int:
        """Slots of the longest (row, head)."""
        return 0 if self.segments is None else self.segments.longest

    def set(self, fields: dict[str, Tensor], lengths: Tensor) -> None:
        """Hold ``fields`` (N,…), segments of ``lengths`` (B,H) one after the other, and nothing else."""
        self.fields, self.lengths = fields, lengths
        b, h = lengths.shape
        first = lengths.flatten().cumsum(0).view_as(lengths) - lengths
        longest = int(lengths.max()) if lengths.numel() else 0
        total, floats = len(fields["positions"]), (x for x in fields.values() if x.dim() > 1 and x.is_floating_point())
        bounds = (bound for x in floats if x.numel() and x.dtype.itemsize > 1 for bound in x.aminmax())
        apart = not all(bool(bound.isfinite()) for bound in bounds)
        self.segments = Segments(b, h, longest, total, True, first, lengths, apart)

    def rectangle(self, start: int = 0, stop: int | None = None) -> dict[str, Tensor]:
        """Columns ``start`` to ``stop`` of the fields as a rectangle (B,H,·,…), copied; empty slots come first."""
        assert self.segments is not None and self.lengths is not None
        lengths = self.lengths[..., None]
        stop = self.length if stop is None else min(stop, self.length)
        columns = torch.arange(start, stop, device=lengths.device) - self.length + lengths
        taken = self._take(slice(None), columns)
        taken["positions"].masked_fill_(columns < 0, EMPTY)
        if self.segments.apart:  # what empty slots hold counts with weight 0, and 0 times NaN is NaN
            for x in taken.values():
                if x.dim() > 3:
                    x.masked_fill_(columns[..., None] < 0, 0)
        return taken

    def positions(self) -> Tensor:
        """(B,H,length) int32: the positions of ``rectangle``."""
        assert self.segments is not None and self.segments.first is not None and self.lengths is not None
        columns = torch.arange(self.length, device=self.lengths.device) - self.length + self.lengths[..., None]
        index = (self.segments.first[..., None] + columns).clamp_(0, max(0, self.segments.total - 1))
        return self.fields["positions"][index].masked_fill_(columns < 0, EMPTY)

    def at(self, columns: Tensor) -> dict[str, Tensor]:
        """The fields at ``columns`` (B,H,K) of ``rectangle``, copied."""
        assert self.lengths is not None
        own = columns - self.length + self.lengths[..., None]
        taken = self._take(slice(None), own)
        taken["positions"].masked_fill_(own < 0, EMPTY)
        return taken

    def put(self, stats: dict[str, Tensor]) -> None:
        """Write statistics back, each (B,H,length) as ``rectangle`` has them."""
        assert self.lengths is not None
        inside = torch.arange(self.length, device=self.lengths.device) >= self.length - self.lengths[..., None]
        for name, x in stats.items():
            self.fields[name].copy_(x[inside])

    def index(self, rows: Tensor) -> None:
        """Row i becomes the present row ``rows[i]``."""
        if self.lengths is None:
            return
        lengths = self.lengths[rows]
        columns = torch.arange(self.length, device=rows.device)
        inside = columns < lengths[..., None]
        self.set({name: x[inside] for name, x in self._take(rows, columns).items()}, lengths)

    def join(self, other: RaggedFields) -> None:
        """Add the rows of ``other``; both hold something."""
        assert self.lengths is not None and other.lengths is not None
        both, fields = (self.fields, other.fields), {}
        for name in self.fields.keys() | other.fields.keys():
            like = next(x[name] for x in both if name in x)
            parts = (x.get(name, like.new_zeros(len(x["positions"]), *like.shape[1:])) for x in both)
            fields[name] = torch.cat(tuple(parts))
        self.set(fields, torch.cat((self.lengths, other.lengths)))

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor held."""
        return {} if self.lengths is None else {**self.fields, "lengths": self.lengths}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Take over what ``tensors`` returned."""
        fields = dict(tensors)
        self.set(fields, fields.pop("lengths"))

    def _take(self, rows: Tensor | slice, columns: Tensor) -> dict[str, Tensor]:
        """Fields at ``columns`` (…,c) counted from the start of each segment of ``rows``; of another slot where that
        lies outside."""
        assert self.segments is not None and self.segments.first is not None
        index = (self.segments.first[rows][..., None] + columns).clamp_(0, max(0, self.segments.total - 1))
        return {name: x[index] for name, x in self.fields.items()}
