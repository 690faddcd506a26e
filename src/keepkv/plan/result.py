"""What ``keepkv.fit`` found, and how it is said."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from keepkv.plan.units import size, tokens

MOST_TOKENS = 1 << 24  # as far as contexts are looked at
TIGHT = 0.05  # of the memory: allocators lose about as much


@dataclass(frozen=True)
class Case:
    """One kind of cache. Bytes but for the last three.

    cache: when the context is read. peak, chunked_peak: the most while it is read, weights included, in one piece and
    in chunks. longest, chunked_longest: tokens that fit the memory so, ``MOST_TOKENS`` or more as that number. rows:
    how many rows of the context fit it at once, read in chunks. The last three are None where no memory is known.
    """

    cache: int
    peak: int
    chunked_peak: int
    longest: int | None = None
    chunked_longest: int | None = None
    rows: int | None = None


@dataclass(frozen=True)
class Fit:
    """Whether a context fits a memory, and what to set, from ``keepkv.fit``; prints as a table.

    model: its class. weights: their bytes. method, budget, store, codec: what the cache is made with. context: tokens
    of each row, batch: rows, chunk: tokens of a chunk. full: with transformers' own cache. compressed: with that of
    keepkv, None where the model is refused. refused: why it is. memory: bytes, None where unknown; where: whose.
    smaller: a share of the tokens at which it fits where it does not at ``budget``; None where there is none, or no
    need. notes: what else to know. python, command: what to set.
    """

    model: str
    dtype: str
    weights: int
    method: str
    budget: str
    store: str
    codec: str
    context: int
    batch: int
    chunk: int
    full: Case
    compressed: Case | None
    refused: str | None
    memory: int | None
    where: str
    smaller: float | None
    notes: tuple[str, ...]
    python: str
    command: str

    @property
    def way(self) -> str | None:
        """The simplest way that fits the memory: "full", "full in chunks", "compressed", "compressed in chunks"; None
        where none does, or the memory is not known."""
        full, ours, memory = self.full, self.compressed, self.memory
        ways = {"full": full.peak, "full in chunks": full.chunked_peak}
        if ours is not None:
            ways = {"full": full.peak, "compressed": ours.peak, "compressed in chunks": ours.chunked_peak, **ways}
        return next((name for name, peak in ways.items() if memory is not None and peak <= memory), None)

    @property
    def fits(self) -> bool:
        """Whether the context fits the memory in any way."""
        return self.way is not None

    @property
    def sentence(self) -> str:
        """The answer."""
        rows = "" if self.batch == 1 else f" in each of {self.batch} rows"
        start = f"{tokens(self.context)} tokens{rows} need {size(self.full.cache)} of cache"
        if self.compressed is not None and self.method != "full":
            start += f"; at a budget of {self.budget} it is {size(self.compressed.cache)}"
        if self.memory is None:
            return start + "."
        where, chunks = size(self.memory), f"if the prompt is read in chunks of {self.chunk:,}"
        if self.way is None:
            return f"{start}. {self._lack()}"
        said = {
            "full": f", and even the full cache fits in {where} together with the weights.",
            "full in chunks": f", and the full cache fits in {where} together with the weights {chunks}.",
            "compressed": f", and it fits in {where} together with the weights.",
            "compressed in chunks": f", and it fits in {where} together with the weights {chunks}.",
        }
        return start + said[self.way]

    def _lack(self) -> str:
        """What to do where nothing fits."""
        assert self.memory is not None
        if self.weights >= self.memory:
            return (
                f"It does not fit: the weights alone take {size(self.weights)} of {size(self.memory)}. Load them in "
                "fewer bits or on more devices, and give what they then take with weights=."
            )
        case = self.compressed or self.full
        lack = f"It does not fit in {size(self.memory)}: in chunks of {self.chunk:,} it takes {size(case.chunked_peak)}"
        if self.smaller is not None:
            return f"{lack}. At a budget of {self.smaller:g} it fits."
        return f"{lack}, {size(self.weights)} of them weights. {case.chunked_longest or 0:,} tokens fit."

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data."""
        return {**asdict(self), "fits": self.fits, "way": self.way, "sentence": self.sentence}

    def table(self) -> list[tuple[str, ...]]:
        """Heads and rows of the table: what it is, with the full cache, with that of keepkv."""
        cases = [self.full] if self.compressed is None or self.method == "full" else [self.full, self.compressed]
        heads = ["full cache", f"budget {self.budget}"][: len(cases)]
        chunks = f"chunks of {self.chunk:,}"
        lines = [
            ("", *heads),
            ("cache", *(size(x.cache) for x in cases)),
            ("peak, prompt in one piece", *(size(x.peak) for x in cases)),
            (f"peak, {chunks}", *(size(x.chunked_peak) for x in cases)),
        ]
        if self.memory is not None:
            lines += [
                ("longest context, in one piece", *(_longest(x.longest) for x in cases)),
                (f"longest context, {chunks}", *(_longest(x.chunked_longest) for x in cases)),
                (f"rows of {tokens(self.context)}, {chunks}", *(f"{x.rows:,}" for x in cases)),
            ]
        return lines

    def head(self) -> list[tuple[str, str]]:
        """Label and value of what was asked."""
        memory = "not known" if self.memory is None else f"{size(self.memory)}, {self.where}"
        cache = f"method {self.method}, budget {self.budget}, store {self.store}, codec {self.codec}"
        return [
            ("model", f"{self.model}, {self.dtype}: weights {size(self.weights)}"),
            ("cache", cache if self.refused is None else "transformers' own, as keepkv does not serve this model"),
            *([] if self.refused is None else [("refused", self.refused)]),
            ("memory", memory),
            *(("note", note) for note in self.notes),
        ]

    def __str__(self) -> str:
        head, lines = self.head(), self.table()
        label = max(len(name) for name, _ in head)
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        table = [
            "  ".join(
                [one[0].ljust(widths[0]), *(x.rjust(w) for x, w in zip(one[1:], widths[1:], strict=True))]
            ).rstrip()
            for one in lines
        ]
        asked = [f"{name:<{label}}  {value}" for name, value in head]
        return "\n".join([self.sentence, "", *asked, "", *table, "", "Set this:", self.python])


def _longest(count: int | None) -> str:
    if count is None:
        return "–"
    return f"over {MOST_TOKENS:,}" if count >= MOST_TOKENS else f"{count:,}"
