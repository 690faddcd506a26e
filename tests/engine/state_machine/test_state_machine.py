"""Caches are used in every order that hypothesis thinks of; every row must stay what it would be alone.

After each step the invariants of ``invariants`` hold, every attention is that of ``references``, and no other cache has
changed. At the end, and now and then, each row is compared with its replay, see ``replaying``.
"""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
from conversations import Conversation
from histories import tokens
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from invariants import changed, snapshot
from references import watched
from worlds import VOCABULARY, Lossless, Masked, World, worlds

from keepkv.store import CODECS

CACHES, ROWS = 3, 4  # at most
which = st.integers(0, CACHES - 1)  # of the caches; counted round
lengths = st.lists(st.integers(1, 6), min_size=ROWS, max_size=ROWS)


class Machine(RuleBasedStateMachine):
    """Caches of one world."""

    def __init__(self) -> None:
        super().__init__()
        self.open = ExitStack()
        self.open.enter_context(watched())
        self.folder = Path(self.open.enter_context(tempfile.TemporaryDirectory()))
        self.words = cycle(range(3, VOCABULARY))
        self.talks: list[Conversation] = []
        self.world: World | None = None
        self.others: list[tuple[Conversation, dict[str, Any]]] = []
        self.sound = True  # false while a step runs, and for good where it failed

    @initialize(world=worlds(), first=st.lists(st.integers(0, 12), min_size=1, max_size=3))
    def begin(self, world: World, first: list[int]) -> None:
        self.world = world
        self._start([world.least + n for n in first])

    def _start(self, first: list[int]) -> Conversation:
        assert self.world is not None
        talk = Conversation(self.world, self.words)
        talk.read(first)
        self.talks.append(talk)
        return talk

    def talk(self, i: int) -> Conversation:
        """The i-th cache, counted round. The others must not change."""
        talk = self.talks[i % len(self.talks)]
        self.sound = False
        self.others = [(x, snapshot(x.cache)) for x in self.talks if x is not talk]
        return talk

    @invariant()
    def everything_holds(self) -> None:
        for talk in self.talks:
            talk.check()
        for other, before in self.others:
            names = changed(snapshot(other.cache), before) if other in self.talks else []
            assert not names, f"another cache changed: {names}"
        self.others, self.sound = [], True

    # --- forwards ----------------------------------------------------------------------------------------------

    @rule(i=which, lengths=lengths, padding=st.integers(0, 2))
    def read(self, i: int, lengths: list[int], padding: int) -> None:
        talk = self.talk(i)
        if talk.fresh or not talk.rows:
            return
        lengths = lengths[: len(talk.rows)]
        if talk.world.slides:  # a sliding window counts columns: padding behind a token is not as if it were not there
            lengths, padding = [max(2, lengths[0])] * len(lengths), 0
        talk.read(lengths, max(padding, 2 - max(lengths)))

    @rule(i=which, steps=st.integers(1, 4))
    def decode(self, i: int, steps: int) -> None:
        self.talk(i).decode(steps)

    @rule(i=which, accepted=st.integers(1, 3), rejected=st.integers(0, 3))
    def verify(self, i: int, accepted: int, rejected: int) -> None:
        self.talk(i).verify(accepted + rejected, accepted)

    # --- one cache ---------------------------------------------------------------------------------------------

    @rule(i=which, count=st.integers(1, 5))
    def crop(self, i: int, count: int) -> None:
        talk = self.talk(i)
        if all(len(tokens(row)) - count >= talk.world.least for row in talk.rows):
            talk.crop(count)

    @rule(i=which)
    def compress(self, i: int) -> None:
        self.talk(i).compress()

    @rule(i=which, frozen=st.booleans())
    def freeze(self, i: int, frozen: bool) -> None:
        self.talk(i).freeze(frozen)

    @rule(i=which)
    def save_and_load(self, i: int) -> None:
        self.talk(i).save_and_load(self.folder / "cache")

    @rule(i=which, first=st.lists(st.integers(0, 12), min_size=1, max_size=2))
    def reset(self, i: int, first: list[int]) -> None:
        talk = self.talk(i)
        assert self.world is not None
        talk.reset()
        talk.read([self.world.least + n for n in first])

    # --- rows --------------------------------------------------------------------------------------------------

    @rule(i=which, order=st.lists(st.integers(0, ROWS - 1), min_size=ROWS, max_size=ROWS))
    def reorder(self, i: int, order: list[int]) -> None:
        talk = self.talk(i)
        rows = len(talk.rows)
        talk.take([x % rows for x in order[:rows]], talk.cache.reorder_cache)

    @rule(i=which, order=st.lists(st.integers(0, ROWS - 1), min_size=1, max_size=ROWS, unique=True))
    def select(self, i: int, order: list[int]) -> None:
        talk = self.talk(i)
        order = [x for x in order if x < len(talk.rows)]
        if order:
            talk.take(order, talk.cache.batch_select_indices)

    @rule(i=which)
    def repeat(self, i: int) -> None:
        talk = self.talk(i)
        if len(talk.rows) * 2 <= ROWS:
            twice = [x for x in range(len(talk.rows)) for _ in range(2)]
            talk.take(twice, lambda _: talk.cache.batch_repeat_interleave(2))

    # --- several caches ----------------------------------------------------------------------------------------

    @precondition(lambda self: len(self.talks) < CACHES)
    @rule(first=st.lists(st.integers(0, 12), min_size=1, max_size=2))
    def another(self, first: list[int]) -> None:
        assert self.world is not None
        self.talk(0)
        self._start([self.world.least + n for n in first])

    @precondition(lambda self: len(self.talks) < CACHES)
    @rule(i=which)
    def copy(self, i: int) -> None:
        self.talks.append(self.talk(i).copy())

    @precondition(lambda self: len(self.talks) > 1)
    @rule(i=which, j=which)
    def join(self, i: int, j: int) -> None:
        one, two = self.talk(i), self.talks[j % len(self.talks)]
        if one is two or len(one.rows) + len(two.rows) > ROWS or one.records != two.records:
            return
        if one.cache.compressing == two.cache.compressing and one.join(two):
            self.talks.remove(two)

    @precondition(lambda self: len(self.talks) < CACHES)
    @rule(i=which, rows=st.lists(st.integers(0, ROWS - 1), min_size=1, max_size=ROWS - 1, unique=True))
    def split(self, i: int, rows: list[int]) -> None:
        talk = self.talk(i)
        rows = [x for x in rows if x < len(talk.rows)]
        if 0 < len(rows) < len(talk.rows):
            self.talks.append(talk.split(rows))

    # --- the replay --------------------------------------------------------------------------------------------

    def teardown(self) -> None:
        with self.open:
            for talk in self.talks if self.sound else ():
                talk.compare()


@pytest.fixture(autouse=True)
def _lossless(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CODECS._factories, "lossless", Lossless)
    monkeypatch.setitem(CODECS._factories, "masked", Masked)


def run(runs: int, steps: int, **options: Any) -> None:
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=runs, stateful_step_count=steps, deadline=None, suppress_health_check=checks, database=None,
            **options,
        ),
    )  # fmt: skip


def test_five_hundred_steps() -> None:
    run(20, 25, derandomize=True, phases=[Phase.generate])  # shrinking takes minutes: the slow test does it


def test_with_a_canary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEEPKV_CANARY", "1")
    run(5, 25, derandomize=True, phases=[Phase.generate])


@pytest.mark.slow
def test_twenty_thousand_steps() -> None:
    run(800, 25)
