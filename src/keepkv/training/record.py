"""The record: when each token left each KV head, one integer each. All that a replay needs to know of a compression."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from keepkv.errors import UnsupportedInput

NEVER = torch.iinfo(torch.int32).max  # of a token that never left


@dataclass(frozen=True)
class Record:
    """When tokens left while a cache read and decoded them (G-KV, arXiv 2512.00504, §10.1 of our specification).

    evict_at (B,N,S) int32: the position of the first query of that row that no longer sees token s in head n, ``NEVER``
        where all do. Rows come first, so that a batch can be shuffled and split like any other tensor. N counts the KV
        heads of all compressed layers, one layer after another; positions count the tokens of a row without padding.
    heads: how many of the N belong to each layer, by its index in the model. With latent attention a layer has one.

    Eviction never brings a token back, so one integer says which queries saw it: token j is visible to query i where
    j ≤ i and i < evict_at[j].
    """

    evict_at: Tensor
    heads: dict[int, int]

    def of(self, layer: int) -> Tensor:
        """(B,H,S) int32 of one compressed layer."""
        before = sum(n for index, n in self.heads.items() if index < layer)
        return self.evict_at[:, before : before + self.heads[layer]]

    def rows(self, which: Tensor | slice) -> Record:
        """Of some rows: indices (R,) int64, or a slice."""
        return Record(self.evict_at[which], self.heads)

    def to(self, device: torch.device | str) -> Record:
        """The same, on ``device``."""
        return Record(self.evict_at.to(device), self.heads)

    def wide(self, columns: int) -> Record:
        """Of at least ``columns`` tokens, the later of which never leave: where nothing was compressed any more."""
        return Record(pad(self.evict_at, (0, max(0, columns - self.evict_at.shape[-1])), value=NEVER), self.heads)

    @property
    def evicted(self) -> int:
        """Pairs of a token and a KV head that parted, all rows together."""
        return int((self.evict_at != NEVER).sum())

    @property
    def nbytes(self) -> int:
        """Bytes of the integers: 4·B·N·S."""
        return self.evict_at.nbytes

    @property
    def mask_bytes(self) -> int:
        """Bytes of the same as one bool per query, token and KV head: B·N·S²."""
        return self.evict_at.numel() * self.evict_at.shape[-1]

    def __repr__(self) -> str:
        rows, heads, tokens = self.evict_at.shape
        sizes = f"{rows} rows, {heads} KV heads of {len(self.heads)} layers, {tokens} tokens"
        return f"Record({sizes}, {self.evicted} evictions, {self.nbytes} bytes)"


def joined(records: Sequence[Record]) -> Record:
    """The rows of several records of one model, one after another; shorter ones lost nothing later.

    Raises ``UnsupportedInput`` where they are of models with other layers or heads, or where there is none.
    """
    if not records or any(one.heads != records[0].heads for one in records):
        raise UnsupportedInput(
            f"{len(records)} records of {'different layers or heads' if records else 'nothing'} were to be joined: "
            "give at least one, all of the same model"
        )
    width = max(one.evict_at.shape[-1] for one in records)
    return Record(torch.cat([one.wide(width).evict_at for one in records]), records[0].heads)
