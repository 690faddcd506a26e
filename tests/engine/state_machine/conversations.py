"""A cache, what its rows went through, and what can be done to both."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from histories import Event, History, columns, has_gaps, without_gaps, without_newest
from invariants import changed, check, check_budget, heard
from replaying import Alone, forward
from torch import Tensor
from worlds import World

import keepkv
from keepkv.engine.layer import Layer
from keepkv.errors import KeepKVError

CLOSE = 2e-4  # logits of a row alone and of the same row in a batch


class Conversation:
    """Rows that live in one cache.

    fresh: rows that have just joined must decode before they read. moved: rows have joined or left. settings: what a
    new batch starts with.
    """

    def __init__(self, world: World, words: Iterator[int]) -> None:
        self.world, self.words = world, words
        self.cache = world.cache()
        self.rows: list[History] = []
        self.fresh = self.moved = False
        self.settings: History = ()

    # --- forwards ----------------------------------------------------------------------------------------------

    def feed(self, kind: str, lengths: Sequence[int], padding: int = 0) -> Tensor | None:
        """Logits of a forward of new tokens, so many for each row, ``padding`` columns wider than it must be.

        None where it is refused.
        """
        width = max(lengths) + padding
        new = [(*[None] * (width - n), *(next(self.words) for _ in range(n))) for n in lengths]
        past, logits = [columns(row) for row in self.rows], None

        def fed() -> None:
            nonlocal logits
            logits = forward(self.world, self.cache, past, new)

        if not self.attempt(fed, must_work=not self.asks):
            return None
        self.rows = [(*row, Event(kind, x)) for row, x in zip(self.rows, new, strict=True)]
        self.fresh = self.fresh and kind == "read"
        when = self.cache.settings.method.when
        if kind == "read" and when.prefill == "immediate" and self.cache.compressing:
            check_budget(self.world, self.cache)
        return logits

    def read(self, lengths: Sequence[int], padding: int = 0) -> None:
        """A prompt, the first or a later one, or a chunk of it."""
        if not self.rows:
            self.rows = [self.settings] * len(lengths)
        self.feed("verify" if self.records else "read", lengths, padding)

    def decode(self, steps: int) -> None:
        for _ in range(steps):
            self.feed("decode", [1] * len(self.rows))

    def verify(self, drafted: int, accepted: int) -> None:
        """Drafted tokens are read at once, and those that are not accepted taken back: speculative decoding."""
        if not self.records:
            self.cache.activate_past_recording()
            self.note("record")
        self.feed("verify", [drafted] * len(self.rows))
        if accepted < drafted:
            self.crop(drafted - accepted)

    @property
    def records(self) -> bool:
        return any(event.kind == "record" for event in (self.rows or [()])[0])

    # --- operations --------------------------------------------------------------------------------------------

    def note(self, kind: str) -> None:
        self.rows = [(*row, Event(kind)) for row in self.rows]

    def compress(self) -> None:
        if self.attempt(self.cache.compress, must_work=not self.asks):
            self.note("compress")
            check_budget(self.world, self.cache)

    def freeze(self, frozen: bool) -> None:
        self.cache.compressing = not frozen
        self.note("freeze" if frozen else "thaw")

    def crop(self, count: int) -> None:
        left = [event for row in self.rows for event in without_newest(row, count) if event.kind == "read"]
        if self.world.slides and any(len(event.tokens) == 1 for event in left):
            return  # alone, it would be read with a column beside it, which a sliding window counts
        possible = count <= min(self.appended, self.unheard) and not self.slides_beyond(count)
        if self.attempt(lambda: self.cache.crop(-count), must_work=possible):
            self.rows = [without_newest(row, count) for row in self.rows]

    def take(self, which: Sequence[int], how: Callable[[Tensor], None]) -> None:
        """Rows in another order, several times or not at all."""
        how(torch.tensor(which))
        self.rows = [self.rows[i] for i in which]

    def copy(self) -> Conversation:
        return self._with(self.cache.copy(), self.rows)

    def save_and_load(self, path: Path) -> None:
        if self.attempt(lambda: self.cache.save(path), must_work=self.world.kind[0] != "static"):
            self.cache = keepkv.Cache.load(path, self.world.model, calibration=self.world.calibration)
            self.note("load")

    def reset(self) -> None:
        self.settings = tuple(event for event in self.rows[0] if event.kind in ("freeze", "thaw", "record"))
        self.cache.reset()
        self.rows, self.fresh, self.moved = [], False, False

    def join(self, other: Conversation) -> bool:
        """Add the rows of ``other``; false where that is refused.

        It may be for rows with gaps beside sliding layers, and where a prompt waits that no score has seen.
        """
        before = heard(other.cache)
        blind = self.asks and any(event.kind == "freeze" for row in self.rows + other.rows for event in row)
        plain = not any(map(has_gaps, self.rows + other.rows)) and not blind
        if not self.attempt(lambda: self.cache.join(other.cache), must_work=plain and self.world.kind[0] != "static"):
            assert not changed(heard(other.cache), before), "a refusal changed the cache that was to join"
            return False
        self.note("settle prompt")
        other.note("settle prompt")
        self.moved = True
        self.rows, self.fresh, other.rows = [*map(without_gaps, self.rows + other.rows)], True, []
        return True

    def split(self, which: Sequence[int]) -> Conversation:
        self.moved = True
        twin = self._with(self.cache.split(which), [self.rows[i] for i in which])
        self.rows = [row for i, row in enumerate(self.rows) if i not in which]
        return twin

    def _with(self, cache: keepkv.Cache, rows: list[History]) -> Conversation:
        twin = Conversation(self.world, self.words)
        twin.cache, twin.rows = cache, rows
        twin.fresh, twin.moved, twin.settings = self.fresh, self.moved, self.settings
        return twin

    # --- what must be true -------------------------------------------------------------------------------------

    @property
    def appended(self) -> int:
        return min((layer.store.appended for layer in self.cache.compressible), default=0)

    @property
    def asks(self) -> bool:
        """Whether a compression needs queries, and is refused where none is remembered."""
        return self.cache.settings.method.score.observes

    @property
    def unheard(self) -> int:
        """Newest columns that no score has taken into account: where it observes, those of the latest forward, unless
        the forward was followed by a compression, of which nothing was over its budget."""
        latest, when = self.rows[0][-1], self.cache.settings.method.when
        if not self.cache.settings.method.score.observes:
            return self.appended
        return 0 if latest.kind == "read" and when.prefill == "immediate" else len(latest.columns)

    def slides_beyond(self, count: int) -> bool:
        """Whether a sliding window has passed, so that tokens before the newest ``count`` could not be brought back."""
        sliding = [x for x in self.cache.layers if not isinstance(x, Layer) and x.is_initialized]
        spare = [
            x.keys.shape[2] - x.sliding_window + 1 if x.record_past else 0
            for x in sliding
            if x.cumulative_length >= x.sliding_window
        ]
        return count > min(spare, default=count)

    def attempt(self, operation: Callable[[], object], must_work: bool) -> bool:
        """Whether ``operation`` worked. Where it is refused nothing has changed, and it may only be where it must."""
        before = self.cache.copy()
        try:
            operation()
        except KeepKVError as error:
            traces = changed(heard(self.cache), heard(before))
            assert not traces, f"refused, and yet changed: {traces}"
            assert not must_work, f"refused without a reason: {error}"
            return False
        return True

    def check(self) -> None:
        check(self.cache, self.rows)

    def compare(self) -> None:
        """Each row is what it would be alone, and goes on so."""
        if not self.world.exact or not self.rows:
            return
        alone = [Alone(self.world, history) for history in self.rows]
        self.compare_slots(alone)
        twin = self.copy()
        for kind, n in [("decode", 1)] * 4 + ([] if self.records else [("read", 4)]):
            logits = twin.feed(kind, [n] * len(alone))
            if logits is None:
                return
            for i, (one, row) in enumerate(zip(alone, twin.rows, strict=True)):
                off = float((one.feed(row[-1])[0, -1] - logits[i, -1]).abs().max())
                assert off <= CLOSE, f"row {i}: logits are {off} off those of the row alone"
        twin.compare_slots(alone)

    def compare_slots(self, alone: Sequence[Alone]) -> None:
        """The slots of each row are those of the row alone."""
        for layer in self.cache.compressible:
            if not layer.is_initialized:
                continue
            ours = layer.store.view()
            for i in range(len(self.rows)):
                theirs = alone[i].cache.layers[layer.info.index].store.view()
                for head in range(ours.positions.shape[1]):
                    a, b = ours.valid[i, head], theirs.valid[0, head]
                    where = f"layer {layer.info.index}, row {i}, head {head}"
                    kept = ours.positions[i, head, a].tolist(), theirs.positions[0, head, b].tolist()
                    assert kept[0] == kept[1], f"{where}: kept {kept[0]}, alone {kept[1]}"
                    for name in ("keys", "values", "log_votes"):
                        x, y = getattr(ours, name)[i, head, a], getattr(theirs, name)[0, head, b]
                        assert torch.allclose(x, y, atol=CLOSE), f"{where}: {name} are {float((x - y).abs().max())} off"
