"""Slots: what score, allocate and reduce see of one layer, as plain tensors.

Symbols: B rows (batch), H KV heads, G query heads per KV head, S slots, T queries, D and Dv head dims.
A piece that knows only this file can be tested on plain tensors and reused by any engine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from keepkv.core.pick import pick
from keepkv.core.rope import Rope
from keepkv.core.tokens import KIND, MOVED, Tokens, steps_of

if TYPE_CHECKING:
    from keepkv.core.intervals import Intervals

EMPTY = -1  # position of a slot that holds nothing


@dataclass
class Slots:
    """The slots of one layer in rectangular form, empty ones first within each (row, head).

    keys (B,H,S,D) and values (B,H,S,Dv) in the model's dtype; log_votes (B,H,S) float32, the bias added to a
    slot's attention logit (0 for an original token); positions (B,H,S) int32, the token's index in its row not
    counting padding (of the anchor for a merged slot), ``EMPTY`` where nothing is stored; stats: what a score
    keeps per slot, each (B,H,S) float32.
    """

    keys: Tensor
    values: Tensor
    log_votes: Tensor
    positions: Tensor
    stats: dict[str, Tensor] = field(default_factory=dict)

    @property
    def valid(self) -> Tensor:
        """(B,H,S) bool: slots that hold something."""
        return self.positions >= 0

    @property
    def lengths(self) -> Tensor:
        """(B,H) int64: valid slots of each row and head."""
        return self.valid.sum(-1)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(B, H, S)."""
        b, h, s = self.positions.shape
        return b, h, s

    def select(self, keep: Tensor) -> Slots:
        """The slots where ``keep`` (B,H,S) bool is true, order kept, empty ones first; a new object.

        The result has as many slots as the fullest (row, head) keeps.
        """
        order, kept = self.kept_indices(keep)
        chosen = self.take(order)
        chosen.positions.masked_fill_(~kept, EMPTY)
        return chosen

    def take(self, columns: Tensor) -> Slots:
        """The slots at ``columns`` (B,H,K); a new object."""
        return self.map(partial(pick, columns=columns))

    def kept_indices(self, keep: Tensor) -> tuple[Tensor, Tensor]:
        """Where ``select`` takes its slots from, (B,H,K) int64, and which of them are kept, (B,H,K) bool."""
        keep = keep & self.valid
        least, size = torch.stack(keep.sum(-1).aminmax()).tolist() if keep.numel() else (0, 0)
        if least == size:  # of every head: nothing is left open
            order = keep.nonzero()[:, 2].view(*keep.shape[:2], size)
            return order, torch.ones_like(order, dtype=torch.bool)
        # A stable sort moves kept slots behind the others without changing their order.
        order = keep.to(torch.int8).sort(dim=-1, stable=True).indices[..., keep.shape[-1] - size :]
        return order, keep.gather(-1, order)

    def map(self, change: Callable[[Tensor], Tensor]) -> Slots:
        """``change`` applied to every field (B,H,S,…); a new object."""
        stats = {name: change(x) for name, x in self.stats.items()}
        return Slots(change(self.keys), change(self.values), change(self.log_votes), change(self.positions), stats)

    def join(self, newer: Slots) -> Slots:
        """These slots followed by ``newer`` ones of the same rows and heads."""
        keys, values, votes, positions = (
            torch.cat((getattr(self, name), getattr(newer, name)), dim=2)
            for name in ("keys", "values", "log_votes", "positions")
        )
        stats = {name: torch.cat((x, newer.stats[name]), dim=2) for name, x in self.stats.items()}
        return Slots(keys, values, votes, positions, stats)

    def with_(self, **changes: Tensor | dict[str, Tensor]) -> Slots:
        """A copy with some fields replaced."""
        return replace(self, **changes)  # type: ignore[arg-type]


@dataclass
class LayerView:
    """Everything a piece may look at when one layer is observed or compressed.

    slots: the layer's slots, the newest last.
    queries (B, H*G, T, D): queries of the latest forward, after RoPE, query heads of a KV head adjacent;
        T may be 0 when compression was deferred: then only what ``observe`` kept is known.
    query_positions (B,T) int64: their positions, ``EMPTY`` for padding.
    state: what score and reduction remember per row, each with leading dimension B; follows rows in beam search.
    seen (B,) int64: tokens of each row so far, padding not counted = the next position.
    budget (B,) int64: slots per KV head that the compression may leave on average; None where none is under way.
    scaling, softcap, sink_logits: of the attention: logits = softcap(q·k·scaling) + log_votes, and an extra softmax
        entry per query head with logit ``sink_logits`` (H*G,) where the model has attention sinks.
    """

    slots: Slots
    queries: Tensor
    query_positions: Tensor
    seen: Tensor
    scaling: float
    state: dict[str, Tensor] = field(default_factory=dict)
    softcap: float | None = None
    sink_logits: Tensor | None = None
    rope: Rope | None = None
    layer: int = 0
    layers: int = 1
    seed: int = 0
    protected: Tensor | None = (
        None  # (B,H,S) bool: sinks, recent window, protected spans: always kept, never merge targets
    )
    memo: dict[str, Tensor] = field(default_factory=dict)  # what a piece computed from this view that others may use
    weights: Tensor | None = None  # (B,H,G,S): attention of the latest query, where it was one and computed them
    budget: Tensor | None = None
    tokens: Tokens | None = None  # facts of the tokens behind slots and queries; None: text, at the index of each
    spans: Intervals | None = None  # where given, each slot inside is scored by the queries of its own span alone
    calibration: Mapping[str, Tensor] | None = None  # of this layer, by name, where ``needs_calibration`` asks for it
    hidden: Tensor | None = None  # (B,T,E): what the attention module was fed, in ``observe`` where ``needs_hidden``
    prompt: bool = False  # whether ``queries`` are of a prompt, even if it is one token: the last chunk of it
    output: Tensor | None = None  # (H*G,Dv,E): weight of the output projection, where ``needs_output`` asks for it

    @property
    def query_groups(self) -> int:
        """G: query heads per KV head."""
        return self.queries.shape[1] // self.slots.positions.shape[1]

    def places(self, positions: Tensor) -> Tensor:
        """Rotary positions, as ``rope`` takes them, of tokens at ``positions`` (B,…): (B,…), with M-RoPE (B,…,A)."""
        if self.tokens is not None:
            return self.tokens.places(positions)
        axes = 1 if self.rope is None else self.rope.axes
        return positions if axes == 1 else positions[..., None].expand(*positions.shape, axes)

    def key_places(self) -> Tensor:
        """Rotary positions of the slots' keys, (B,H,S[,A]): their tokens', and what they were moved by since."""
        positions, moved = self.slots.positions, self.slots.stats.get(MOVED)
        places = self.places(positions)
        if moved is None or self.tokens is None:
            return places
        kinds = self.tokens.of(positions)[..., KIND]
        return places + steps_of(moved.to(places.dtype), kinds, self.tokens.axes)

    def next_place(self) -> Tensor:
        """(B,) int64: the rotary position of the next token of each row, if it is text."""
        after = self.places(self.seen[:, None])[:, 0]
        return after if after.dim() == 1 else after.amax(-1)
