"""Generated scenes: frames that show what the script says, and answers that are true of it."""

from __future__ import annotations

import random
from collections import Counter

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from keepkv.tasks.scenes import CARD, CELLS, COLOURS, KINDS, SIDE, WORDS, Scene, questions, story
from keepkv.tasks.scenes.draw import CELL, ROWS
from keepkv.tasks.scenes.questions import PLACES

scenes = st.builds(
    lambda seed, length, events, changes: story(random.Random(seed), length, events, changes),
    st.integers(0, 10_000), st.integers(24, 60), st.integers(1, 6), st.integers(0, 3),
)  # fmt: skip


def cell(frame: torch.Tensor, index: int) -> torch.Tensor:
    row, column = index // ROWS, index % ROWS
    return frame[:, row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL].float()


def lamp_at(scene: Scene, t: int) -> str:
    return [colour for first, colour in scene.lamp if first <= t][-1]


@settings(max_examples=15, deadline=None)
@given(scenes)
def test_frames_show_the_events_and_nothing_else(scene: Scene) -> None:
    """A cell differs from what it is when nothing is there exactly while an event is in it, and has its colour then."""
    frames = scene.frames()
    assert frames.shape == (scene.length, 3, SIDE, SIDE) and frames.dtype == torch.uint8
    there = {(t, place): event for event in scene.events for t, place in enumerate(event.path, event.start)}
    still = frames[[t for t in range(scene.length) if not any(t == when for when, _ in there)]].float().mean(0)
    for t in range(scene.length):
        for place in range(CELLS):
            if place == scene.corner:
                continue
            away = (cell(frames[t], place) - cell(still, place)).abs().mean()
            assert (away > 15) == ((t, place) in there)
            if event := there.get((t, place)):
                near = (cell(frames[t], place) - torch.tensor(COLOURS[event.colour])[:, None, None]).abs().amax(0) < 30
                assert near.float().mean() > 0.1


def test_frames_are_the_same_however_they_are_read() -> None:
    scene = story(random.Random(1), 40, 5, 2)
    whole = scene.frames()
    assert torch.equal(torch.cat([scene.frames(0, 7), scene.frames(7, 31), scene.frames(31)]), whole)
    assert torch.equal(scene.until(20).frames(), whole[:20])


@settings(max_examples=30, deadline=None)
@given(scenes)
def test_answers_are_true(scene: Scene) -> None:
    """Against a second reading of the script, question by question."""
    by_name = {f"{x.colour} {x.shape}": i for i, x in enumerate(scene.events)}
    assert len(by_name) == len(scene.events)
    hues = Counter(x.colour for x in scene.events)
    for asked in questions(scene):
        words = asked.text.split()
        assert {*words, asked.answer} <= set(WORDS) and asked.kind in KINDS
        assert all(0 <= t < scene.length for t in asked.about)
        name = " ".join(words[-3:-1])
        event = scene.events[by_name[name]] if name in by_name else None
        if asked.kind == "colour":
            assert [x.colour for x in scene.events if x.shape == words[-2]] == [asked.answer]
        elif asked.kind == "place":
            assert event is not None and {PLACES[x] for x in event.path} == {asked.answer}
        elif asked.kind == "went":
            assert event is not None and len(set(event.path)) == 3 and asked.answer == PLACES[event.path[-1]]
        elif asked.kind == "number":
            assert event is not None and event.shape == CARD and asked.answer == str(event.digit)
        elif asked.kind == "last":
            assert asked.answer == max(scene.events, key=lambda x: x.end).shape
        elif asked.kind == "count":
            assert asked.answer == str(hues[words[-2]])
        elif asked.kind == "seen":
            assert (asked.answer == "yes") == any(x.shape == words[-2] for x in scene.events)
        elif asked.kind == "now":
            assert asked.answer == lamp_at(scene, scene.length - 1)
        else:
            assert asked.kind == "changed"
            last = scene.lamp[-1][0]
            assert asked.answer == lamp_at(scene, last - 1) != lamp_at(scene, last)


def test_until_knows_only_what_is_over() -> None:
    scene = story(random.Random(2), 60, 6, 2)
    first = scene.events[2]
    assert scene.until(first.end).events == scene.events[:3]
    assert scene.until(first.end - 1).events == scene.events[:2]
