"""Which token of its row each column of a forward is. Shared by the layers of a cache."""

from __future__ import annotations

import torch
from torch import Tensor

from keepkv.core.slots import EMPTY
from keepkv.errors import CacheStateError, UnsupportedInput


class RowPositions:
    """Counts tokens per row, without padding.

    columns: tokens fed so far, padding included (the logical length transformers knows). seen (B,): tokens of each
    row. positions (B,T): of the latest forward, ``EMPTY`` for padding. gaps: whether a row has padding between its
    tokens. One-token steps update in place, so that compiled decode reads the same addresses.
    """

    def __init__(self) -> None:
        self.columns = 0
        self.columns_tensor = torch.zeros((), dtype=torch.int64)  # the same for compiled code, which reads no numbers
        self.seen: Tensor | None = None
        self.positions: Tensor | None = None
        self.gaps: Tensor | bool = False

    def begin(self, batch: int, length: int, padding: Tensor | None, device: torch.device) -> None:
        """A forward of ``length`` columns starts; ``padding`` (B, all columns) bool or None."""
        if self.seen is None:
            self.seen = torch.zeros(batch, dtype=torch.int64, device=device)
            self.columns_tensor = self.columns_tensor.to(device)
        elif self.seen.shape[0] != batch:
            raise UnsupportedInput(
                f"a batch of {batch} was given to a cache that holds {self.seen.shape[0]} rows. Use "
                "cache.batch_repeat_interleave(n) to ask several questions, or cache.reset() for a new batch."
            )
        if padding is None:
            new = torch.ones(batch, length, dtype=torch.bool, device=device)
        else:
            new = padding[:, -length:].to(device)
            self.gaps = self.gaps | (~new & (self.seen > 0)[:, None]).any()  # read later: no wait in each step
            # Left padding only: a row that ends in padding would continue from a padding token.
            if length > 1 and bool((~new[:, -1] & new.any(-1)).any()):
                raise UnsupportedInput(
                    "right padding: a row of the attention mask ends in 0 after real tokens. Pad on the left: "
                    "tokenizer.padding_side = 'left'."
                )
        positions = (new.cumsum(-1) - 1 + self.seen[:, None]).masked_fill(~new, EMPTY)
        if self.positions is not None and self.positions.shape == positions.shape and length == 1:
            self.positions.copy_(positions)
        else:
            self.positions = positions
        self.seen += new.sum(-1)
        self.columns += length
        self.columns_tensor.fill_(self.columns)

    def crop(self, tokens: int) -> None:
        """Take back the newest ``tokens`` columns."""
        if self.seen is None or self.positions is None:
            return
        latest = min(tokens, self.positions.shape[1])
        self.seen -= (self.positions[:, self.positions.shape[1] - latest :] >= 0).sum(-1)
        self.seen -= tokens - latest  # earlier columns of a rollback are decoded tokens, never padding
        self.positions = self.positions[:, : self.positions.shape[1] - latest]
        self.columns -= tokens

    def index(self, rows: Tensor) -> None:
        """Row i becomes the present row ``rows[i]``."""
        if self.seen is None or self.positions is None:
            return
        rows = rows.to(self.seen.device)
        if len(rows) == self.seen.shape[0]:
            self.seen.copy_(self.seen[rows])
            self.positions.copy_(self.positions[rows])
        else:
            self.seen, self.positions = self.seen[rows], self.positions[rows]

    def copy(self) -> RowPositions:
        """An independent copy."""
        twin = RowPositions()
        twin.__dict__.update({name: x.clone() if isinstance(x, Tensor) else x for name, x in self.__dict__.items()})
        return twin

    def join(self, other: RowPositions) -> None:
        """Add the rows of ``other``; the shorter ones count as padded on the left."""
        if self.seen is None or other.seen is None:
            raise CacheStateError("a cache that has read nothing was joined: feed its prompt first")
        self.seen = torch.cat((self.seen, other.seen.to(self.seen.device)))
        self.positions = self.seen[:, None] - 1  # also where the newest tokens were taken back
        self.gaps = self.gaps | other.gaps
        self._count(max(self.columns, other.columns))

    def trim(self) -> int:
        """Forget columns before the first token of every row; returns how many. Not possible where rows have gaps."""
        if self.seen is None or bool(self.gaps) or not self.seen.numel():
            return 0
        spare = self.columns - int(self.seen.max())
        self._count(self.columns - spare)
        return spare

    def _count(self, columns: int) -> None:
        self.columns = columns
        self.columns_tensor = torch.full_like(self.columns_tensor, columns)
