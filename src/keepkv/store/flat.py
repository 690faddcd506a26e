"""Ragged store: each (row, head) has its own length, and nothing is allocated beyond it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from keepkv.attention.reference import Part
from keepkv.slots import EMPTY, Slots
from keepkv.store.base import STORES, Store, filled
from keepkv.store.dense import DenseStore

TILE = 512  # columns gathered at once for attention


@STORES.register("flat")
class FlatStore(Store):
    """What ``load`` writes lies in one buffer per field, (row, head) after (row, head), with offsets; tokens
    appended since lie in a rectangular tail, since every head gets one slot per token."""

    def __init__(self, stats: dict[str, float]) -> None:
        super().__init__(stats)
        self.body: dict[str, Tensor] = {}  # fields (N, …) over all slots, and "lengths" (B,H) int64
        self.recent = DenseStore(stats)
        self._longest = 0

    @property
    def length(self) -> int:
        return self._longest + self.recent.length

    @property
    def tail(self) -> int:
        return self.recent.length

    @property
    def is_plain(self) -> bool:
        return not self.body

    def append(self, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        self.recent.append(keys, values, positions)

    def _offsets(self) -> Tensor:
        lengths = self.body["lengths"].flatten()
        return (lengths.cumsum(0) - lengths).view_as(self.body["lengths"])

    def _gather(self, columns: Tensor) -> dict[str, Tensor]:
        """Fields (B,H,len(columns),…) at ``columns`` (c,) counted from each segment's start; empty outside of it."""
        lengths = self.body["lengths"][..., None]
        inside = (columns >= 0) & (columns < lengths) if columns.dim() > 1 else (columns[None, None] < lengths)
        index = (self._offsets()[..., None] + columns).clamp_(0, max(0, self.body["positions"].shape[0] - 1))
        out = {name: x[index] for name, x in self.body.items() if name != "lengths"}
        out["positions"] = out["positions"].masked_fill(~inside, EMPTY)
        return out

    def parts(self) -> Iterator[Part]:
        for start in range(0, self._longest, TILE):
            stop = min(start + TILE, self._longest)
            got = self._gather(torch.arange(start, stop, device=self.body["lengths"].device))
            yield Part(got["keys"], got["values"], got.get("log_votes"), got["positions"])
        if self.recent.length:
            yield from self.recent.parts()

    def load(self, slots: Slots) -> None:
        valid = slots.valid
        fields = {"keys": slots.keys, "values": slots.values, "positions": slots.positions, **slots.stats}
        if bool(slots.log_votes.any()):
            fields["log_votes"] = slots.log_votes
        self.body = {name: x[valid] for name, x in fields.items()}
        self.body["lengths"] = slots.lengths
        self._longest = int(slots.lengths.max())
        self.recent = DenseStore(self.stats)

    def view(self) -> Slots:
        if not self.body:
            return self.recent.view()
        lengths = self.body["lengths"][..., None]
        columns = torch.arange(self._longest, device=lengths.device) - self._longest + lengths
        got = self._gather(columns)
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
        columns = torch.arange(self._longest, device=rows.device).expand(*lengths.shape, -1)
        inside = columns < lengths[..., None]
        source = (self._offsets()[rows][..., None] + columns)[inside]
        self.body = {name: x[source] for name, x in self.body.items() if name != "lengths"}
        self.body["lengths"] = lengths
        self._longest = int(lengths.max())

    def crop(self, tokens: int) -> None:
        self.recent.crop(tokens)

    def tensors(self) -> dict[str, Tensor]:
        body = {f"body.{name}": x for name, x in self.body.items()}
        return body | {f"tail.{name}": x for name, x in self.recent.tensors().items()}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        self.body = {name[5:]: x for name, x in tensors.items() if name.startswith("body.")}
        tail = {name[5:]: x for name, x in tensors.items() if name.startswith("tail.")}
        self.recent = DenseStore(self.stats)
        if tail:
            self.recent.restore(tail)
        self._longest = int(self.body["lengths"].max()) if self.body else 0
