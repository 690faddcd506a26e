"""What is known of the tokens of a row beside their order: rotary positions, modality, time step and cell."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

TEXT, IMAGE, VIDEO = 0, 1, 2  # kinds of tokens
KIND, STEP, CELL = -3, -2, -1  # behind the A rotary positions of a token
FACTS = 3  # how many these are
MOVED = "moved"  # statistic of slots whose keys were turned to other positions: by how much
FAR = torch.iinfo(torch.int64).max  # index of an entry that a row does not have


@dataclass(frozen=True)
class Coming:
    """What is said of the T columns of a forward before it begins.

    places (B,T,A): rotary positions; None: they go on from the token before. kinds (B,T): ``TEXT``, ``IMAGE`` or
    ``VIDEO``; None: text. starts (B,T) bool: vision tokens that begin a time step, beside those that are seen to.
    """

    places: Tensor | None = None
    kinds: Tensor | None = None
    starts: Tensor | None = None

    def fits(self, positions: Tensor) -> bool:
        """Whether it is of as many tokens as ``positions`` (B,T)."""
        return all(x is None or x.shape[:2] == positions.shape for x in (self.places, self.kinds, self.starts))


@dataclass(frozen=True)
class Tokens:
    """Facts of tokens by their index in the row, as runs: what is not written goes on from the token before.

    at (B,N) int64: indices of the tokens that begin a run, ascending, ``FAR`` behind the last. facts (B,N,A+3) int32:
    their A rotary positions, kind, time step and cell. Within a run each position counts on by one, and so does the
    cell of vision; kind and step stay. So text is one run however long, and so is a frame where A is 1.

    The time step of a vision token counts steps of its row from 0: frames, or what the model makes one of. Its cell is
    its place in the step. Text has the step before it, −1 where there is none, and cell −1.
    """

    at: Tensor
    facts: Tensor

    @classmethod
    def text(cls, rows: int, axes: int, device: torch.device | str = "cpu") -> Tokens:
        """Of ``rows`` that are text, each token at its index."""
        facts = torch.tensor([*[0] * axes, TEXT, -1, -1], dtype=torch.int32, device=device)
        return cls(torch.zeros(rows, 1, dtype=torch.int64, device=device), facts.expand(rows, 1, -1))

    @property
    def axes(self) -> int:
        """A: rotary positions of a token."""
        return self.facts.shape[-1] - FACTS

    def of(self, positions: Tensor) -> Tensor:
        """Facts (B,…,A+3) of the tokens at ``positions`` (B,…); of those below 0 anything."""
        wanted = positions.flatten(1).long().clamp(min=0).contiguous()
        run = self._run(wanted)
        facts = self.facts.gather(1, run[..., None].expand(*run.shape, self.facts.shape[-1]))
        ahead = (wanted - self.at.gather(1, run)).to(facts.dtype)
        return (facts + ahead[..., None] * _slope(facts)).view(*positions.shape, self.facts.shape[-1])

    def places(self, positions: Tensor) -> Tensor:
        """Rotary positions of the tokens at ``positions`` (B,…): (B,…) where each has one, else (B,…,A)."""
        facts = self.of(positions)[..., :-FACTS]
        return facts[..., 0] if self.axes == 1 else facts

    def _run(self, wanted: Tensor) -> Tensor:
        return (torch.searchsorted(self.at, wanted, right=True) - 1).clamp(min=0)

    # --- what comes, and what goes -------------------------------------------------------------------------------

    def extended(self, positions: Tensor, coming: Coming) -> Tokens:
        """With tokens at ``positions`` (B,T), below 0 where there is none, of which ``coming`` tells."""
        if coming.starts is None and self._go_on(positions, coming):
            return self
        rows = []
        for row, at in enumerate(positions):
            real = at >= 0
            told = [None if x is None else x[row][real] for x in (coming.places, coming.kinds, coming.starts)]
            rows.append(self._row(row, at[real], *told))
        return self._with(rows)

    def _go_on(self, positions: Tensor, coming: Coming) -> bool:
        """Whether all of this was to be expected."""
        facts = self.of(positions)
        told = facts[..., KIND] == (TEXT if coming.kinds is None else coming.kinds)
        if coming.places is not None:
            told &= (facts[..., :-FACTS] == coming.places).all(-1)
        return bool((told | (positions < 0)).all())

    def _row(
        self, row: int, at: Tensor, places: Tensor | None, kinds: Tensor | None, starts: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Runs of one row that begin with tokens ``at`` (n,): their indices and facts."""
        n, axes = len(at), self.axes
        first = at[:1] - 1
        before = Tokens(self.at[row : row + 1], self.facts[row : row + 1]).of(first[None])[0]  # (1,A+3), or (0,A+3)
        if bool((first < 0).any()):
            before = before.new_tensor([[*[-1] * axes, TEXT, -1, -1]])
        order = torch.arange(n, device=at.device)
        facts = before.new_empty(n, axes + FACTS)
        facts[:, :axes] = before[:, :axes] + 1 + order[:, None] if places is None else places
        facts[:, KIND] = TEXT if kinds is None else kinds
        seen, past = facts[:, KIND] != TEXT, torch.cat((before, facts[:-1]))[:n]
        begins = facts[:, KIND] != past[:, KIND]
        if axes > 1:
            begins |= facts[:, 0] != past[:, 0]
        begins = seen & (begins if starts is None else begins | starts)
        facts[:, STEP] = before[:, STEP] + begins.cumsum(0)
        since = torch.where(begins, order, -1).cummax(0).values if n else order
        facts[:, CELL] = torch.where(since >= 0, order - since, before[:, CELL] + 1 + order)
        facts[:, CELL].masked_fill_(~seen, -1)
        past = torch.cat((before, facts[:-1]))[:n]
        runs = (facts != past + _slope(past)).any(-1)
        return at[runs], facts[runs]

    def _with(self, rows: list[tuple[Tensor, Tensor]]) -> Tokens:
        """With further runs, those of each row given."""
        most = max((len(at) for at, _ in rows), default=0)
        if not most:
            return self
        held = (self.at != FAR).sum(-1).tolist()
        size = max(n + len(at) for n, (at, _) in zip(held, rows, strict=True))
        at, facts = self._blank(len(rows), size)
        for row, (n, (new, told)) in enumerate(zip(held, rows, strict=True)):
            at[row, :n], facts[row, :n] = self.at[row, :n], self.facts[row, :n]
            at[row, n : n + len(new)], facts[row, n : n + len(new)] = new, told
        return Tokens(at, facts)

    def before(self, seen: Tensor) -> Tokens:
        """Without tokens from ``seen`` (B,) of each row on."""
        return self._picked((self.at < seen[:, None]) | (self.at == 0))

    def kept(self, held: Tensor) -> Tokens:
        """Without runs of which no token is among ``held`` (B,n), indices of tokens, below 0 for none; what comes next
        goes on all the same."""
        last = (self.at != FAR).sum(-1, keepdim=True) - 1
        used = torch.zeros_like(self.at, dtype=torch.bool).scatter_(1, last, True)
        run = self._run(held.clamp(min=0))
        used.scatter_(1, torch.where(held >= 0, run, last), True)
        return self._picked(used)

    def _picked(self, used: Tensor) -> Tokens:
        """Runs where ``used`` (B,N) bool."""
        used = used & (self.at != FAR)
        size = max(1, int(used.sum(-1).max()))
        order = (~used).to(torch.int8).sort(dim=-1, stable=True).indices[:, :size]
        at = self.at.gather(1, order).masked_fill(~used.gather(1, order), FAR)
        return Tokens(at, self.facts.gather(1, order[..., None].expand(*order.shape, self.facts.shape[-1])))

    # --- rows ----------------------------------------------------------------------------------------------------

    def rows(self, rows: Tensor) -> Tokens:
        """Row i of the result is the present row ``rows[i]``."""
        rows = rows.to(self.at.device)
        return Tokens(self.at[rows], self.facts[rows])

    def joined(self, other: Tokens) -> Tokens:
        """These rows, and those of ``other`` behind them."""
        size = max(self.at.shape[1], other.at.shape[1])
        at, facts = self._blank(len(self.at) + len(other.at), size)
        for start, one in ((0, self), (len(self.at), other)):
            part = slice(start, start + len(one.at)), slice(0, one.at.shape[1])
            at[part], facts[part] = one.at.to(at.device), one.facts.to(at.device)
        return Tokens(at, facts)

    def _blank(self, rows: int, size: int) -> tuple[Tensor, Tensor]:
        return self.at.new_full((rows, size), FAR), self.facts.new_zeros(rows, size, self.facts.shape[-1])


def steps_of(by: Tensor, kinds: Tensor, axes: int) -> Tensor:
    """What (…[,A]) to add to rotary positions of tokens that move ``by`` (…) in time: text on all axes, vision of
    ``kinds`` (…) stays at its height and width."""
    if axes == 1:
        return by
    by = by[..., None].expand(*by.shape, axes).clone()
    by[..., 1:].masked_fill_((kinds != TEXT)[..., None], 0)
    return by


def _slope(facts: Tensor) -> Tensor:
    """By how much each of ``facts`` (…,A+3) changes from a token to the next one of its run."""
    slope = torch.ones_like(facts)
    slope[..., KIND] = slope[..., STEP] = 0
    slope[..., CELL] = facts[..., KIND] != TEXT
    return slope
