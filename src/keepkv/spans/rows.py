"""The spans of the rows that a cache holds, and the group that each token of a row belongs to."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from keepkv.core.intervals import FAR, Intervals
from keepkv.errors import SpanError
from keepkv.spans.base import Span, SpanPolicy


@dataclass(frozen=True)
class Groups:
    """Of each row: K fair spans in the order of the text, then "rest", then "generated": K+2 groups.

    fair (B,K), protect (B,M): intervals, the second without overlaps. weights, min_keep (B,K+2). Tokens of ``protect``
    belong to no group.
    """

    fair: Intervals
    protect: Intervals
    weights: Tensor
    min_keep: Tensor

    def rows(self, which: Tensor) -> Groups:
        """Those of rows ``which``."""
        return Groups(self.fair.rows(which), self.protect.rows(which), self.weights[which], self.min_keep[which])


class RowSpans:
    """Which spans each row of a cache has; follows rows as the clock does.

    which (B,) int64: the list of ``policy.lists`` that a row has; prompt (B,) int64: tokens of a row before the first
    one-token forward, later ones are "generated". None until a forward has begun.
    """

    def __init__(self, policy: SpanPolicy) -> None:
        self.policy = policy
        self.which: Tensor | None = None
        self.prompt: Tensor | None = None
        self._groups: Groups | None = None  # of the present rows

    @property
    def demanding(self) -> bool:
        """Whether something must be kept whatever the budget."""
        return self.policy.prompt or any(x.mode == "protect" or x.min_keep for row in self.policy.lists for x in row)

    def least(self, sinks: int) -> int:
        """Tokens of the protected spans and the first ``sinks`` of a row, in the row that has most."""
        rows = [[*row, *([Span(0, sinks, "protect")] if sinks else [])] for row in self.policy.lists]
        return max((sum(end - start for start, end in _union(row)) for row in rows), default=0)

    # --- rows --------------------------------------------------------------------------------------------------

    def check(self, batch: int) -> None:
        """Raises where there are lists for another number of rows."""
        lists = self.policy.lists
        if self.which is None and not self.policy.every_row and batch != len(lists):
            raise SpanError(
                f"spans for {len(lists)} rows were given to a batch of {batch}. Give one list per row (with beams or "
                "num_return_sequences=n each prompt counts n times), or one list of spans for every row."
            )

    def begin(self, batch: int, device: torch.device) -> None:
        """The first forward of ``batch`` rows."""
        if self.which is None:
            self.check(batch)
            which = torch.arange(batch, device=device)
            self._set(torch.zeros_like(which) if self.policy.every_row else which)

    def check_prompt(self, seen: Tensor) -> None:
        """Raise where a span lies beyond a prompt of ``seen`` (B,) tokens."""
        if self.prompt is not None or self.which is None:
            return
        for row, (index, tokens) in enumerate(zip(self.which.tolist(), seen.tolist(), strict=True)):
            # The token that comes now may be the last chunk of the prompt; so may all of them be, one by one.
            late = next((x for x in self.policy.lists[index] if x.end > tokens + 1 > 2), None)
            if late is not None:
                raise SpanError(
                    f"{late} of row {row} ends after the prompt, which has {tokens} tokens. Positions count the tokens "
                    "of a row without its padding; spans_of_text and spans_of_chat find them from the text."
                )

    def end_prompt(self, seen: Tensor) -> None:
        """The first token is decoded after ``seen`` (B,) tokens."""
        if self.prompt is None and self.which is not None:
            self.prompt = seen.clone()
            self._protect_prompt()

    def crop(self, seen: Tensor) -> None:
        """Only the first ``seen`` (B,) tokens of each row are left; where that is less than the prompt, it goes on."""
        if self.prompt is not None and bool((seen < self.prompt).any()):
            self.prompt = None
            self._protect_prompt()

    def index(self, rows: Tensor) -> None:
        """Row i becomes the present row ``rows[i]``."""
        if self.which is not None:
            rows = rows.to(self.which.device)
            self.which, self._groups = self.which[rows], self.groups.rows(rows)
            self.prompt = None if self.prompt is None else self.prompt[rows]

    def join(self, other: RowSpans) -> None:
        """Add the rows of ``other``, whose prompts have ended as these have."""
        assert self.which is not None and other.which is not None and self.prompt is not None
        assert other.prompt is not None
        which = torch.cat((self.which, other.which + len(self.policy.lists)))
        self.policy = replace(self.policy, spans=[*self.policy.lists, *other.policy.lists])
        self.prompt = torch.cat((self.prompt, other.prompt))
        self._set(which)

    def reset(self, policy: SpanPolicy) -> None:
        """Forget the rows; the next ones have the spans of ``policy``."""
        self.policy = policy
        self.which = self.prompt = self._groups = None

    def copy(self) -> RowSpans:
        """An independent copy."""
        twin = RowSpans(self.policy)
        twin.which, twin.prompt, twin._groups = self.which, self.prompt, self._groups  # never changed in place
        return twin

    def tensors(self) -> dict[str, Tensor]:
        """What is written to files beside the policy."""
        return {name: x for name, x in (("which", self.which), ("prompt", self.prompt)) if x is not None}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Take over what ``tensors`` returned."""
        self.prompt = tensors.get("prompt")
        if "which" in tensors:
            self._set(tensors["which"])

    def _set(self, which: Tensor) -> None:
        # Not when they are first asked for: that may be in compiled code, which sees tensors only.
        self.which, self._groups = which, _groups(self.policy.lists, which.device).rows(which)
        self._protect_prompt()

    def _protect_prompt(self) -> None:
        """Where the prompt is protected, it is one interval that holds all other protected spans."""
        if self.policy.prompt and self._groups is not None:
            ends = self.prompt_or(FAR)[:, None]
            self._groups = replace(self._groups, protect=Intervals(torch.zeros_like(ends), ends))

    # --- groups ------------------------------------------------------------------------------------------------

    @property
    def groups(self) -> Groups:
        """Of the present rows."""
        assert self._groups is not None
        return self._groups

    def protects(self, positions: Tensor) -> Tensor:
        """(B,…) bool: which positions (B,…) lie in a protected span."""
        return self.groups.protect.find(positions) >= 0

    def protected_tokens(self, seen: Tensor) -> Tensor:
        """(B,) int64: protected tokens among the first ``seen`` (B,) of each row."""
        return self.groups.protect.before(seen).sum(-1)

    def group_of(self, positions: Tensor) -> Tensor:
        """Group (B,…) int64 of each position (B,…); of no meaning where the position is protected or empty."""
        fair = self.groups.fair
        late = self.prompt_or(FAR).view(-1, *[1] * (positions.dim() - 1)) <= positions
        found = fair.find(positions)
        return torch.where(found >= 0, found, fair.size + late.long())

    def tokens(self, seen: Tensor) -> Tensor:
        """Tokens of each group (B,K+2) int64 among the first ``seen`` (B,) of each row, protected ones not counted."""
        in_prompt = seen.minimum(self.prompt_or(FAR))
        fair, rest = self._free(seen)
        rest_of_prompt = self._free(in_prompt)[1]
        return torch.cat((fair, torch.stack((rest_of_prompt, rest - rest_of_prompt), -1)), -1)

    def _free(self, time: Tensor) -> tuple[Tensor, Tensor]:
        """Unprotected tokens before ``time`` (B,): in each fair span (B,K), and in none (B,)."""
        fair, protect = self.groups.fair, self.groups.protect
        size = fair.before(time)
        if protect.size:
            starts = fair.starts.minimum(time[:, None])
            size = size - (protect.before(starts + size) - protect.before(starts)).sum(1)
        return size, time - protect.before(time).sum(-1) - size.sum(-1)

    def prompt_or(self, otherwise: int) -> Tensor:
        """(B,) int64: tokens of the prompt, or ``otherwise`` while it is still read."""
        assert self.which is not None
        return torch.full_like(self.which, otherwise) if self.prompt is None else self.prompt


def _groups(lists: list[list[Span]], device: torch.device) -> Groups:
    fair = [sorted((x for x in row if x.mode == "fair"), key=lambda x: x.start) for row in lists]
    intervals = Intervals.of([[(x.start, x.end) for x in row] for row in fair], device)
    weights = torch.ones(len(lists), intervals.size + 2, dtype=torch.float64, device=device)
    min_keep = torch.zeros(len(lists), intervals.size + 2, dtype=torch.int64, device=device)
    for i, row in enumerate(fair):
        for j, span in enumerate(row):
            weights[i, j], min_keep[i, j] = span.weight, span.min_keep
    return Groups(intervals, Intervals.of([_union(row) for row in lists], device), weights, min_keep)


def _union(row: list[Span]) -> list[tuple[int, int]]:
    """The protected tokens of a row as disjoint intervals."""
    out: list[tuple[int, int]] = []
    for span in sorted((x for x in row if x.mode == "protect"), key=lambda x: x.start):
        if out and span.start <= out[-1][1]:
            out[-1] = (out[-1][0], max(out[-1][1], span.end))
        else:
            out.append((span.start, span.end))
    return out
