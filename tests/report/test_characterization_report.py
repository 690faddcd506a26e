"""The report of a characterisation: the same text for the same rows, and nothing fetched."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from characterized import grid, made_up_run, point_row

from keepkv.characterize.analyse.capacity import Load, capacity
from keepkv.characterize.analyse.pareto import axes_of
from keepkv.characterize.analyse.recommend import AXES, Limit, by_place, recommend
from keepkv.characterize.analyse.schedule import against_fixed, settings
from keepkv.characterize.grid.levels import Technique
from keepkv.characterize.grid.plan import plan
from keepkv.characterize.record import folder as folders
from keepkv.characterize.record.folder import read
from keepkv.characterize.record.summary import choices
from keepkv.characterize.workload.trace import Arrival
from keepkv.errors import KeepKVError
from keepkv.report.characterization import capacity_pages, recommended, run_pages, schedule_pages, write_pages
from keepkv.report.characterization.output import html, markdown
from keepkv.report.characterization.run import notes

GOLDEN = Path(__file__).parents[1] / "data" / "characterization.md"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_up_run(tmp_path_factory.mktemp("run") / "made-up", joules=50.0)


class Names(HTMLParser):
    """Tags that are open at the end, and where a page refers to."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.refers: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.refers += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "action")]
        if tag not in ("meta", "link", "br", "img", "wbr"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.refers += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_markdown_of_a_run_is_as_it_was(run: Path) -> None:
    """Golden: ``tests/data/characterization.md``, which is written anew where it is missing."""
    text = markdown(run_pages(run))
    if not GOLDEN.exists():
        GOLDEN.write_text(text, encoding="utf-8")
    assert text == GOLDEN.read_text(encoding="utf-8")


def test_the_page_is_whole_and_fetches_nothing(run: Path, tmp_path: Path) -> None:
    page, text = write_pages(run_pages(run), tmp_path)
    held = page.read_text(encoding="utf-8")
    names = Names()
    names.feed(held)
    assert not names.open
    assert all(one.startswith(("#", "data:")) for one in names.refers)
    assert not re.search(r"url\((?!#)|@import|<script", held)
    assert held.count("<svg") == 5 and text.read_text(encoding="utf-8").startswith("# What it costs")
    assert html(run_pages(run)) == held


def test_notes_say_what_must_not_be_misread(run: Path, tmp_path: Path) -> None:
    assert any("Drift is not known" in note for note in run_pages(run).notes)
    dark = made_up_run(tmp_path / "dark", requests=6)
    pages = run_pages(dark)
    assert any(note.startswith("Energy was not measured: no RAPL") for note in pages.notes)
    assert any("As few as 6 requests" in note for note in pages.notes)
    assert "n/a" in markdown(pages)
    [start, *_] = plan(grid()).points
    for role, speed in (("start", 1.0), ("end", 1.1)):
        row = point_row(start, f"digest-{role}", metrics={"tpot_mean": speed})
        folders.add(dark, replace(row, role=role), [])
        if role == "end":
            busy = replace(row, point="busy", role="point", state={"load": 9.0, "cores": 2})
            folders.add(dark, busy, [])
    found = run_pages(dark).notes
    assert any("tpot_mean by +10.0 %" in note for note in found)
    assert any("at 1 of 15 points more than 1.5 processes a core" in note for note in found)


@pytest.mark.parametrize(("score", "said"), [(0.0, True), (0.4, False), (None, False)])
def test_a_full_cache_that_answers_nothing_is_noted(run: Path, score: float | None, said: bool) -> None:
    first = next(point for point in plan(grid()).points if point.technique == Technique())
    held = replace(read(run), points=[point_row(first, metrics={"score": score})])
    assert any(note.startswith("The full cache answers nothing") for note in notes(held)) == said


def test_what_failed_and_what_was_dropped_is_told(tmp_path: Path) -> None:
    folder = made_up_run(tmp_path / "run")
    [start, *_] = plan(grid()).points
    failed = point_row(start.as_baseline("baseline", 0), "bad", status="memory", error="killed <b>")
    folders.add(folder, failed, [])
    held = html(run_pages(folder))
    assert "What failed" in held and "killed &lt;b&gt;" in held and "killed <b>" not in held


def test_studies_have_pages(run: Path) -> None:
    held = choices(read(run))
    found = [recommend(here, axes_of(AXES), [Limit.read("ratio<=0.9")]) for here in by_place(held).values()]
    text = markdown(recommended(found))
    assert "Take " in text and "Hypervolume" in text and "beaten by" in text
    none = [recommend(here, axes_of(AXES), [Limit.read("ratio<=0.01")]) for here in by_place(held).values()]
    assert "ratio ≤ 0.01 binds" in markdown(recommended(none))
    load = Load(10.0, 500.0, 10_000_000, 1_000_000)
    text = markdown(capacity_pages(capacity([one.row for one in held], load), load))
    assert "machines" in text and "keepkv" in text
    table = settings([one.row for one in held])
    trace = [Arrival(i * 0.7, None, 8) for i in range(100)]
    replays = against_fixed(table, trace, every=10.0, tokens=8.0)
    text = markdown(schedule_pages(table, replays, 10.0))
    assert "less than the best fixed setting" in text and "nvml-counter" in text


def test_a_run_without_points_has_no_report(tmp_path: Path) -> None:
    folders.begin(tmp_path, grid().to_dict(), [])
    with pytest.raises(KeepKVError, match="no finished point"):
        run_pages(tmp_path)
