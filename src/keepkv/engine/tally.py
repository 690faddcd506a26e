"""What happened to the slots of a layer, for the receipt."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from keepkv.core.slots import LayerView
from keepkv.observe.attention import weights

COUNTS = ("merged", "dropped", "votes_dropped", "mass_dropped")


@dataclass
class Tally:
    """Counts of one layer. Tensors are (B,H), or None before a compression.

    overflows: compressions whose budget did not hold what spans demand. seconds: spent compressing. votes_dropped:
    tokens that the dropped slots stood for. mass_dropped (B,): share of the last query's attention given up, summed;
    None where it is not known. selections: decoded tokens that attended to some of the slots; measured: of these, how
    many compared their attention with that over all; mass_selected: its share that they kept, summed; recall_selected:
    the share of the slots of greatest attention that they took, summed. bytes_read, bytes_there: of one row, what the
    latest of these read, and what it would have read without a selection.
    """

    compressions: int = 0
    overflows: int = 0
    seconds: float = 0.0
    selections: int = 0
    measured: int = 0
    mass_selected: float = 0.0
    recall_selected: float = 0.0
    bytes_read: float = 0.0
    bytes_there: float = 0.0
    merged: Tensor | None = None
    dropped: Tensor | None = None
    votes_dropped: Tensor | None = None
    mass_dropped: Tensor | None = None

    def count(self, view: LayerView, merged: Tensor | None, lost: Tensor) -> None:
        """Add one compression of ``view``: merged (B,H), slots that entered another, None for none; lost (B,H,S) bool,
        those that left."""
        dropped = lost.sum(-1)
        self._add("dropped", dropped)
        self._add("merged", torch.zeros_like(dropped) if merged is None else merged)
        votes = view.slots.log_votes
        one_each = not bool(votes.any())
        self._add("votes_dropped", dropped.double() if one_each else (votes.double().exp() * lost).sum(-1))
        if view.queries.shape[2]:
            share = weights(view, view.queries[:, :, -1:], view.query_positions[:, -1:])[:, :, :, 0].mean(2)
            self._add("mass_dropped", (share * lost).sum(-1).mean(-1))
        self.compressions += 1

    def _add(self, name: str, x: Tensor) -> None:
        held: Tensor | None = getattr(self, name)
        setattr(self, name, x if held is None else held + x)

    def tensors(self) -> dict[str, Tensor]:
        """The counts that there are, by name."""
        return {name: x for name in COUNTS if (x := getattr(self, name)) is not None}

    def index(self, rows: Tensor) -> None:
        """Row i becomes the present row ``rows[i]``."""
        for name, x in self.tensors().items():
            setattr(self, name, x.index_select(0, rows))

    def join(self, other: Tally, rows: tuple[int, int]) -> None:
        """Add the rows of ``other``; rows: how many each has. A count that one lacks is 0 there."""
        for name, like in {**other.tensors(), **self.tensors()}.items():
            both = [getattr(x, name) for x in (self, other)]
            blank = [like.new_zeros(count, *like.shape[1:]) for count in rows]
            setattr(self, name, torch.cat([b if x is None else x for x, b in zip(both, blank, strict=True)]))
        self.compressions = max(self.compressions, other.compressions)
        self.overflows = max(self.overflows, other.overflows)
        self.seconds += other.seconds
        self.selections = max(self.selections, other.selections)
        for name in ("measured", "mass_selected", "recall_selected"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
