"""Anyone can write a checksum: a file that was edited is refused, or is a cache like any other."""

from __future__ import annotations

import random
import time
import tracemalloc
import warnings
from collections import Counter
from pathlib import Path

import crafted
import pytest
from crafted import Edit, File, Victim


@pytest.fixture(scope="module")
def victims(tmp_path_factory: pytest.TempPathFactory) -> list[Victim]:
    return crafted.victims(tmp_path_factory.mktemp("victims"))


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("keepkv.core.wholefile.os.fsync", lambda descriptor: None)


TURNS = (1, 4, 1)


class Judge:
    """Judges files, and notes the slowest and the largest."""

    def __init__(self, path: Path) -> None:
        self.path, self.seconds, self.bytes = path, 0.0, 0
        self.became: Counter[str] = Counter()

    def __call__(
        self, victim: Victim, file: File, what: str, watched: bool = False, turns: tuple[int, ...] = TURNS
    ) -> str:  # fmt: skip
        file.write(self.path)
        if watched:
            tracemalloc.start()
        began = time.perf_counter()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                became = victim.judge(self.path, turns)
        except Exception as error:
            raise AssertionError(f"{victim.name}, {what}: {type(error).__name__}: {error}") from error
        self.seconds = max(self.seconds, time.perf_counter() - began)
        if watched:
            self.bytes = max(self.bytes, tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
        self.became[became] += 1
        return became


def table(victims: list[Victim]) -> list[tuple[Victim, str, Edit]]:
    return [(victim, what, edit) for victim in victims for what, edit in crafted.edits(victim.file)]


def test_the_originals_are_equal(victims: list[Victim], tmp_path: Path) -> None:
    judge = Judge(tmp_path / "a")
    assert {judge(victim, victim.file, "nothing") for victim in victims} == {"equal"}


def test_edits_by_hand(victims: list[Victim], tmp_path: Path) -> None:
    """Every field and tensor × wrong type, negative, huge, missing, extra, NaN, deep nesting, another name: some of the
    table each run of the quick suite, all of it in the slow one."""
    judge, edits = Judge(tmp_path / "a"), table(victims)
    assert len(edits) > 500
    for i, (victim, what, edit) in enumerate(edits[:: len(edits) // 250]):
        judge(victim, crafted.edited(victim.file, edit), what, watched=i % 10 == 0, turns=TURNS if i % 8 == 0 else ())
    assert judge.became["refused"] > 125
    assert judge.bytes < 16 << 20 and judge.seconds < 5


@pytest.mark.slow
def test_all_edits_by_hand(victims: list[Victim], tmp_path: Path) -> None:
    judge = Judge(tmp_path / "a")
    for victim, what, edit in table(victims):
        judge(victim, crafted.edited(victim.file, edit), what)
    print(dict(judge.became), f"slowest {judge.seconds:.3f} s")


def test_edits_by_chance(victims: list[Victim], tmp_path: Path) -> None:
    chance(victims, tmp_path, 200)


@pytest.mark.slow
def test_many_edits_by_chance(victims: list[Victim], tmp_path: Path) -> None:
    chance(victims, tmp_path, 100_000)


def chance(victims: list[Victim], folder: Path, count: int) -> None:
    judge, rng = Judge(folder / "a"), random.Random(count)
    for i in range(count):
        victim = rng.choice(victims)
        turns = TURNS if i % 8 == 0 else ()  # going on takes ten times as long as loading
        judge(victim, crafted.by_chance(victim.file, rng), f"edit {i} of {count}", turns=turns)
    print(dict(judge.became), f"slowest {judge.seconds:.3f} s")
