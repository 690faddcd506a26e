"""The forwards of a stream: what is read next, at which rotary positions, and what makes way for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from keepkv.core.rope import AXES
from keepkv.core.tokens import VIDEO
from keepkv.engine.cache import Cache
from keepkv.engine.places import telling
from keepkv.engine.relocate import drop
from keepkv.engine.versions import CACHE
from keepkv.errors import UnsupportedInput
from keepkv.video.family import Family
from keepkv.video.moves import compact, forget


@dataclass
class Counts:
    """How far a stream has come. prefix, kept: tokens of text before all frames, and of turns that were kept. vision:
    slots of a KV head. steps: time steps seen. edge: position in time of what comes next. issued: the next that no
    token has on any axis. peak: the most slots that a KV head has held. turns: first token of each turn that was kept,
    and the one behind its last, oldest first."""

    prefix: int = 0
    kept: int = 0
    vision: int = 0
    steps: int = 0
    edge: int = 0
    issued: int = 0
    compressions: int = 0
    peak: int = 0
    turns: list[list[int]] = field(default_factory=list)

    @property
    def held(self) -> int:
        """Slots that a KV head holds."""
        return self.prefix + self.kept + self.vision


@dataclass
class Reader:
    """Feeds a model and its cache. limit: rotary positions stay below it. ticks: positions in time from one step to the
    next. moves: whether slots may be given other positions. grid: cells (rows, columns) of a step, once known."""

    model: Any
    family: Family
    cache: Cache
    limit: int
    ticks: int
    moves: bool
    counts: Counts = field(default_factory=Counts)
    grid: tuple[int, int] | None = None

    @property
    def device(self) -> torch.device:
        """Where tokens are embedded."""
        device: torch.device = self.model.get_input_embeddings().weight.device
        return device

    @property
    def entries(self) -> int:
        """Slots that a KV head holds, as the cache has them: the same in every head and layer."""
        first = self.cache.compressible[0]
        return int(first.store.lengths.max()) if first.is_initialized else 0

    @property
    def cells(self) -> int:
        """Vision tokens of a step."""
        assert self.grid is not None
        return self.grid[0] * self.grid[1]

    # --- frames --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def steps(self, frames: Tensor) -> None:
        """Read whole time steps, frames (N,3,H,W); there is room for them."""
        assert self.grid is not None
        (rows, columns), counts, count = self.grid, self.counts, len(frames) // self.family.frames
        ids = torch.full((1, count * self.cells), self.family.token, device=self.device)
        starts = (torch.arange(ids.shape[1], device=self.device) % self.cells == 0)[None]
        pixels = self.family.pixels(frames.to(next(self.model.parameters()).dtype))
        with telling(self.cache, torch.full_like(ids, VIDEO), starts):
            self._forward(ids, self._places(count), **pixels)
        counts.vision += ids.shape[1]
        counts.steps += count
        counts.edge += self.advance(count)
        counts.issued = max(counts.issued, counts.edge, counts.prefix + max(rows, columns))

    def advance(self, steps: int) -> int:
        """Positions in time that so many steps take."""
        return steps * (self.ticks if self.family.axes == AXES else self.cells)

    def _places(self, steps: int) -> Tensor:
        """Rotary positions (3,1,n) or (1,n) of so many steps: cells stand where those of the first one do."""
        counts, device = self.counts, self.device
        if self.family.axes < AXES:
            return counts.edge + torch.arange(steps * self.cells, device=device)[None]
        assert self.grid is not None
        t, h, w = (torch.arange(n, device=device) for n in (steps, *self.grid))
        grid = torch.meshgrid(counts.edge + t * self.ticks, counts.prefix + h, counts.prefix + w, indexing="ij")
        return torch.stack(grid).reshape(AXES, 1, -1)

    # --- text ----------------------------------------------------------------------------------------------------

    @property
    def text_start(self) -> int:
        """Where text stands that comes now: behind all positions that were given."""
        return max(self.counts.edge, self.counts.issued)

    @torch.no_grad()
    def text(self, ids: Tensor) -> Tensor:
        """Logits (1,V) of what follows ``ids`` (1,n)."""
        at = self.text_start + torch.arange(ids.shape[1], device=self.device)[None]
        logits = self._forward(ids, at if self.family.axes < AXES else at.expand(AXES, *at.shape))
        self.counts.edge = self.counts.issued = self.text_start + ids.shape[1]
        return logits

    def answer(self, ids: Tensor, most: int, on_token: Callable[[int], None] | None, keep: bool) -> list[int]:
        """The greedy answer to ``ids`` (1,n). keep: its last token is read too."""
        ends = getattr(self.model.generation_config, "eos_token_id", None)
        stop = {ends} if isinstance(ends, int) else set(ends or ())
        logits, said = self.text(ids), list[int]()
        while True:
            token = int(logits[0].argmax())
            said.append(token)
            if on_token is not None:
                on_token(token)
            last = token in stop or len(said) == most
            if not last or keep:
                logits = self.text(torch.tensor([[token]], device=self.device))
            if last:
                return said

    def keep(self, ids: Tensor, most: int, on_token: Callable[[int], None] | None) -> list[int]:
        """``answer``, and both stay."""
        start = int(self.cache.seen[0]) if len(self.cache.seen) else 0
        said = self.answer(ids, most, on_token, keep=True)
        self.counts.turns.append([start, start + ids.shape[1] + len(said)])
        self.counts.kept += ids.shape[1] + len(said)
        return said

    def drop_turn(self) -> None:
        """Free the oldest turn that was kept, whole."""
        first, last = self.counts.turns.pop(0)
        for layer in self.cache.compressible:
            drop(layer, first, last)
        self.counts.kept -= last - first

    def passing(self, ids: Tensor, most: int, on_token: Callable[[int], None] | None) -> list[int]:
        """``answer``, and nothing is left of question and answer."""
        before = asdict(self.counts)
        try:
            with self.cache.transient():
                return self.answer(ids, most, on_token, keep=False)
        finally:
            self.counts = Counts(**{**before, "peak": self.counts.peak})

    def _forward(self, ids: Tensor, places: Tensor, **pixels: Tensor) -> Tensor:
        given = {"input_ids": ids, "position_ids": places, "logits_to_keep": 1, "use_cache": True, **pixels}
        logits: Tensor = self.model(**given, **{CACHE: self.cache}).logits[:, -1]
        self.counts.peak = max(self.counts.peak, self.entries)
        return logits

    # --- room ----------------------------------------------------------------------------------------------------

    def compress(self, left: int) -> None:
        """Leave so many vision slots, and all text."""
        self.cache.compress(budget=self.counts.prefix + self.counts.kept + left)
        self.counts.vision = min(self.counts.vision, left)
        self.counts.compressions += 1
        forget(self.cache)

    def make_way(self, end: int, spare: int = 0) -> None:
        """Positions below ``end`` are about to be given, and ``spare`` more are left to text: move slots together where
        these are beyond the limit."""
        if end + spare > self.limit and self.moves:
            edge, counts = compact(self.cache, self.counts.prefix, self.ticks), self.counts
            end -= counts.edge - edge
            counts.edge = counts.issued = edge
            if self.grid is not None and self.family.axes == AXES:
                counts.issued = max(edge, counts.prefix + max(self.grid))
        if end + spare > self.limit:
            raise UnsupportedInput(
                f"the stream has come to rotary position {end}, and with {spare} left to text the limit is {self.limit}"
                + ("" if self.moves else ": give positions='auto', which moves slots together")
                + ". A smaller cap, fewer ticks, or limit=… of a model that can do more."
            )
