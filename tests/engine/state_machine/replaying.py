"""The plainest route to what a cache must be: each row alone, from scratch, fed what it still remembers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from histories import Columns, Event, History
from torch import Tensor
from worlds import World

import keepkv
from keepkv.engine.versions import CACHE


def forward(world: World, cache: keepkv.Cache, past: Sequence[Columns], new: Sequence[Columns]) -> Tensor:
    """Logits (B,T,V) of the columns ``new`` of each row behind its ``past``, shorter ones padded on the left."""
    width = cache.get_seq_length()
    rows = [aligned(before, width) + [*after] for before, after in zip(past, new, strict=True)]
    real = torch.tensor([[x is not None for x in row] for row in rows])
    ids = torch.tensor([[x or 0 for x in row] for row in rows])[:, width:]
    places = (real.cumsum(-1) - 1).clamp_min(0)[:, width:]
    mask = None if bool(real.all()) else real.long()
    with torch.no_grad():
        out: Tensor = world.model(input_ids=ids, attention_mask=mask, position_ids=places, **{CACHE: cache}).logits
    return out


def aligned(columns: Sequence[int | None], width: int) -> list[int | None]:
    """The newest ``width`` columns, padded on the left where there are fewer."""
    return [*[None] * (width - len(columns)), *columns[max(0, len(columns) - width) :]]


class Alone:
    """A row by itself: a fresh cache that was fed ``history`` with no padding, copy, crop, file, or other row."""

    def __init__(self, world: World, history: History) -> None:
        self.world, self.cache = world, world.cache()
        self.columns: Columns = ()
        for event in history:
            if event.kind in OPERATIONS:
                OPERATIONS[event.kind](self.cache)
            elif event.tokens:
                self.feed(event)
            else:  # a forward in which this row had nothing but padding
                settle(self.cache, prompt=event.kind != "read")

    def feed(self, event: Event) -> Tensor:
        """Logits (1,T,V) of a forward."""
        alone = (
            event.kind == "read" and len(event.tokens) == 1
        )  # would be decoded, not read, without a column beside it
        new = (*[None] * alone, *event.tokens)
        logits = forward(self.world, self.cache, [self.columns], [new])
        self.columns += new
        return logits


def settle(cache: keepkv.Cache, prompt: bool = True, rows: bool = True) -> None:
    """Run what the next decoded token would find due. prompt: the end of the prompt and the compression of what was
    read; rows: the compression of decoded tokens."""
    every, shared = cache.settings.method.when.every, cache.shared
    seen = shared.positions.seen
    if prompt and shared.spans is not None and seen is not None:
        shared.spans.end_prompt(seen)
    waits = prompt and any(layer.progress.pending for layer in cache.compressible)
    over = rows and every is not None and any(n >= every for n in shared.decoded)
    if cache.compressing and (waits or over):
        cache.compress()
    if prompt and cache.compressing and every is None:
        for layer in cache.compressible:
            layer.drop_score_state()


OPERATIONS = {
    "settle": settle,
    "settle prompt": lambda cache: settle(cache, rows=False),
    "settle rows": lambda cache: settle(cache, prompt=False),
    "load": lambda cache: None,
    "compress": lambda cache: cache.compress(),
    "freeze": lambda cache: setattr(cache, "compressing", False),
    "thaw": lambda cache: setattr(cache, "compressing", True),
    "record": lambda cache: cache.activate_past_recording(),
}
