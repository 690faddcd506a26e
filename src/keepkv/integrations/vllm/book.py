"""A worker's side: what is known of each planned request, and what of it is in the batch that runs now."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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

    def receipt(self) -> str:
        """What was kept, in a line. Slots are those of all layers and heads of this worker."""
        plan, counts = self.plan, self.counts
        if not counts.events:
            return f"{plan.wish.method.name} at {plan.wish.budget}: finished before it was compressed"
        return (
            f"{plan.wish.method.name} at {plan.wish.budget}: {counts.events} compressions of {plan.prompt} tokens and "
            f"more, {counts.kept} slots kept after the latest, {counts.dropped} dropped, {counts.merged} merged"
        )


@dataclass
class Part:
    """A planned request in a batch, whose row is ``at``: ``first`` is its first query there, which is token ``begin``
    of it; ``end`` is one past the last. table (blocks,) int64: physical blocks. names: layers of this block table."""

    request: str
    row: Row
    at: int
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
    """What a worker knows: its layers, and the requests that have a plan.

    sites: the layers that are compressed, in the model's order. caches: the tensor of each one's blocks. block: slots
    of a block. transposed: see ``Pool``. longest: tokens that a request may have. default: what the server does with
    requests that ask for nothing.
    """

    def __init__(
        self, sites: Sequence[Site], caches: Mapping[str, Tensor], block: int, transposed: bool, longest: int,
        default: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        self.rows: dict[str, Row] = {}
        self.refused: dict[str, int] = {}  # requests that cannot be served, and the tokens of their prompts
        self.parts: list[Part] = []  # of the step that runs now
        self.sites = {site.name: site for site in sites}
        self._caches, self._pools = dict(caches), dict[str, Pool]()
        self._block, self._transposed, self._longest, self._default = block, transposed, longest, default

    def pool(self, name: str, roams: bool) -> Pool:
        """The blocks of a layer, or of all layers where pages roam over them."""
        key = "" if roams else name
        if key not in self._pools:
            tensors = [self._caches[x] for x in self.sites] if roams else [self._caches[name]]
            self._pools[key] = Pool(tensors, self._transposed)
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
    ) -> list[tuple[str, Row]]:
        """A step begins: requests that are ``new`` in it (name, extra arguments, tokens of the prompt), ``resumed``
        after they lost their blocks, or ``finished`` before it, of which those that had a plan are returned. One that
        cannot be served is not entered: the scheduler, which finds the same, ends it with an error after this step."""
        done = [(name, self.rows.pop(name)) for name in finished if name in self.rows]
        self.refused = {name: x for name, x in self.refused.items() if name not in finished}
        for name, extra, prompt in new:  # an engine may list a resumed request here, too
            self.rows.pop(name, None)
            try:
                plan = plan_of(wish_of(extra, self._default), prompt, self._block, len(self.sites), self._longest)
            except KeepKVError:
                self.refused[name] = prompt
                continue
            if plan is not None:
                self.rows[name] = Row(plan)
        for name in resumed:
            if name in self.rows:
                self.rows[name] = Row(self.rows[name].plan)
        self.parts = []
        return done

    def take(self, part: Part) -> None:
        """Enter a request into the step. Raises ``AssertionError`` where its tokens go beyond an event."""
        following = part.row.plan.next_event(part.begin)
        assert following is None or part.end <= following, (
            f"request {part.request}: tokens {part.begin} to {part.end} reach over the compression at {following}; "
            "the scheduler must be keepkv's"
        )
        self.parts.append(part)

    def end(self) -> None:
        """The step's forward is over: compress what is due."""
        parts, self.parts = self.parts, []
        for part in parts:
            if part.row.plan.last_event(part.end) == part.end:
                layers = [self.layer(part, name) for name in part.names]
                compress(layers, part.row.plan, part.end, part.row.counts)


class _Now:
    """The step that runs in this process: whose book it is, and the requests in the rows of a batch."""

    book: Book | None = None
    order: Callable[[Any], Sequence[str]] = staticmethod(lambda batch: [])


NOW = _Now()


@contextmanager
def running(book: Book, order: Callable[[Any], Sequence[str]]) -> Iterator[None]:
    """Let attention know that a step of ``book`` runs; ``order`` names the request of each row of a batch."""
    NOW.book, NOW.order = book, order
    try:
        yield
    finally:
        NOW.book = None
