"""What the layers of one cache share: what was asked for, and how far the rows have come."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from torch import Tensor

from keepkv.core.budget import Budget
from keepkv.core.calibration import Calibration
from keepkv.core.layer_info import LayerInfo
from keepkv.core.options import Checked, Seed
from keepkv.engine.files.origin import Origin
from keepkv.engine.kv_form import KVForm
from keepkv.engine.positions import RowPositions
from keepkv.engine.tally import Tally
from keepkv.errors import BudgetError
from keepkv.methods.base import Method
from keepkv.select.base import Select
from keepkv.spans.base import SpanPolicy
from keepkv.spans.rows import RowSpans
from keepkv.store.base import Held, Store

EVERYTHING = Budget(share=1.0)


class Records(Protocol):
    """What is told when slots leave, and what becomes of the rows. The way up, on purpose: see ``keepkv.training``."""

    def left(self, layer: int, positions: Tensor, gone: Tensor, seen: Tensor) -> None:
        """Of ``layer`` the slots at ``positions`` (B,H,S) where ``gone`` (B,H,S) bool leave, when ``seen`` (B,) tokens
        of each row were fed."""

    def index(self, rows: Tensor) -> None:
        """Row i becomes the present row ``rows[i]``."""

    def reset(self) -> None:
        """Every row starts anew."""


@dataclass(frozen=True)
class Settings(Checked):
    """What was asked for. Raises ``BudgetError`` where a budget cannot hold what must be kept.

    calibrations: what the pieces need to know of the model, by kind. select: which slots decoded tokens attend to;
    None: all.
    scopes: whether fair spans are scored by their own queries.
    """

    method: Method
    budget: Budget
    seed: Seed = 0
    policy: SpanPolicy | None = None
    calibrations: dict[str, Calibration] = field(default_factory=dict, hash=False)
    select: Select | None = None
    scopes: bool = field(init=False, default=False)  # not a property: compiled code asks for it

    def __post_init__(self) -> None:
        super().__post_init__()
        method = self.method
        if method.name == "full" and self.budget != EVERYTHING:
            warnings.warn(f"method 'full' keeps every token: the budget of {self.budget} is not applied", stacklevel=3)
            object.__setattr__(self, "budget", EVERYTHING)
        if method.prompt:
            object.__setattr__(self, "policy", replace(self.policy or SpanPolicy(()), prompt=True))
        slots = self.budget.slots
        scopes = self.policy is not None and self.policy.scopes and method.score.scores_within_spans
        object.__setattr__(self, "scopes", scopes)
        pinned = method.sinks + method.window
        if slots is not None and slots < pinned:
            raise BudgetError(
                f"budget of {slots} slots per head is below the {pinned} that {method.name!r} always keeps "
                f"({method.sinks} sinks + {method.window} recent). Give at least {pinned}, or smaller sinks= and "
                "window= options."
            )
        cap = method.when.cap
        if cap is not None and cap <= max(slots or 0, pinned):
            raise BudgetError(
                f"a cap of {cap} slots per head leaves no room beside the {max(slots or 0, pinned)} that a compression "
                f"leaves (budget of {self.budget}, {method.sinks} sinks + {method.window} recent): before every token "
                "it would come again. Give When(cap=…) a larger one, or a smaller budget."
            )
        # What is certain before any text is known; the rest is found out when a layer is compressed.
        if self.policy is None or self.policy.on_overflow != "error" or slots is None:
            return
        least = RowSpans(self.policy).least(method.sinks)
        if slots < least and (method.when.prefill is not None or method.when.recurs):
            raise BudgetError(
                f"budget of {slots} slots per head is below the {least} tokens of the protected spans and the "
                f"{method.sinks} sinks. Give at least {least}, protect less, or choose "
                "SpanPolicy(on_overflow='grow') or 'trim'."
            )

    @property
    def room(self) -> int | None:
        """Tokens that may come between two compressions, where memory is kept for no more."""
        return None if self.budget.bytes is None else self.method.when.every

    @property
    def stats(self) -> dict[str, float]:
        """What is kept per slot, and the value a new slot starts with."""
        score = self.method.score
        return {name: x.start for name, x in (score.stats | (score.span_stats if self.scopes else {})).items()}


@dataclass
class CacheState:
    """What changes as a cache is used.

    asked: the settings that the cache was made with; those that hold now add up where rows join. others: the layers
    that transformers keeps. decoded: tokens fed one by one to each row since it was last compressed. fed: columns
    since then in the order in which they came, as [count, whether they were decoded]. compressing: whether
    compressions that fall due are run. observing: the score sees every token, whether a compression may follow or
    not. reading: a forward of one token belongs to a prompt. inference: what is held may have been made in inference
    mode. spare: tokens that each row may certainly be given before it passes the cap; empty where nobody looked.
    coming (B,): tokens of each row that a compression makes room for. waiting: layers that share a budget and wait
    for the others. forwards: how many began. begun, ended: the
    ones in which each layer with a recurrent state was last begun and ended, by layer. clock: what compressions are
    timed by, in seconds. recorder: is told which slots leave, of this cache and of no copy; None: nobody is.
    """

    settings: Settings
    asked: Settings | None = None
    positions: RowPositions = field(default_factory=RowPositions)
    spans: RowSpans | None = None
    others: list[Any] = field(default_factory=list)
    decoded: list[int] = field(default_factory=list)
    fed: list[list[int]] = field(default_factory=list)
    compressing: bool = True
    observing: bool = False
    reading: bool = False
    inference: bool = False
    spare: list[int] = field(default_factory=list)
    coming: Tensor | int = 0
    waiting: list[Compressible] = field(default_factory=list)
    forwards: int = 0
    begun: dict[int, int] = field(default_factory=dict)
    ended: dict[int, int] = field(default_factory=dict)
    clock: Callable[[], float] = time.perf_counter
    recorder: Records | None = None

    def __post_init__(self) -> None:
        self.asked = self.asked or self.settings

    def knowing(self, held: Held) -> Held:
        """``held`` for a store of this cache, with what is known of its tokens."""
        protects = None if self.spans is None else self.spans.protects
        return replace(held, places=self.positions.places, protects=protects)

    def feed(self, columns: int, decoded: bool) -> None:
        """Count the forward of ``columns`` that ``positions`` has begun."""
        if self.fed and self.fed[-1][1] == decoded:
            self.fed[-1][0] += columns
        else:
            self.fed.append([columns, decoded])
        fed = self._tokens(self.positions.columns - columns, self.positions.columns)
        self.decoded = [n + decoded * more for n, more in zip(self.decoded or [0] * len(fed), fed, strict=True)]

    def take_back(self, columns: int) -> None:
        """Take back the newest ``columns``."""
        end = self.positions.columns
        start = end - columns
        while end > start and self.fed:
            run = self.fed[-1]
            count = min(end - start, run[0])
            fed = self._tokens(end - count, end)
            self.decoded = [max(0, n - run[1] * less) for n, less in zip(self.decoded, fed, strict=True)]
            run[0] -= count
            end -= count
            if not run[0]:
                self.fed.pop()
        self.positions.crop(columns)

    def hide(self, tokens: Tensor) -> None:
        """Take the newest ``tokens`` (B,) of each row for padding."""
        self.positions.hide(tokens)
        self.decoded = [max(0, n - less) for n, less in zip(self.decoded, tokens.tolist(), strict=True)]

    def _tokens(self, start: int, end: int) -> list[int]:
        """Tokens of each row among the columns from ``start`` to ``end``, as far as that matters to a schedule."""
        positions = self.positions
        if positions.tokens is None or self.settings.method.when.every is None:
            return [end - start] * (0 if positions.seen is None else len(positions.seen))
        counts: list[int] = positions.tokens[:, start:end].sum(-1).tolist()
        return counts

    def restart(self) -> None:
        """Every row was compressed: count what is decoded from here."""
        self.decoded, self.fed = [0] * len(self.decoded), []

    def index(self, rows: Tensor) -> None:
        """Row i becomes the present row ``rows[i]``."""
        self.positions.index(rows)
        self.spare = []
        self.decoded = [self.decoded[i] for i in rows.tolist()] if self.decoded else []
        if self.spans is not None:
            self.spans.index(rows)
        if self.recorder is not None:
            self.recorder.index(rows)

    def copy(self, settings: Settings | None = None, asked: Settings | None = None) -> CacheState:
        """An independent copy, with other settings if they are given; asked: those that a reset brings back."""
        spans = None if self.spans is None else self.spans.copy()
        rows = {
            "positions": self.positions.copy(),
            "spans": spans,
            "decoded": list(self.decoded),
            "waiting": [],
            "spare": [],
            "recorder": None,
        }
        fed, begun, ended = [list(x) for x in self.fed], dict(self.begun), dict(self.ended)
        asked = asked or settings or self.asked
        return replace(self, settings=settings or self.settings, asked=asked, fed=fed, begun=begun, ended=ended, **rows)  # type: ignore[arg-type]

    def reset(self) -> None:
        """Forget the rows, and what joins and splits made of the budget and the spans."""
        assert self.asked is not None
        self.settings = self.asked
        fresh = RowPositions(self.positions.axes)
        self.positions.__dict__.update(fresh.__dict__)
        self.decoded, self.fed, self.waiting, self.spare, self.begun, self.ended = [], [], [], [], {}, {}
        if self.spans is not None:
            assert self.settings.policy is not None
            self.spans.reset(self.settings.policy)
        if self.recorder is not None:
            self.recorder.reset()


@dataclass
class Progress:
    """How far a layer has come; what of it is written to files beside tensors.

    seen: columns fed. settled: of these, before the last compression. pending: a prompt waits for its deferred
    compression. compressed: the store holds something else than every token in order. record_past: the newest tokens
    may be rolled back. prefilling: the forward that runs reads a prompt. query_heads: of the model's attention, 0
    before it was called.
    """

    seen: int = 0
    settled: int = 0
    pending: bool = False
    compressed: bool = False
    record_past: bool = False
    prefilling: bool = False
    query_heads: int = 0


class Compressible(Protocol):
    """What a compression takes of a layer, and leaves in it.

    score_state: what the score remembers per row. attention: scaling, softcap and sinks of the latest call, None before
    the first.
    """

    info: LayerInfo
    form: KVForm
    shared: CacheState
    store: Store
    score_state: dict[str, Tensor]
    attention: dict[str, Any] | None
    tally: Tally
    progress: Progress

    def listen(self) -> None: ...


class CacheParts(Protocol):
    """What is written of a cache, and joined with those of another."""

    layers: list[Any]
    made: int  # layers that it was made with
    shared: CacheState
    layout: str
    codec: str
    store_options: dict[str, Any]
    codec_options: dict[str, Any]
    attached_config: dict[str, Any]
    origin: Origin

    def renew(self) -> None: ...

    def reset(self) -> None: ...

    def batch_select_indices(self, indices: Tensor) -> None: ...
