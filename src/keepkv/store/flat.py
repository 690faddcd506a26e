"""Ragged store: each (row, head) has its own length, and nothing is allocated beyond it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from keepkv.attention.part import Part
from keepkv.core.slots import EMPTY, Slots
from keepkv.kernels.segments import Segments
from keepkv.store.base import STORES, Store, filled
from keepkv.store.dense import DenseStore


@STORES.register("flat")
class FlatStore(Store):
    """What ``load`` writes lies in one buffer per field, (row, head) after (row, head), with offsets; tokens
    appended since lie in a rectangular tail, since every head gets one slot per token."""

    def __init__(self, stats: dict[str, float]) -> None:
        super().__init__(stats)
        self.body: dict[str, Tensor] = {}  # fields (N, …) over all slots, and "lengths" (B,H) int64
        self.recent = DenseStore(stats)
        self._space: Segments | None = None  # of the body

    @property
    def _longest(self) -> int:
        return 0 if self._space is None else self._space.longest

    @property
    def length(self) -> int:
        return self._longest + self.recent.length

    @property
    def lengths(self) -> Tensor:
        if not self.body:
            return self.recent.lengths
        held: Tensor = self.body["lengths"]
        return held + self.recent.lengths if self.recent.length else held

    @property
    def tail(self) -> int:
        return self.recent.length

    @property
    def is_plain(self) -> bool:
        return not self.body

    @property
    def views_share_memory(self) -> bool:
        return not self.body

    def append(self, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        self.recent.append(keys, values, positions)

    def parts(self) -> Iterator[Part]:
        if self._longest:
            body = self.body
            yield Part(body["keys"], body["values"], body.get("log_votes"), body["positions"], self._space)
        if self.recent.length:
            yield from self.recent.parts()

    def _set(self, fields: dict[str, Tensor], lengths: Tensor) -> None:
        """New contents of the body: segments of ``lengths`` (B,H), one after the other."""
        self.body = {**fields, "lengths": lengths}
        b, h = lengths.shape
        first = lengths.flatten().cumsum(0).view_as(lengths) - lengths
        longest = int(lengths.max()) if lengths.numel() else 0
        self._space = Segments(b, h, longest, len(fields["positions"]), True, first, lengths)

    def _take(self, rows: Tensor | slice, columns: Tensor) -> dict[str, Tensor]:
        """Fields of the body at ``columns`` (…,c) counted from the start of each segment of ``rows``; of another slot
        where that lies outside."""
        assert self._space is not None and self._space.first is not None
        index = (self._space.first[rows][..., None] + columns).clamp_(0, max(0, self._space.total - 1))
        return {name: x[index] for name, x in self.body.items() if name != "lengths"}

    def load(self, slots: Slots) -> None:
        self.load_kept(slots, slots.valid)

    def load_kept(self, slots: Slots, keep: Tensor) -> None:
        where = keep.flatten().nonzero()[:, 0]  # once, as the host waits for it
        fields = {"keys": slots.keys, "values": slots.values, "positions": slots.positions, **slots.stats}
        if bool(slots.log_votes.any()):
            fields["log_votes"] = slots.log_votes
        self._set({name: x.flatten(0, 2).index_select(0, where) for name, x in fields.items()}, keep.sum(-1))
        self.recent = DenseStore(self.stats)

    def view(self) -> Slots:
        if not self.body:
            return self.recent.view()
        lengths = self.body["lengths"][..., None]
        columns = torch.arange(self._longest, device=lengths.device) - self._longest + lengths  # empty ones first
        got = self._take(slice(None), columns)
        got["positions"].masked_fill_(columns < 0, EMPTY)
        if "log_votes" not in got:
            got["log_votes"] = filled(got["keys"], tuple(got["positions"].shape), 0.0, torch.float32)
        stats = {name: got[name] for name in self.stats}
        body = Slots(got["keys"], got["values"], got["log_votes"], got["positions"], stats)
        return body.join(self.recent.view()) if self.recent.length else body

    def put(self, stats: dict[str, Tensor]) -> None:
        self.recent.put({name: x[:, :, self._longest :] for name, x in stats.items()} if self.recent.length else {})
        if self.body:
            lengths = self.body["lengths"][..., None]
            inside = torch.arange(self._longest, device=lengths.device) >= self._longest - lengths
            for name, x in stats.items():
                self.body[name].copy_(x[:, :, : self._longest][inside])

    def index(self, rows: Tensor) -> None:
        self.recent.index(rows)
        if not self.body:
            return
        lengths = self.body["lengths"][rows]
        columns = torch.arange(self._longest, device=rows.device)
        inside = columns < lengths[..., None]
        self._set({name: x[inside] for name, x in self._take(rows, columns).items()}, lengths)

    def crop(self, tokens: int) -> None:
        self.recent.crop(tokens)

    def tensors(self) -> dict[str, Tensor]:
        body = {f"body.{name}": x for name, x in self.body.items()}
        return body | {f"tail.{name}": x for name, x in self.recent.tensors().items()}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        self.body, self._space = {}, None
        if body := {name[5:]: x for name, x in tensors.items() if name.startswith("body.")}:
            self._set(body, body.pop("lengths"))
        tail = {name[5:]: x for name, x in tensors.items() if name.startswith("tail.")}
        self.recent = DenseStore(self.stats)
        if tail:
            self.recent.restore(tail)
