"""A cache of tensors without memory: a forward with it takes what a real one takes, and computes nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from transformers import cache_utils as stock

from keepkv.attention.part import Part
from keepkv.core.slots import Slots
from keepkv.engine.cache import Cache
from keepkv.engine.layer import Layer
from keepkv.engine.mask_rule import MaskRule
from keepkv.engine.state import CacheState
from keepkv.plan.live import Live
from keepkv.plan.sample import Costs, Shape
from keepkv.store.ragged import RaggedStore

META = torch.device("meta")
_tiles: Any = import_module("keepkv.attention.attend")
_parts: Any = import_module("keepkv.attention.part")


@contextmanager
def _few_tiles() -> Iterator[None]:
    """Inside, attention goes through few of its tiles: of those of queries through one of each shape, of those of slots
    through the first two, the second of which is joined to what there is, and the last two. The others take as much."""
    inner, starts = _tiles._attend, _parts._starts
    known: dict[Any, Any] = {}

    def attend(query: Tensor, part: Part, *rest: Any) -> Any:
        shape = query.shape, part.positions.shape
        if shape in known:
            return known[shape]._make(torch.empty_like(x) for x in known[shape])
        known[shape] = inner(query, part, *rest)
        return known[shape]

    _tiles._attend, _parts._starts = attend, lambda *sizes: _ends(starts(*sizes))
    try:
        yield
    finally:
        _tiles._attend, _parts._starts = inner, starts


def _ends(starts: Iterable[int]) -> list[int]:
    found = list(starts)
    return found if len(found) < 5 else found[:2] + found[-2:]


class DryLayer(Layer):
    """A layer whose compressions take memory as real ones do, and leave as many slots.

    live: what counts. slots: how many of each head are left, given how many tokens were seen. state: bytes a row that
    the score remembers.
    """

    live: Live
    slots: Callable[[int], int]
    costs: Costs
    state: int
    shape: Shape | None = None
    fed: tuple[torch.Size, torch.Size]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.fed = key_states.shape, value_states.shape
        return super().update(key_states, value_states, *args, **kwargs)

    def attend(self, *args: Any, **kwargs: Any) -> Tensor:
        with _few_tiles():
            return super().attend(*args, **kwargs)

    def _after_attention(self, query: Tensor, weights: Tensor | None, attention: dict[str, Any]) -> None:
        if self.attention is None:
            keys, values = self.fed
            self.shape = Shape(keys[1], keys[3], values[3], query.shape[1], query.shape[3])
            self.progress.query_heads, self.attention = query.shape[1], attention
        method, rows = self.shared.settings.method, query.shape[0]
        if method.when.prefill is not None:
            if self._observes():
                self._take(rows * self.costs.observe(query.shape[2], self.store.length))
                self.score_state = {"state": torch.empty(rows * self.state, dtype=torch.uint8, device=META)}
            self.progress.pending = True
            last = self.info.rank == self.info.ranks - 1
            if method.when.prefill == "immediate" and (last or not method.allocate.joint) and not self.info.is_shared:
                self.end_forward()
        if not self.info.is_shared:
            self.store.after_prefill()

    def end_forward(self) -> None:
        """Run the compression that is due: of this layer, or of all of those that share its budget."""
        cache_layers = self.shared.waiting if self.shared.settings.method.allocate.joint else [self]
        due = [layer for layer in cache_layers if isinstance(layer, DryLayer) and layer.progress.pending]
        if not due or self.slots(self.progress.seen) >= self.progress.seen:
            return
        rows, layers = self.batch_size, self.info.ranks if self.shared.settings.method.allocate.joint else 1
        self._take(rows * self.costs.compress(layers, self.store.length))
        for layer in due:
            layer._keep()

    def _take(self, size: int) -> None:
        torch.empty(max(0, size), dtype=torch.uint8, device=META)

    def _keep(self) -> None:
        """Hold as many slots as are left, and no others."""
        old, count = self.store, self.slots(self.progress.seen)
        with self.live.unwatched():
            like, (b, h) = old.like(), old.lengths.shape
            keys, values = (x.new_empty(b, h, count, x.shape[-1]) for x in like)
            positions = keys.new_empty(b, h, count, dtype=torch.int32)
            stats = {name: keys.new_empty(b, h, count, dtype=torch.float32) for name in old.held.stats}
            self.store = self.store.empty()
            self.store.load(Slots(keys, values, keys.new_empty(b, h, count, dtype=torch.float32), positions, stats))
            if isinstance(self.store, RaggedStore) and self.store.body.segments is not None:
                self.store.body.segments = replace(self.store.body.segments, longest=count)
        self.progress.pending, self.progress.compressed = False, True


class DryCache(Cache):
    """``layers`` of which those of ours are dry; begins forwards without looking at numbers, as there are none."""

    def __init__(self, layers: Sequence[Any], shared: CacheState) -> None:
        self.shared, self.made = shared, len(layers)
        shared.waiting = [layer for layer in layers if isinstance(layer, DryLayer)]  # those that share a budget
        stock.Cache.__init__(self, layers=list(layers))

    def begin_step(self, rule: MaskRule, layer_idx: int) -> None:
        batch, _, length, _ = rule.shape
        positions, reached = self.shared.positions, max(layer.progress.seen for layer in self._dry)
        if positions.columns > reached:  # a second mask of the same forward
            return
        positions.seen = torch.empty(batch, dtype=torch.int64, device=META)
        positions.positions = torch.empty(batch, length, dtype=torch.int64, device=META)
        positions.columns += length
        for layer in self._dry:
            layer.progress.prefilling = True

    @property
    def _dry(self) -> list[DryLayer]:
        return [layer for layer in self.layers if isinstance(layer, DryLayer)]

    def end_forward(self, last: bool) -> None:
        """Run compressions that wait for the next forward. last: the prompt ends here."""
        for layer in self._dry:
            if last or layer.shared.settings.method.when.prefill == "immediate":
                layer.end_forward()
