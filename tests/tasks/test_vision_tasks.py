"""Tasks with pictures: what is asked is in the picture."""

from __future__ import annotations

import pytest
import torch
from seeing_tokens import Marks

from keepkv import tasks
from keepkv.tasks.base import TaskError
from keepkv.tasks.vision import drawn, glyphs
from keepkv.vision.mark import MARK


@pytest.mark.parametrize("name", tasks.names(sees=True))
def test_seeds_and_lengths(name: str) -> None:
    task = tasks.get(name)
    one, same, other = (task.generate(Marks(), 320, seed) for seed in (5, 5, 6))
    assert one == same and all(map(torch.equal, one.pictures, same.pictures))
    assert one != other or not all(map(torch.equal, one.pictures, other.pictures))
    assert one.context.count(MARK) == sum(map(len, one.pictures))
    assert len(Marks().encode(one.context)) <= 321 and one.questions
    assert all(x.dtype == torch.uint8 and x.shape[1] == 3 for x in one.pictures)
    with pytest.raises(TaskError, match="give longer contexts"):
        task.generate(Marks(), 12, 5)


def test_every_letter_can_be_read_back() -> None:
    assert len({str(x) for x in glyphs.GLYPHS.values()}) == len(glyphs.ALPHABET)
    for start in range(0, len(glyphs.ALPHABET), drawn.WIDEST):
        said = glyphs.ALPHABET[start : start + drawn.WIDEST]
        assert glyphs.read(drawn.page([said])[:, :, :], 2, 4, len(said), drawn.SCALE) == said
    with pytest.raises(ValueError, match="does not fit"):
        drawn.page(["A" * (drawn.WIDEST + 1)])


def test_what_is_asked_is_in_the_picture() -> None:
    """Answers are found again in the pixels, by another way than they were drawn."""
    item = tasks.get("vision-document").generate(Marks(), 200, 3)
    lines = [glyphs.read(item.pictures[0][0], 2 + i * drawn.TALL, 4, 6, drawn.SCALE) for i in range(drawn.LINES)]
    assert {f"{x.prompt[-2]} {x.answer.strip()}" for x in item.questions} == set(lines)
    item = tasks.get("vision-copy").generate(Marks(), 200, 3)
    lines = [glyphs.read(item.pictures[0][0], 2 + i * drawn.TALL, 4, 6, drawn.SCALE) for i in range(drawn.LINES)]
    assert item.questions[0].answer == " " + " ".join(lines)
    item = tasks.get("vision-images").generate(Marks(), 200, 3)
    for asked in item.questions:
        page = int(asked.prompt.rstrip("?").split()[-1]) - 1
        assert glyphs.read(item.pictures[page][0], 2, 4, 4, drawn.SCALE) == asked.answer.strip()
    names = {colour: name for name, colour in drawn.COLOURS.items()}

    def found(frame: torch.Tensor) -> dict[str, str]:
        size = drawn.SIDE // drawn.CELLS
        middle = range(size // 2, drawn.SIDE, size)
        colours = [tuple(frame[:, y, x].tolist()) for y in middle for x in middle]
        return {drawn.PLACES[i]: names[x] for i, x in enumerate(colours) if x in names}  # type: ignore[index]

    item = tasks.get("vision-scene").generate(Marks(), 200, 4)
    there = found(item.pictures[0][0])
    assert len(there) == 3 and {x.values[0] for x in item.questions} == {*there, *there.values()}
    item = tasks.get("vision-count").generate(Marks(), 200, 4)
    held = [*found(item.pictures[0][0]).values()]
    assert all(int(x.answer) == held.count(x.prompt.split()[2]) for x in item.questions)
    item = tasks.get("vision-video").generate(Marks(), 200, 4)
    shown = [colour for frame in item.pictures[0] for colour in found(frame).values()]
    assert [x.values[0] for x in item.questions] == shown


def test_scenes_are_asked_in_their_own_words() -> None:
    for name in tasks.chosen(["scenes"], sees=True):
        item = tasks.get(name).generate(Marks(), 200, 7)
        assert 1 <= len(item.questions) <= 3 and all(len(x.answer.split()) == 1 for x in item.questions)
        assert item.context == MARK * len(item.pictures[0]) and item.pictures[0].shape[2:] == (48, 48)
