"""The receipt: what a cache was asked, what it holds, and what it gave up."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from keepkv.core.budget import Budget
from keepkv.core.survival import survival
from keepkv.core.words import counted, percent, size, spread
from keepkv.engine.allowance import layer_budget
from keepkv.engine.layer import Layer
from keepkv.engine.state import CacheState
from keepkv.engine.tally import Tally
from keepkv.select import SELECTIONS
from keepkv.spans.keep_rates import keep_rates
from keepkv.store.base import allocated, tensors_in


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
class SelectionReceipt:
    """How well decoded tokens chose the slots that they attended to.

    name: of the selection. selected: how many of each KV head, or which share. mass_kept: share of the attention over
    all slots that those chosen had, mean over the layers that choose, over ``measured`` tokens, rows and heads; None
    where none was measured. recall: of as many slots of the greatest attention of each KV head, the share that was
    chosen, in the same way; sinks and window, which always are, not counted. bytes_read: of keys and values, by one
    token of one row, in these layers; bytes_there: what it would read of all slots. A loaded cache measures from there
    on.
    """

    name: str
    selected: int | float
    mass_kept: float | None
    recall: float | None
    measured: int
    bytes_read: float
    bytes_there: float

    def row(self) -> tuple[str, str]:
        """Label and value of the line of the printed table."""
        said = f"{self.name}, {self.selected:,} slots" if isinstance(self.selected, int) else (
            f"{self.name}, {self.selected:.1%} of the slots"
        )  # fmt: skip
        if self.mass_kept is None:
            return "selection", f"{said}; what it keeps was not measured"
        share = self.bytes_read / max(1.0, self.bytes_there)
        found = f"{self.mass_kept:.1%} of the attention, {self.recall or 0:.1%} of the best slots"
        return "selection", f"{said}: {found}, {share:.1%} of the bytes read"


@dataclass(frozen=True)
class Receipt:
    """Report of one cache, from ``Cache.report()``; prints as a table.

    method, options, budget, codec, codec_options: what was asked. compressed: whether any compression ran; if not,
    nothing below is the method's doing. seen: tokens of each row. kept: ``slots[layer][row][head]`` held now by each
    compressible layer. bytes: storage really allocated, all layers, votes, positions and statistics included.
    full_bytes: a plain cache of the same tokens. merged, dropped: slots, summed over layers, rows and heads.
    mass_dropped: share of the last query's attention that the dropped slots held when they were dropped, mean over
    layers; None where it could not be measured. gone: share of the tokens read that no head of any layer holds by
    itself; where few tokens are left in any head, replies break at once (arXiv 2603.01426). largest_vote: most votes of
    a slot, 1.0 where none were merged. seconds: spent compressing. spans: None where none were given. since: tokens
    that were read after the last compression, and are all held.
    selection: None where decoded tokens attend to everything.
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
    gone: float
    largest_vote: float
    compressions: int
    seconds: float
    spans: SpanReceipt | None = None
    since: int = 0
    codec: str = "none"
    codec_options: dict[str, Any] = field(default_factory=dict)
    selection: SelectionReceipt | None = None

    @property
    def keep_rate(self) -> dict[str, float]:
        """Share of the tokens of each span still held, by name; empty where no spans were given."""
        return {} if self.spans is None else self.spans.keep_rate

    @property
    def held(self) -> float | int:
        """What is held, in the unit of ``budget``: bytes, or a share of them; a share of the tokens, or slots per KV
        head, as the mean over layers and heads in the row that holds most."""
        if isinstance(self.budget, str):
            return self.ratio if self.budget.endswith("%bytes") else self.bytes
        rows = [[n for heads in row for n in heads] for row in zip(*self.kept.values(), strict=True)]
        slots = [sum(row) / max(1, len(row)) for row in rows]
        if isinstance(self.budget, float):
            slots = [n / max(1, tokens) for n, tokens in zip(slots, self.seen, strict=True)]
        return max(slots, default=0.0)

    @property
    def ratio(self) -> float:
        """bytes / full_bytes."""
        return self.bytes / self.full_bytes if self.full_bytes else 1.0

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data."""
        plain = {**asdict(self), "held": self.held, "ratio": self.ratio}
        absent = {name for name in ("spans", "selection") if getattr(self, name) is None}
        return {name: x for name, x in plain.items() if name not in absent}

    def rows(self) -> list[tuple[str, str]]:
        """Label and value of each line of the printed table."""
        lines = [("method", _named(self.method, self.options)), ("budget", str(Budget.of(self.budget)))]
        lines += [("codec", _named(self.codec, self.codec_options))] if self.codec != "none" else []
        lines += [("note", text) for text in self._notes()]
        if not self.seen:
            return lines
        lines += [
            ("held", self._held()),
            ("tokens read", ", ".join(f"{n:,}" for n in self.seen)),
            ("slots per head", self._slots() if self.kept else "none"),
            ("memory", f"{size(self.bytes)}; a plain cache takes {size(self.full_bytes)} (ratio {self.ratio:.3f})"),
        ]
        if self.compressed:
            mass = "not known" if self.mass_dropped is None else f"{self.mass_dropped:.1%} of the last token's"
            merged = f", {self.merged:,} merged into others" if self.merged else ""
            lines += [("slots given up", f"{self.dropped:,} dropped{merged}"), ("attention given up", mass)]
            lines.append(("gone everywhere", f"{percent(self.gone)} of the tokens, in all heads of all layers"))
            if self.largest_vote > 1:
                lines.append(("heaviest slot", f"counts as {counted(round(self.largest_vote), 'token')} in attention"))
            lines.append(("compressions", f"{self._compressions()}, {self.seconds:.3g} s"))
        if self.selection is not None:
            lines.append(self.selection.row())
        return lines if self.spans is None else [*lines, *self.spans.rows()]

    def _notes(self) -> list[str]:
        """What must not be misread."""
        if not self.kept and self.bytes:
            return ["nothing was compressed: no layer of this model can be"]
        if not self.seen:
            return ["nothing read yet"]
        notes = []
        if not self.compressed and self.method != "full":
            notes.append("nothing was compressed: the tokens fit the budget, or no compression was due")
        if self.ratio > 1:
            notes.append(
                "larger than a plain cache: positions, statistics and room for the next tokens are counted too"
            )
        return notes

    def _held(self) -> str:
        """What is held, in words, and whether the budget is met by it."""
        said = f"{spread([self.held])} slots per head"
        asked = Budget.of(self.budget)
        if asked.bytes is not None:
            said = f"{self.bytes:,} bytes"
        elif asked.grows:
            said = f"{percent(self.held)} of the {'tokens' if asked.share is not None else 'bytes'}"
        more = f", with {counted(self.since, 'token')} read after the last compression"
        return said + (more if self.compressed and self.since else "")

    def _slots(self) -> str:
        """Mean over the heads of each layer."""
        return spread(sum(map(sum, heads)) / max(1, sum(map(len, heads))) for heads in self.kept.values())

    def _compressions(self) -> str:
        layers, times = len(self.kept), self.compressions // len(self.kept)
        if self.compressions % layers:
            return f"{counted(self.compressions, 'compression')} of single layers"
        return counted(layers, "layer") + (f", {times} times each" if times > 1 else "")

    def __str__(self) -> str:
        rows = self.rows()
        width = max(len(label) for label, _ in rows)
        return "\n".join(f"{label:<{width}}  {value}" for label, value in rows)


def _named(name: str, options: dict[str, Any]) -> str:
    """``snapkv (window=8)``."""
    said = ", ".join(f"{k}={v}" for k, v in options.items())
    return f"{name} ({said})" if said else name


def make_receipt(layers: Sequence[Any], shared: CacheState, codec: str, codec_options: dict[str, Any]) -> Receipt:
    """The receipt of a cache of ``layers`` as it stands."""
    used = [x for x in layers if isinstance(x, Layer) and x.progress.seen]
    tallies, settings, seen = [x.tally for x in used], shared.settings, shared.positions.seen
    masses = [t.mass_dropped for t in tallies if t.mass_dropped is not None]
    return Receipt(
        method=settings.method.name,
        options=settings.method.changed,
        budget=settings.budget.value,
        compressed=any(t.compressions for t in tallies),
        seen=[] if seen is None else seen.tolist(),
        kept={x.info.index: x.store.lengths.tolist() for x in used},
        bytes=held_bytes(layers, shared),
        full_bytes=sum(map(full_bytes, layers)),
        merged=sum(int(t.merged.sum()) for t in tallies if t.merged is not None),
        dropped=sum(int(t.dropped.sum()) for t in tallies if t.dropped is not None),
        mass_dropped=float(torch.stack(masses).mean()) if masses else None,
        gone=_gone([x.store.positions() for x in used], seen),
        largest_vote=max([1.0, *(_largest_vote(x) for x in used)]),
        compressions=sum(t.compressions for t in tallies),
        seconds=sum(t.seconds for t in tallies),
        spans=_span_receipt(shared, used),
        since=min((x.progress.seen - x.progress.settled for x in used), default=0),
        codec=codec,
        codec_options=dict(codec_options),
        selection=_selection_receipt(shared, tallies),
    )


def summary(layers: Sequence[Any], shared: CacheState) -> str:
    """A cache of ``layers`` as it stands, on one line."""
    method, seen = shared.settings.method, shared.positions.seen
    said = [method.name, f"budget {shared.settings.budget}"]
    if seen is None:
        return ", ".join([*said, "nothing read yet"])
    most, rows = int(seen.max()) if len(seen) else 0, f" in the longest of {len(seen)} rows" if len(seen) > 1 else ""
    held, full = held_bytes(layers, shared), sum(map(full_bytes, layers))
    return ", ".join([*said, f"{counted(most, 'token')} read{rows}", f"{size(held)}, ratio {held / max(1, full):.3f}"])


def _span_receipt(shared: CacheState, used: list[Layer]) -> SpanReceipt | None:
    spans, seen = shared.spans, shared.positions.seen
    if spans is None:
        return None
    rates, requested, realised = {}, 1.0, 1.0
    if seen is not None and used:
        positions = [x.store.positions() for x in used]
        rates = keep_rates(spans, positions, seen)
        tokens = max(1, len(used) * int(seen.sum()))
        requested = sum(int(layer_budget(x).minimum(seen).sum()) for x in used) / tokens
        realised = sum(float((x >= 0).sum()) / x.shape[1] for x in positions) / tokens
    scoring, overflows = "span" if shared.settings.scopes else "global", sum(x.tally.overflows for x in used)
    return SpanReceipt(rates, spans.policy.fair_lambda, scoring, requested, realised, overflows)


def _selection_receipt(shared: CacheState, tallies: list[Tally]) -> SelectionReceipt | None:
    if (select := shared.settings.select) is None:
        return None
    name, found = SELECTIONS.name_of(select) or type(select).__name__, [x for x in tallies if x.measured]
    mass, recall = (
        sum(getattr(x, name) / x.measured for x in found) / len(found) if found else None
        for name in ("mass_selected", "recall_selected")
    )
    measured = max((x.measured for x in found), default=0)
    read, there = sum(x.bytes_read for x in found), sum(x.bytes_there for x in found)
    return SelectionReceipt(name, select.selected, mass, recall, measured, read, there)


def _gone(layers: list[Tensor], seen: Tensor | None) -> float:
    """Share of the tokens of all rows, ``seen`` (B,), that are in none of the positions (B,H,S) of ``layers``."""
    if seen is None or not layers or not int(seen.sum()):
        return 0.0
    held = int((survival(layers, int(seen.max())) > 0).sum())
    return 1 - held / int(seen.sum())


def _largest_vote(layer: Layer) -> float:
    """Most votes of a slot of ``layer``."""
    if not layer.store.held.votes:
        return 1.0
    slots = layer.store.view()
    return float(slots.log_votes[slots.valid].max().exp()) if bool(slots.valid.any()) else 1.0


def held_bytes(layers: Sequence[Any], shared: CacheState) -> int:
    """Bytes of all that a cache of ``layers`` holds: slots with what belongs to them, and what is known of tokens."""
    known = tensors_in(shared.positions.known)
    return allocated(chain((x for layer in layers for x in held_by(layer)), known))


def held_by(layer: Any) -> Iterator[Tensor]:
    """Every tensor that a cache layer of any kind holds of the tokens it was fed."""
    return tensors_in([layer.store, layer.score_state, layer.latest] if isinstance(layer, Layer) else layer)


def full_bytes(layer: Any) -> int:
    """Bytes that a plain cache holds for the same tokens; layers that stay stock weigh the same in both."""
    if not isinstance(layer, Layer):
        return allocated(held_by(layer))
    return layer.batch_size * layer.progress.seen * layer.store.slot_bytes().plain if layer.is_initialized else 0
