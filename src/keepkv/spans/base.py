"""What a user says about the parts of a prompt."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from keepkv.errors import SpanError

MODES = ("protect", "fair", "default")  # where spans overlap, the earlier mode decides
OVERFLOWS = ("error", "grow", "trim")
SCORINGS = ("span", "global")


@dataclass(frozen=True)
class Span:
    """Tokens ``start`` ≤ position < ``end`` of a row, padding not counted.

    mode: "fair" keeps the span's share of the budget, by its number of tokens times ``weight``; "protect" keeps every
        token in every layer and head; "default" leaves the choice to the method and only reports what became of it.
    min_keep: of a fair span, tokens that each head keeps at least.
    name: under which the receipt reports it.
    """

    start: int
    end: int
    mode: str = "fair"
    weight: float = 1.0
    min_keep: int = 0
    name: str | None = None

    def __post_init__(self) -> None:
        if not (_is_count(self.start) and _is_count(self.end) and self.start < self.end):
            raise SpanError(
                f"{self}: start and end are token positions, 0 ≤ start < end; spans_of_text finds them from characters"
            )
        if self.mode not in MODES:
            raise SpanError(f"{self}: supported modes are {', '.join(map(repr, MODES))}")
        if not (isinstance(self.weight, int | float) and math.isfinite(self.weight) and self.weight > 0):
            raise SpanError(f"{self}: weight is a number above 0")
        if not (_is_count(self.min_keep) and self.min_keep <= self.end - self.start):
            raise SpanError(f"{self}: min_keep is a number of tokens, at most the {self.end - self.start} of the span")
        if self.mode != "fair" and (self.weight != 1 or self.min_keep):
            raise SpanError(f"{self}: weight and min_keep belong to mode='fair'")

    @property
    def label(self) -> str:
        """The name, or mode and tokens where there is none."""
        return self.name if self.name is not None else f"{self.mode} {self.start}:{self.end}"


@dataclass(frozen=True)
class SpanPolicy:
    """Spans and how they share a budget.

    spans: a list of ``Span`` for every row, or a list of such lists, one per row.
    fair_lambda: from 0, the counts that the method itself would keep in each part, to 1, fair counts.
    on_overflow: what to do where the budget of a layer cannot hold what must be kept: "error", "grow" the budget, or
        "trim" the protected tokens by score.
    scoring: "span" lets only a fair span's own queries vote on its tokens, where the method's score supports that and
        ``fair_lambda`` is above 0; "global" uses the method's scores as they are.
    """

    spans: Sequence[Span] | Sequence[Sequence[Span]]
    fair_lambda: float = 1.0
    on_overflow: str = "error"
    scoring: str = "span"

    def __post_init__(self) -> None:
        if not (isinstance(self.fair_lambda, int | float) and 0 <= self.fair_lambda <= 1):
            raise SpanError(f"SpanPolicy(fair_lambda={self.fair_lambda!r}): a number from 0 (the method) to 1 (fair)")
        if self.on_overflow not in OVERFLOWS:
            raise SpanError(f"SpanPolicy(on_overflow={self.on_overflow!r}): supported are {', '.join(OVERFLOWS)}")
        if self.scoring not in SCORINGS:
            raise SpanError(f"SpanPolicy(scoring={self.scoring!r}): supported are {', '.join(SCORINGS)}")
        # Tuples of its own: a list that the caller changes later changes nothing here.
        rows = [tuple(row) for row in self.lists]
        object.__setattr__(self, "spans", rows[0] if self.every_row else tuple(rows))
        for row in rows:
            for entry in row:
                if not isinstance(entry, Span):
                    raise SpanError(f"spans={self.spans!r}: expected a list of keepkv.Span, or one such list per row")
            fair = sorted((x for x in row if x.mode == "fair"), key=lambda x: x.start)
            for a, b in pairwise(fair):
                if b.start < a.end:
                    raise SpanError(f"fair spans overlap: {a} and {b}. Shorten one, or protect one of them.")

    @classmethod
    def of(cls, value: Any) -> SpanPolicy:
        """A policy as given, or the default policy of a list of spans."""
        if isinstance(value, cls):
            return value
        if not isinstance(value, Sequence) or isinstance(value, str):
            raise SpanError(f"spans={value!r}: expected a list of keepkv.Span, one such list per row, or a SpanPolicy")
        return cls(value)

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        lists = [[asdict(x) for x in row] for row in self.lists]
        return {**self.__dict__, "spans": lists[0] if self.every_row else lists}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> SpanPolicy:
        """What ``to_dict`` made."""
        spans = [Span(**x) if isinstance(x, dict) else [Span(**y) for y in x] for x in data["spans"]]
        return cls(**{**data, "spans": spans})

    @property
    def scopes(self) -> bool:
        """Whether fair spans are to be scored by their own queries."""
        fair = any(x.mode == "fair" for row in self.lists for x in row)
        return fair and self.scoring == "span" and self.fair_lambda > 0

    @property
    def every_row(self) -> bool:
        """Whether one list of spans holds for every row."""
        return not self.spans or not isinstance(self.spans[0], Sequence)

    @property
    def lists(self) -> list[list[Span]]:
        """The spans of each row, or the one list for all rows."""
        entries: Any = [self.spans] if self.every_row else self.spans
        if not all(isinstance(row, Sequence) for row in entries):
            raise SpanError(f"spans={self.spans!r}: expected a list of keepkv.Span, or one such list per row")
        return [list(row) for row in entries]


def _is_count(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool) and x >= 0
