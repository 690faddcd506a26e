"""Rectangular store: one buffer per field, grown in place with slack."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from keepkv.attention.part import Part
from keepkv.core.slots import EMPTY, Slots
from keepkv.store.base import STORES, Store, filled

SLACK = 8  # columns allocated beyond need when a single token does not fit, or 1/16 of the length if more


@STORES.register("dense")
class DenseStore(Store):
    """Every (row, head) has the same number of columns; shorter ones start with empty slots.

    Fields are (B,H,capacity,…) of which the first ``length`` columns are used. A multi-token forward allocates
    exactly; a one-token forward that does not fit grows by slack, so that decode does not copy per token.
    """

    views_share_memory = True
    is_plain = True

    def __init__(self, stats: dict[str, float]) -> None:
        super().__init__(stats)
        self.fields: dict[str, Tensor] = {}
        self._length = 0
        self._tail = 0

    @property
    def length(self) -> int:
        return self._length

    @property
    def tail(self) -> int:
        return self._tail

    @property
    def capacity(self) -> int:
        return self.fields["positions"].shape[2] if self.fields else 0

    def append(self, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        b, h, t, _ = keys.shape
        new = {"keys": keys, "values": values, "positions": positions[:, None].expand(b, h, t).to(torch.int32)}
        if not self.fields:
            self.fields = {name: _own(x) for name, x in new.items()}
            for name, start in self.stats.items():
                self.fields[name] = filled(keys, (b, h, t), start, torch.float32)
        else:
            if self._length + t > self.capacity:
                self._grow(self._length + t + (max(SLACK, self._length // 16) if t == 1 else 0))
            for name, x in new.items():
                self.fields[name][:, :, self._length : self._length + t] = x
        self._length += t
        self._tail += t

    def _grow(self, capacity: int) -> None:
        for name, x in self.fields.items():
            start = {"positions": float(EMPTY)}.get(name, self.stats.get(name, 0.0))
            grown = filled(x, (*x.shape[:2], capacity, *x.shape[3:]), start)
            grown[:, :, : self._length] = x[:, :, : self._length]
            self.fields[name] = grown

    def _used(self) -> dict[str, Tensor]:
        return {name: x[:, :, : self._length] for name, x in self.fields.items()}

    def parts(self) -> Iterator[Part]:
        used = self._used()
        yield Part(used["keys"], used["values"], used.get("log_votes"), used["positions"])

    def load(self, slots: Slots) -> None:
        self.fields = {"keys": slots.keys, "values": slots.values, "positions": slots.positions, **slots.stats}
        if bool(slots.log_votes.any()):
            self.fields["log_votes"] = slots.log_votes
        self.fields = {name: _own(x) for name, x in self.fields.items()}
        self._length, self._tail = slots.positions.shape[2], 0

    def view(self) -> Slots:
        used = self._used()
        votes = used.get("log_votes")
        if votes is None:
            votes = filled(used["keys"], tuple(used["positions"].shape), 0.0, torch.float32)
        stats = {name: used[name] for name in self.stats}
        return Slots(used["keys"], used["values"], votes, used["positions"], stats)

    def put(self, stats: dict[str, Tensor]) -> None:
        for name, x in stats.items():
            self.fields[name][:, :, : self._length] = x

    def index(self, rows: Tensor) -> None:
        self.fields = {name: x.index_select(0, rows.to(x.device)) for name, x in self.fields.items()}

    def crop(self, tokens: int) -> None:
        end = self._length - tokens
        for name, x in self.fields.items():  # growth relies on unused columns holding start values
            x[:, :, end : self._length] = {"positions": EMPTY}.get(name, self.stats.get(name, 0.0))
        self._length, self._tail = end, self._tail - tokens

    def tensors(self) -> dict[str, Tensor]:
        if not self.fields:
            return {}
        counts = torch.tensor([self._length, self._tail])
        return {**self.fields, "counts": counts}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        counts = tensors["counts"]
        self._length, self._tail = int(counts[0]), int(counts[1])
        self.fields = {name: x for name, x in tensors.items() if name != "counts"}


def _own(x: Tensor) -> Tensor:
    """``x`` in a storage that keeps nothing else alive, head after head: attention reads keys that lie token by token,
    as projections leave them, a sixth slower than the copy costs."""
    x = x.contiguous()
    return x if x.untyped_storage().nbytes() == x.numel() * x.element_size() else x.clone()
