"""A worker's side: what is known of each planned request, and what of it is in the batch that runs now."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from keepkv.errors import KeepKVError
from keepkv.integrations.vllm.compress import Counts, Layer, Site, compress
from keepkv.integrations.vllm.pages import Held, Pages
from keepkv.integrations.vllm.plan import Plan, plan_of
from keepkv.integrations.vllm.pool import Pool
from keepkv.integrations.vllm.wish import wish_of


@dataclass
class Row:
    """A planned request on a worker."""

    plan: Plan
    layers: dict[str, Held] = field(default_factory=dict)
    counts: Counts = field(default_factory=Counts)


@dataclass
class Part:
    """A planned request in a batch: ``first`` is the row of its first query there, which is token ``begin`` of it;
    ``end`` is one past the last. table (blocks,) int64: physical blocks. names: layers of this block table."""

    request: str
    row: Row
    first: int
    begin: int
    end: int
    table: Tensor
    names: Sequence[str]

    @property
    def exact(self) -> bool:
        """Whether a stock kernel sees the request as it is, from block ``first_block`` on: all that is held is right
        before the next token, head by head, with neither votes nor a hole."""
        plan, event = self.row.plan, self.row.plan.last_event(self.begin)
        if not event or plan.held(event) == event:
            return True
        plain = not plan.packed and not plan.wish.method.reduce.merges
        return plain and (event - plan.held(event)) % plan.block == 0


class Book:
    """What a worker process knows: its layers, and the requests that have a plan."""

    def __init__(self) -> None:
        self.rows: dict[str, Row] = {}
        self.sites: dict[str, Site] = {}
        self.caches: dict[str, Tensor] = {}
        self.transposed = False
        self.unknown_rope: dict[str, str] = {}
        self.parts: list[Part] | None = None  # of the step that runs now; None between steps
        self.order: Callable[[Any], Sequence[str]] | None = None
        self.done: Callable[[str, Row], None] = lambda request, row: None
        self._pools: dict[str, Pool] = {}

    # --- layers --------------------------------------------------------------------------------------------------

    def settle(
        self, sites: Sequence[Site], caches: Mapping[str, Tensor], transposed: bool, unknown: Mapping[str, str]
    ) -> None:
        """Take note of the layers that are compressed, and of the tensors of their blocks."""
        self.sites, self.caches = {site.name: site for site in sites}, dict(caches)
        self.transposed, self.unknown_rope, self._pools = transposed, dict(unknown), {}

    def pool(self, name: str, roams: bool) -> Pool:
        """The blocks of a layer, or of all layers where pages roam over them."""
        key = "" if roams else name
        if key not in self._pools:
            tensors = list(self.caches.values()) if roams else [self.caches[name]]
            self._pools[key] = Pool(tensors, self.transposed)
        return self._pools[key]

    def layer(self, part: Part, name: str) -> Layer:
        """A layer of a request in the batch."""
        plan, site = part.row.plan, self.sites[name]
        pool = self.pool(name, plan.roams)
        if name not in part.row.layers:
            first = site.rank * pool.heads if plan.roams else 0
            part.row.layers[name] = Held(slice(first, first + pool.heads))
        return Layer(site, part.row.layers[name], Pages(pool, part.table, plan))

    # --- steps ---------------------------------------------------------------------------------------------------

    def begin(
        self,
        new: Sequence[tuple[str, Mapping[str, Any] | None, int]],
        resumed: Sequence[str],
        finished: Sequence[str],
        default: Mapping[str, Any] | None,
        block: int,
        longest: int,
    ) -> None:
        """A step begins: requests that are ``new`` in it (name, extra arguments, tokens of the prompt), ``resumed``
        after they lost their blocks, or ``finished`` before it. Raises ``KeepKVError`` where one cannot be served."""
        for name in finished:
            if (row := self.rows.pop(name, None)) is not None:
                self.done(name, row)
        for name, extra, prompt in new:  # an engine may list a resumed request here, too
            plan = plan_of(wish_of(extra, default), prompt, block, len(self.sites), longest)
            self.rows.pop(name, None)
            if plan is not None:
                self._check(plan)
                self.rows[name] = Row(plan)
        for name in resumed:
            if name in self.rows:
                self.rows[name] = Row(self.rows[name].plan)
        self.parts = []

    def _check(self, plan: Plan) -> None:
        if plan.wish.method.score.needs_rope and self.unknown_rope:
            name, reason = next(iter(self.unknown_rope.items()))
            raise KeepKVError(
                f"method {plan.wish.method.name!r} must undo the rotation of keys, and that of {name} is not known: "
                f"{reason}. Use a method that need not, such as 'snapkv', 'adakv' or 'keepkv'."
            )

    def take(self, part: Part) -> None:
        """Enter a request into the step. Raises ``AssertionError`` where its tokens go beyond an event."""
        following = part.row.plan.next_event(part.begin)
        assert following is None or part.end <= following, (
            f"request {part.request}: tokens {part.begin} to {part.end} reach over the compression at {following}; "
            "the scheduler must be keepkv's"
        )
        assert self.parts is not None
        self.parts.append(part)

    def end(self) -> None:
        """The step's forward is over: compress what is due."""
        parts, self.parts = self.parts or [], None
        for part in parts:
            if part.row.plan.last_event(part.end) == part.end:
                layers = [self.layer(part, name) for name in part.names]
                compress(layers, part.row.plan, part.end, part.row.counts)


BOOK = Book()
