"""Attention over a batch in which some rows are compressed: what is added to a stock backend, whichever it is.

Everything logical stays as it is, and only what attention reads is shifted: the table of a planned row begins with the
first block that is still read, and its length is counted from there.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor

from keepkv.core.slots import Slots
from keepkv.engine.view import SlotsOnDemand
from keepkv.errors import KeepKVError
from keepkv.integrations.vllm.attend import attend_blocks, attend_slots, decodes
from keepkv.integrations.vllm.book import Book, Part
from keepkv.integrations.vllm.compress import Layer


def parts_of(
    book: Book,
    names: Sequence[str],
    requests: Sequence[str],
    starts: Sequence[int],
    ends: Sequence[int],
    tables: Tensor,
) -> list[Part]:
    """The planned rows of a batch.

    requests: of each row; starts (rows+1): where the queries of each begin; ends: tokens that each row has after this
    step; tables (rows,blocks): physical blocks. names: layers that the tables belong to.
    """
    found = []
    for i, request in enumerate(requests):
        row = book.rows.get(request)
        if ends[i] > book.refused.get(request, ends[i]) + 1:
            raise KeepKVError(f"request {request} cannot be served, and the scheduler goes on with it uncompressed")
        if row is not None:
            begin = ends[i] - (starts[i + 1] - starts[i])
            found.append(Part(request, row, i, starts[i], begin, ends[i], tables[i].long().clone(), list(names)))
    return found


def shifted(parts: Sequence[Part], tables: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Tables (rows,blocks) and lengths (rows,) as a stock kernel is to read them; those given are left as they are.

    Of a row that it cannot read as it is, it gets the block of the newest tokens alone, and its output is not used.
    """
    tables, lengths = tables.clone(), lengths.clone()
    for part in parts:
        plan, i = part.row.plan, part.at
        skip = plan.first_block(part.begin) if part.exact else part.begin // plan.block
        tables[i, : tables.shape[1] - skip] = tables[i, skip:].clone()
        lengths[i] = part.end - skip * plan.block
    return tables, lengths


def serve(book: Book, parts: Sequence[Part], name: str, query: Tensor, output: Tensor) -> None:
    """Attention of the rows of ``parts`` in ``query`` (tokens,Hq,D), layer ``name``, into ``output``, where a stock
    kernel could not; and let scores see them.

    Single tokens go to the kernel for blocks, all rows at once, where there is one for this device.
    """
    layers = [book.layer(part, name) for part in parts]
    fast = [decodes(part, layer, query) for part, layer in zip(parts, layers, strict=True)]
    for roams in (False, True):
        some = [(p, x) for p, x, y in zip(parts, layers, fast, strict=True) if y and p.row.plan.roams == roams]
        if some:
            attend_blocks(some, query, output)
    for part, layer, done in zip(parts, layers, fast, strict=True):
        _serve_one(part, layer, query, output, part.exact or done)


def _serve_one(part: Part, layer: Layer, query: Tensor, output: Tensor, attended: bool) -> None:
    plan = part.row.plan
    at = slice(part.first, part.first + part.end - part.begin)
    q, score = query[at], plan.wish.method.score
    layer.pages.begin(layer.held, part.begin, part.end)
    slots = None
    if not attended:
        slots = layer.pages.read(layer.held, part.end)
        site, votes = layer.site, plan.wish.method.reduce.merges
        done = attend_slots(q, slots, site.scaling, votes, site.softcap, site.sinks)
        output[at].copy_(done.reshape(output[at].shape))
    if score.observes and (part.begin < plan.prompt or plan.every is not None):
        _observe(layer, part, q, slots)


def _observe(layer: Layer, part: Part, query: Tensor, slots: Slots | None) -> None:
    """Let the score see the queries; slots are gathered only where it looks at them.

    Tokens of a reply are shown one at a time, as they were decoded, even where a request that had lost its blocks reads
    many of them at once.
    """
    plan, end = part.row.plan, part.end
    held = SlotsOnDemand(lambda: layer.pages.read(layer.held, end)) if slots is None else slots
    each = end - part.begin if part.begin < plan.prompt else 1
    for seen in range(part.begin + each, end + 1, each):
        upto = held if seen == end else SlotsOnDemand(partial(_without_newest, held, end - seen))
        now = query[seen - each - part.begin : seen - part.begin]
        plan.wish.method.score.observe(layer.site.view(upto, layer.held, seen, plan, now, seen - each))
    if layer.pages.stats:
        layer.pages.write_stats(layer.held, held)


def _without_newest(slots: Slots, count: int) -> Slots:
    """Views of all but the newest ``count`` of ``slots``."""
    return slots.map(lambda x: x[:, :, : x.shape[2] - count])
