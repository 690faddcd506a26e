"""The slots of one layer of one request, read from blocks and written to them. Knows no vLLM."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from keepkv.core.slots import EMPTY, Slots
from keepkv.integrations.vllm.places import Places, equal_places, packed_places, recent_places
from keepkv.integrations.vllm.plan import Plan
from keepkv.integrations.vllm.pool import Pool


@dataclass
class Held:
    """What a layer holds of a request. event: tokens at the latest compression that dropped something, 0: none did.

    counts (N,) int64: slots of each lane right after it; where pages roam all layers of a request have one such tensor.
    lanes: this layer's; most: the largest of their counts. state: what its score remembers, each entry with a leading
    dimension of 1.
    """

    lanes: slice
    event: int = 0
    counts: Tensor | None = None
    most: int = 0
    state: dict[str, Tensor] = field(default_factory=dict)

    def lengths(self, end: int) -> Tensor:
        """(1,H) int64: slots of each head when ``end`` tokens are stored."""
        heads = self.lanes.stop - self.lanes.start
        if self.counts is None:
            return torch.full((1, heads), end)
        return (self.counts[self.lanes] + (end - self.event))[None]


class Pages:
    """One layer of one request: ``table`` (blocks,) int64 has the physical block of each logical one."""

    def __init__(self, pool: Pool, table: Tensor, plan: Plan) -> None:
        self.pool, self.table, self.plan = pool, table, plan
        score = plan.wish.method.score
        self.stats = {name: kind.start for name, kind in score.stats.items()}  # at most one

    def read(self, held: Held, end: int) -> Slots:
        """Slots (1,H,S,…) that are held when ``end`` tokens are stored, empty ones first."""
        recent = self._recent(held, held.event, end)
        slots = self._gather(recent, None)
        slots.positions = torch.arange(held.event, end, device=self.table.device).expand(slots.positions.shape).int()
        return slots if held.counts is None else self._gather(self._kept(held), True).join(slots)

    def write(self, held: Held, slots: Slots) -> None:
        """Put ``slots`` (1,H,S,…), empty ones first, where the event and counts of ``held`` say."""
        places = self._kept(held)
        real = places.real
        at = self.table[places.block[real]], places.lane[real], places.offset[real]
        for name, x in (
            ("keys", slots.keys), ("values", slots.values), ("votes", slots.log_votes), ("positions", slots.positions),
            *(("stats", x) for x in slots.stats.values()),
        ):  # fmt: skip
            fitted = x[0][:, x.shape[2] - real.shape[1] :]
            self.pool.write(name, *at, fitted[real])

    def begin(self, held: Held, begin: int, end: int) -> None:
        """Give the tokens ``begin`` to ``end``, which were just stored, the statistics that they start with."""
        for start in self.stats.values():
            places = self._recent(held, begin, end)
            at = self.table[places.block], places.lane, places.offset
            self.pool.write("stats", *at, torch.full(places.block.shape, start, device=self.table.device))

    def write_stats(self, held: Held, slots: Slots) -> None:
        """Store the statistics of ``slots``, as ``read`` returned them."""
        for x in slots.stats.values():
            recent = x.shape[2]
            if held.counts is not None:
                places = self._kept(held)
                recent -= places.real.shape[1]
                self._put(places, x[0, :, : places.real.shape[1]])
            self._put(self._recent(held, held.event, held.event + recent), x[0, :, x.shape[2] - recent :])

    def _put(self, places: Places, x: Tensor) -> None:
        at = (self.table[places.block[places.real]], places.lane[places.real], places.offset[places.real])
        self.pool.write("stats", *at, x[places.real])

    def _kept(self, held: Held) -> Places:
        assert held.counts is not None
        if not self.plan.packed:
            return equal_places(held.counts[held.lanes], held.event, self.plan.block)
        first = self.plan.first_block(held.event)
        return packed_places(held.counts, held.event, first, self.plan.block).of(held.lanes)

    def _recent(self, held: Held, begin: int, end: int) -> Places:
        places = recent_places(begin, end, held.lanes.stop - held.lanes.start, self.plan.block, self.table.device)
        return places._replace(lane=places.lane + held.lanes.start)

    def _gather(self, places: Places, kept: bool | None) -> Slots:
        """The slots at ``places`` (H,S). Only those that were compressed have votes and positions of their own."""
        at = self.table[places.block], places.lane, places.offset
        stats = {name: self.pool.read("stats", *at)[None] for name in self.stats}
        if kept:
            votes, positions = self.pool.read("votes", *at), self.pool.read("positions", *at)
            positions, votes = positions.masked_fill(~places.real, EMPTY), votes.masked_fill(~places.real, 0.0)
        else:
            votes = torch.zeros(places.block.shape, device=self.table.device)
            positions = torch.zeros(places.block.shape, dtype=torch.int32, device=self.table.device)
        keys, values = self.pool.read("keys", *at), self.pool.read("values", *at)
        if kept:  # whatever others left there, even where it is no number
            keys.masked_fill_(~places.real[..., None], 0.0)
            values.masked_fill_(~places.real[..., None], 0.0)
        return Slots(keys[None], values[None], votes[None], positions[None], stats)
