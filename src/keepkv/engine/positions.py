"""Which token of its row each column of a forward is. Shared by the layers of a cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from keepkv.core.slots import EMPTY
from keepkv.core.tokens import Coming, Tokens
from keepkv.errors import CacheStateError, UnsupportedInput


class RowPositions:
    """Counts tokens per row, without padding.

    columns: fed so far, padding included (the logical length transformers knows). seen (B,): tokens of each row.
    positions (B,T): of the latest forward, ``EMPTY`` for padding. tokens (B,columns) bool: which columns hold a token;
    None: all of them. offsets (B,1): what the model adds behind images, see ``engine.offsets``; None: nothing.
    axes: rotary positions of a token. known: what is known of tokens beside their index; None: all are text, and their
    index is their rotary position. coming: what was said of the forward that is about to begin; told: by the user, see
    ``engine.places``. One-token steps update in place, so that compiled decode reads the same addresses.
    """

    def __init__(self, axes: int = 1) -> None:
        self.axes = axes
        self.columns = 0
        self.columns_tensor = torch.zeros((), dtype=torch.int64)  # the same for compiled code, which reads no numbers
        self.seen: Tensor | None = None
        self.positions: Tensor | None = None
        self.tokens: Tensor | None = None
        self.offsets: Tensor | None = None
        self.known: Tokens | None = None
        self.coming: Coming | None = None
        self.told: Coming | None = None

    @property
    def gaps(self) -> bool:
        """Whether a row has padding between its tokens."""
        return self.tokens is not None and bool((~self.tokens & (self.tokens.cumsum(-1) > 0)).any())

    def check(self, batch: int, length: int, padding: Tensor | None) -> None:
        """Refuse a forward of ``length`` columns that does not continue these rows; ``padding`` as ``begin`` takes it.

        What the mask says of past columns is compared by ``hidden``.
        """
        if self.seen is not None and self.seen.shape[0] != batch:
            raise UnsupportedInput(
                f"a batch of {batch} was given to a cache that holds {self.seen.shape[0]} rows. Use "
                "cache.batch_repeat_interleave(n) to ask several questions, or cache.reset() for a new batch."
            )
        if padding is None:
            return
        if padding.shape[1] != self.columns + length:
            raise UnsupportedInput(
                f"an attention mask of {padding.shape[1]} columns for {length} new tokens behind {self.columns}: give "
                f"one of {self.columns + length}, a 1 or a 0 for each column that was read and for each new one."
            )
        if length == 1:
            return
        new = padding[:, -length:]
        # Left padding only: a row that ends in padding would continue from a padding token.
        if bool((~new[:, -1] & new.any(-1)).any()):
            raise UnsupportedInput(
                "right padding: a row of the attention mask ends in 0 after real tokens. Pad on the left: "
                "tokenizer.padding_side = 'left'."
            )

    def hidden(self, padding: Tensor | None) -> tuple[int, Tensor] | None:
        """What a mask that begins with the past columns hides of them: the first such column, and how many tokens of
        each row (B,) it takes from its end; None: nothing.

        padding (B, all columns) bool, or None: every column is a token. Raises ``UnsupportedInput`` where the mask
        hides tokens with others behind them, or shows padding: what was computed and dropped since cannot be undone.
        """
        if not self.columns or self.seen is None or (padding is None and self.tokens is None):
            return None
        told = torch.ones_like(padding[:, : self.columns]) if self.tokens is None else self.tokens  # type: ignore[index]
        now = torch.ones_like(told) if padding is None else padding[:, : self.columns].to(told.device)
        if torch.equal(told, now):
            return None
        lost = told & ~now
        behind = told & (lost.cumsum(-1) > 0)
        if bool((now & ~told).any()) or not torch.equal(behind, lost):
            rows = (now != told).any(-1).nonzero()[:, 0].tolist()
            raise UnsupportedInput(
                f"the attention mask says something else of columns that were read before than it said then (rows "
                f"{rows}), and slots were chosen by what it said. Give the same mask again with the new columns behind "
                "it; only the newest tokens of a row may be hidden. cache.attention_mask(new) makes such a mask."
            )
        return int(lost.any(0).nonzero()[0]), lost.sum(-1)

    def hide(self, tokens: Tensor) -> None:
        """Take the newest ``tokens`` (B,) of each row for padding."""
        assert self.seen is not None and self.positions is not None
        told = self.tokens if self.tokens is not None else self._all()
        left = (self.seen - tokens)[:, None]
        self.tokens = told & (told.cumsum(-1) <= left)
        self.positions = self.positions.masked_fill(self.positions >= left, EMPTY)
        self.seen = self.seen - tokens
        self._forget_later()

    def begin(self, batch: int, length: int, padding: Tensor | None, device: torch.device) -> None:
        """A forward of ``length`` columns starts; ``padding`` (B, all columns) bool, False where a column is padding,
        or None. Past columns are as they were told."""
        if self.seen is None:
            self.seen = torch.zeros(batch, dtype=torch.int64, device=device)
            self.columns_tensor = self.columns_tensor.to(device)
        if padding is None:
            new, first = None, self.seen[:, None]
            positions = first.clone() if length == 1 else first + torch.arange(length, device=device)
        else:
            new = padding[:, -length:].to(device)
            self.tokens = padding.to(device, copy=True)  # it is the user's, who may write to it
            positions = (new.cumsum(-1) - 1 + self.seen[:, None]).masked_fill(~new, EMPTY)
        self._learn(positions)
        if self.positions is not None and self.positions.shape == positions.shape and length == 1:
            self.positions.copy_(positions)
        else:
            self.positions = positions
        self.seen += length if new is None else new.sum(-1)
        self._count(self.columns + length)
        if new is None and self.tokens is not None:
            self.tokens = torch.cat((self.tokens, self.tokens.new_ones(batch, length)), dim=1)

    def crop(self, columns: int) -> None:
        """Take back the newest ``columns``."""
        if self.seen is None or self.positions is None or not columns:
            return
        if self.tokens is None:
            self.seen -= columns
        else:
            self.seen -= self.tokens[:, self.columns - columns :].sum(-1)
            self.tokens = self.tokens[:, : self.columns - columns]
        self.positions = self.positions[:, : max(0, self.positions.shape[1] - columns)]
        self._count(self.columns - columns)
        self._forget_later()

    def index(self, rows: Tensor) -> None:
        """Row i becomes the present row ``rows[i]``."""
        if self.seen is None or self.positions is None:
            return
        rows = rows.to(self.seen.device)
        if self.tokens is not None:
            self.tokens = self.tokens[rows]
        if self.offsets is not None:
            self.offsets = self.offsets[rows.to(self.offsets.device)]
        self.known = None if self.known is None else self.known.rows(rows)
        if len(rows) == self.seen.shape[0]:
            self.seen.copy_(self.seen[rows])
            self.positions.copy_(self.positions[rows])
        else:
            self.seen, self.positions = self.seen[rows], self.positions[rows]

    def copy(self) -> RowPositions:
        """An independent copy, in memory that may be written in whatever mode is on now."""
        twin = RowPositions()
        held: dict[str, Any] = {name: x.clone() if isinstance(x, Tensor) else x for name, x in self.__dict__.items()}
        twin.__dict__.update(held)
        return twin

    def join(self, other: RowPositions) -> None:
        """Add the rows of ``other``; the shorter ones count as padded on the left. Neither has gaps."""
        if self.seen is None or other.seen is None:
            raise CacheStateError("a cache that has read nothing was joined: feed its prompt first")
        if self.offsets is not None or other.offsets is not None:
            pair = [(self.seen, self.offsets), (other.seen, other.offsets)]
            self.offsets = torch.cat(
                [(torch.zeros_like(seen)[:, None] if x is None else x).to(self.seen) for seen, x in pair]
            )
        if self.known is not None or other.known is not None:
            self.known = self._known().joined(other._known())
        self.seen = torch.cat((self.seen, other.seen.to(self.seen.device)))
        self.positions = self.seen[:, None] - 1  # also where the newest tokens were taken back
        self._move(max(self.columns, other.columns))

    def trim(self) -> int:
        """Forget columns before the first token of every row; returns how many. Not possible where rows have gaps."""
        if self.seen is None or not self.seen.numel() or self.gaps:
            return 0
        spare = self.columns - int(self.seen.max())
        self._move(self.columns - spare)
        return spare

    def padded_on_the_left(self, columns: int) -> None:
        """Count ``columns``, the last of which are the tokens of each row."""
        self._move(columns)

    def places(self, positions: Tensor) -> Tensor:
        """Rotary positions of the tokens at ``positions`` (B,…): (B,…) where each has one, else (B,…,A)."""
        if self.known is not None:
            return self.known.places(positions)
        return positions if self.axes == 1 else positions[..., None].expand(*positions.shape, self.axes)

    def ahead(self) -> Tensor | None:
        """(B,1) int64: the rotary position of the next token of each row, if it is text, less its index; None: 0."""
        if self.known is None or self.seen is None:
            return None
        after = self.known.places(self.seen[:, None])
        return (after if after.dim() == 2 else after.amax(-1)) - self.seen[:, None]

    def keep(self, held: Tensor) -> None:
        """Forget of tokens what is not needed for those at ``held`` (B,n), nor for what comes."""
        self.known = None if self.known is None else self.known.kept(held)

    def _learn(self, positions: Tensor) -> None:
        """Take over what was said of the tokens at ``positions`` (B,T), if that is more than their number."""
        coming, self.coming = self.coming, None
        if coming is not None and coming.fits(positions):
            learnt = self._known().extended(positions, coming)
            self.known = learnt if self.known is not None or learnt.at.shape[1] > 1 else None

    def _known(self) -> Tokens:
        assert self.seen is not None
        return Tokens.text(len(self.seen), self.axes, self.seen.device) if self.known is None else self.known

    def _forget_later(self) -> None:
        if self.known is not None and self.seen is not None:
            self.known = self.known.before(self.seen)

    def _all(self) -> Tensor:
        assert self.seen is not None
        return torch.ones(len(self.seen), self.columns, dtype=torch.bool, device=self.seen.device)

    def _move(self, columns: int) -> None:
        self.columns = columns
        self.columns_tensor = torch.full_like(self.columns_tensor, columns)
        if self.seen is not None:
            at = torch.arange(columns, device=self.seen.device)
            self.tokens = at >= columns - self.seen[:, None]

    def _count(self, columns: int) -> None:
        self.columns = columns
        self.columns_tensor.fill_(columns)
