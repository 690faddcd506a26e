"""The receipt: what a cache was asked, what it holds, and what it gave up."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class SpanReceipt:
    """What became of the spans of a cache.

    keep_rate: share of the tokens of each span still held, mean over layers and heads, by name; "rest" is what lies in
    no fair or protected span, "generated" what came after the prompt. scoring: "span" where fair spans were scored by
    their own queries, else "global". requested, realised: slots per token that the budget asks for and that are held.
    overflows: compressions of a layer whose budget did not hold what the spans demand.
    """

    keep_rate: dict[str, float]
    fair_lambda: float
    scoring: str
    requested: float
    realised: float
    overflows: int

    def rows(self) -> list[tuple[str, str]]:
        """Label and value of each line of the printed table."""
        overflows = f", {self.overflows} overflows" if self.overflows else ""
        how = f"λ = {self.fair_lambda:g}, {self.scoring} scoring; asked {self.requested:.3f}, kept {self.realised:.3f}"
        return [("spans", how + overflows), *((f"kept of {x}", f"{rate:.1%}") for x, rate in self.keep_rate.items())]


@dataclass(frozen=True)
class Receipt:
    """Report of one cache, from ``Cache.report()``; prints as a table.

    method: what was asked. compressed: whether any compression ran; if not, nothing below is the method's doing.
    seen: tokens of each row. kept: slots[layer][row][head] held now by each compressible layer. bytes: storage
    really allocated, all layers, votes, positions and statistics included. full_bytes: a plain cache of the same
    tokens. merged, dropped: slots, summed over layers, rows and heads. mass_dropped: share of the last query's
    attention that the dropped slots held when they were dropped, mean over layers; None where it could not be
    measured. largest_vote: most votes of a slot, 1.0 where none were merged. seconds: spent compressing. spans: None
    where none were given.
    """

    method: str
    options: dict[str, Any]
    budget: float | int | str
    compressed: bool
    seen: list[int]
    kept: dict[int, list[list[int]]]
    bytes: int
    full_bytes: int
    merged: int
    dropped: int
    mass_dropped: float | None
    largest_vote: float
    compressions: int
    seconds: float
    spans: SpanReceipt | None = None

    @property
    def keep_rate(self) -> dict[str, float]:
        """Share of the tokens of each span still held, by name; empty where no spans were given."""
        return {} if self.spans is None else self.spans.keep_rate

    @property
    def ratio(self) -> float:
        """bytes / full_bytes."""
        return self.bytes / self.full_bytes if self.full_bytes else 1.0

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data."""
        plain = {**asdict(self), "ratio": self.ratio}
        return plain if self.spans is not None else {name: x for name, x in plain.items() if name != "spans"}

    def rows(self) -> list[tuple[str, str]]:
        """Label and value of each line of the printed table."""
        per_layer = [sum(map(sum, heads)) / max(1, sum(map(len, heads))) for heads in self.kept.values()]
        span = f"{min(per_layer):.1f} to {max(per_layer):.1f} by layer" if per_layer else "no compressible layer"
        options = ", ".join(f"{k}={v}" for k, v in self.options.items())
        mass = "unknown" if self.mass_dropped is None else f"{self.mass_dropped:.1%}"
        lines = [
            ("method", self.method + (f" ({options})" if options else "")),
            ("budget asked", str(self.budget)),
            ("tokens seen", ", ".join(map(str, self.seen)) or "none"),
            ("slots kept per head", span),
            ("bytes", f"{self.bytes:,} of {self.full_bytes:,} = {self.ratio:.3f}"),
            ("slots merged / dropped", f"{self.merged:,} / {self.dropped:,}"),
            ("attention mass dropped", mass),
            ("largest vote", f"{self.largest_vote:.1f}"),
            ("compressions", f"{self.compressions} in {self.seconds:.3f} s"),
        ]
        if self.spans is not None:
            lines += self.spans.rows()
        if not self.compressed and self.method != "full":
            lines.insert(1, ("NOTE", "nothing was compressed: the tokens fit the budget, or no compression was due"))
        return lines

    def __str__(self) -> str:
        rows = self.rows()
        width = max(len(label) for label, _ in rows)
        return "\n".join(f"{label:<{width}}  {value}" for label, value in rows)
