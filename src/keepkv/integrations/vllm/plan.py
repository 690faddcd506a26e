"""When a request is compressed, and to how many slots: arithmetic that scheduler and workers both do, so that neither
has to tell the other. Knows no vLLM.

Token t lies at logical slot t for ever. A compression after E tokens, an *event*, puts what it keeps right before slot
E, and the blocks in front of that are given back:

    logical slot   0 …                    E − held(E) ……… E ……… T
                   given back           |   kept        |   tokens since
    block          0 … first_block − 1      first_block …
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from math import ceil
from typing import NamedTuple

import torch

from keepkv.allocate.base import Allocate
from keepkv.integrations.vllm.served import last_queries, sees_all
from keepkv.integrations.vllm.wish import Wish
from keepkv.methods.allowance import allowed_slots


class Step(NamedTuple):
    """Right after an event: slots per KV head, a mean over heads and layers, rounded up, and the first block that is
    still read."""

    held: int
    first_block: int


@dataclass(frozen=True)
class Plan:
    """The plan of a request whose prompt has ``prompt`` tokens.

    block: slots of a block. layers: layers that are compressed; they share one block table where their budgets differ.
    longest: tokens that a request may have at most.
    """

    wish: Wish
    prompt: int
    block: int
    layers: int = 1
    longest: int = 1 << 20
    _steps: list[Step] = field(default_factory=list, compare=False, repr=False)

    # --- when ----------------------------------------------------------------------------------------------------

    @property
    def every(self) -> int | None:
        return self.wish.method.when.every

    def last_event(self, seen: int) -> int:
        """The latest event at or before ``seen`` tokens, 0 where there is none."""
        if seen < self.prompt:
            return 0
        return self.prompt + (seen - self.prompt) // self.every * self.every if self.every else self.prompt

    def next_event(self, seen: int) -> int | None:
        """The first event after ``seen`` tokens, None where there is none."""
        if seen < self.prompt:
            return self.prompt
        return self.last_event(seen) + self.every if self.every else None

    # --- how many ------------------------------------------------------------------------------------------------

    @cached_property
    def roams(self) -> bool:
        """Whether layers may keep different numbers of slots, so that pages of all of them are packed together."""
        allocate = self.wish.method.allocate
        return self.layers > 1 and (allocate.joint or type(allocate).layer_budget is not Allocate.layer_budget)

    @property
    def packed(self) -> bool:
        """Whether heads may keep different numbers of slots, so that their pages are packed."""
        return self.wish.method.allocate.ragged or self.roams

    def wanted(self, seen: int, layer: int = 0) -> int:
        """Slots per KV head that ``layer`` may hold on average at ``seen`` tokens."""
        budget = self.wish.budget
        if budget.slots is not None and budget.slots >= seen:
            return seen
        mean = float(budget.per_head(torch.tensor([seen]))[0])
        return allowed_slots(self.wish.method, mean, seen, budget.grows, layer, self.layers)

    def held(self, event: int) -> int:
        """Slots per KV head right after ``event``, a mean over heads and layers, rounded up."""
        return self._step(event).held

    def first_block(self, seen: int) -> int:
        """Blocks below this are read no more once ``seen`` tokens are processed. Never falls as ``seen`` rises."""
        event = self.last_event(seen)
        return self._step(event).first_block if event else 0

    def _step(self, event: int) -> Step:
        index = (event - self.prompt) // self.every if self.every else 0
        while len(self._steps) <= index:
            self._steps.append(self._following())
        return self._steps[index]

    def _following(self) -> Step:
        """The step of the first event that is not known yet."""
        event = self.prompt + len(self._steps) * (self.every or 0)
        last = self._steps[-1] if self._steps else Step(event - (self.every or 0), 0)
        before = last.held + (self.every or 0)
        kept = min(before, self._mean(event))
        if self.wish.fill and kept < before and not self.packed:
            kept = min(before, kept + (event - kept) % self.block)
        return Step(kept, max(last.first_block, self._free(event, kept)))

    def _mean(self, event: int) -> int:
        layers = self.layers if self.roams else 1
        return ceil(sum(self.wanted(event, layer) for layer in range(layers)) / layers)

    def _free(self, event: int, held: int) -> int:
        """Blocks at the front that are free where ``held`` slots lie right before slot ``event``."""
        if held == event:
            return 0
        if not self.packed:
            return (event - held) // self.block
        # Each of N heads needs ⌈n/block⌉ pages at most, so all need N·(held/block + 1). With a share, of which more is
        # held at each event, one block more: then no later event needs what an earlier one has given back.
        spare = 2 if self.wish.budget.grows and self.every else 1
        return max(0, event // self.block - ceil(held / self.block) - spare)

    # --- what others may share -----------------------------------------------------------------------------------

    @cached_property
    def first_loss(self) -> int | None:
        """The first event at which something is dropped, None where there is none before ``longest`` tokens."""
        event: int | None = self.prompt
        while event is not None and event <= self.longest:
            if self.held(event) < event:
                return event
            event = self.next_event(event)
        return None

    @cached_property
    def untouched(self) -> int:
        """Tokens at the front, whole blocks of them, that no compression writes to: what a prefix cache may keep."""
        return self.longest if self.first_loss is None else self.first_block(self.first_loss) * self.block

    @cached_property
    def readable(self) -> int:
        """Tokens at the front, whole blocks of them, that may come from a prefix cache: of those untouched, the ones
        whose queries the score does not look at."""
        if self.first_loss is None:
            return self.longest
        if sees_all(self.wish.method):
            return 0
        unseen = max(0, self.first_loss - last_queries(self.wish.method))
        return min(self.untouched, unseen // self.block * self.block)


def plan_of(wish: Wish | None, prompt: int, block: int, layers: int, longest: int) -> Plan | None:
    """The plan of a request, None where it is an ordinary one: nothing was asked for, or nothing would be dropped."""
    if wish is None:
        return None
    plan = Plan(wish, prompt, block, layers, longest)
    return plan if plan.first_loss is not None else None
