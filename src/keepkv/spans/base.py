"""What a user says about the parts of a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Annotated, Any, ClassVar

from keepkv.core.options import Checked, Count, Positive, Share, one_of, shown
from keepkv.errors import KeepKVError, SpanError

MODES = ("protect", "fair", "default")  # where spans overlap, the earlier mode decides
OVERFLOWS = ("error", "grow", "trim")
SCORINGS = ("span", "global")


@dataclass(frozen=True)
class Span(Checked):
    """Tokens ``start`` ≤ position < ``end`` of a row, padding not counted.

    mode: "fair" keeps the span's share of the budget, by its number of tokens times ``weight``; "protect" keeps every
        token in every layer and head; "default" leaves the choice to the method and only reports what became of it.
    min_keep: of a fair span, tokens that each head keeps at least.
    name: under which the receipt reports it.
    """

    start: Count
    end: Count
    mode: Annotated[str, one_of(*MODES)] = "fair"
    weight: Positive = 1.0
    min_keep: Count = 0
    name: str | None = None

    refusal: ClassVar[type[KeepKVError]] = SpanError

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.start >= self.end:
            raise SpanError(
                f"{self}: start and end are token positions, 0 ≤ start < end; spans_of_text finds them from characters"
            )
        if self.min_keep > self.end - self.start:
            raise SpanError(f"{self}: min_keep is a number of tokens, at most the {self.end - self.start} of the span")
        if self.mode != "fair" and (self.weight != 1 or self.min_keep):
            raise SpanError(f"{self}: weight and min_keep belong to mode='fair'")

    @property
    def label(self) -> str:
        """The name, or mode and tokens where there is none."""
        return self.name if self.name is not None else f"{self.mode} {self.start}:{self.end}"


@dataclass(frozen=True)
class SpanPolicy(Checked):
    """Spans and how they share a budget.

    spans: a list of ``Span`` for every row, or a list of such lists, one per row.
    fair_lambda: from 0, the counts that the method itself would keep in each part, to 1, fair counts.
    on_overflow: what to do where the budget of a layer cannot hold what must be kept: "error", "grow" the budget, or
        "trim" the protected tokens by score.
    scoring: "span" lets only a fair span's own queries vote on its tokens, where the method's score supports that and
        ``fair_lambda`` is above 0; "global" uses the method's scores as they are.
    prompt: whether every token of the prompt is protected: what is read before the first decoded token, however long
        it is. A budget in slots or bytes includes it; one that is a share is one of the tokens that follow.
    """

    spans: Sequence[Span] | Sequence[Sequence[Span]]
    fair_lambda: Share = 1.0
    on_overflow: Annotated[str, one_of(*OVERFLOWS)] = "error"
    scoring: Annotated[str, one_of(*SCORINGS)] = "span"
    prompt: bool = False

    refusal: ClassVar[type[KeepKVError]] = SpanError

    def __post_init__(self) -> None:
        super().__post_init__()
        # Tuples of its own: a list that the caller changes later changes nothing here.
        rows = [tuple(row) for row in self.lists]
        object.__setattr__(self, "spans", rows[0] if self.every_row else tuple(rows))
        for row in rows:
            for entry in row:
                if not isinstance(entry, Span):
                    raise SpanError(
                        f"spans={shown(self.spans)}: expected a list of keepkv.Span, or one such list per row"
                    )
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
            raise SpanError(
                f"spans={shown(value)}: expected a list of keepkv.Span, one such list per row, or a SpanPolicy"
            )
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
            raise SpanError(f"spans={shown(self.spans)}: expected a list of keepkv.Span, or one such list per row")
        return [list(row) for row in entries]
