"""Tasks with pictures: what is asked is in the picture, and files of named benchmarks become items."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from seeing_tokens import Letters

from keepkv import tasks
from keepkv.metrics import vqa
from keepkv.tasks.base import TaskError
from keepkv.tasks.vision import drawn, glyphs
from keepkv.vision.mark import MARK

CELLS = 9


class Marks(Letters):
    """A mark is nine tokens."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return super().encode(text.replace(MARK, "x" * CELLS), add_special_tokens)


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


# --- files -------------------------------------------------------------------------------------------------------


def written(folder: Path, *records: dict[str, object]) -> Path:
    path = folder / "questions.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in records), encoding="utf-8")
    return path


def test_records_of_named_benchmarks(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    colour = (10, 200, 30)
    image.new("RGB", (5, 4), colour).save(tmp_path / "a.png")
    record = {"image": "a.png", "question": "What does it say?", "answers": ["Total 12", "12"]}
    task = tasks.open("vlm:docvqa", written(tmp_path, record))
    assert task.sees and task.size == 1
    item = task.generate(Marks(), 200, 0)
    assert item.pictures[0].shape == (1, 3, 4, 5) and tuple(item.pictures[0][0, :, 0, 0].tolist()) == colour
    asked = item.questions[0]
    assert item.context == f"{MARK}\n" and asked.prompt.startswith("\nWhat does it say?") and asked.metric is not None
    assert asked.metric("total 12") == 1.0 and asked.metric("something else") == 0.0
    two = {"images": ["a.png"] * 2, "question": f"{MARK} before {MARK} after?", "answer": "B", "options": ["x", "y"]}
    item = tasks.open("vlm:mmmu", written(tmp_path, two)).generate(Marks(), 200, 0)
    assert item.context == f"{MARK} before {MARK}\n" and "A. x\nB. y" in item.questions[0].prompt
    with pytest.raises(TaskError, match="give longer contexts"):
        tasks.open("vlm:mmmu", tmp_path / "questions.jsonl").generate(Marks(), 10, 0)


def test_what_cannot_be_read_says_so(tmp_path: Path) -> None:
    pytest.importorskip("PIL.Image")
    lost = {"image": "none.png", "question": "?", "answer": "a"}
    for record, said in ((lost, "cannot read the image"), ({"question": "?", "answer": "a"}, "no field 'image'")):
        path = tmp_path / said.split()[0]
        path.mkdir()
        with pytest.raises(TaskError, match=said):
            tasks.open("vlm:gqa", written(path, record)).generate(Marks(), 200, 0)
    with pytest.raises(TaskError, match="vlm:gqa=PATH"):
        tasks.open("vlm:gqa")
    with pytest.raises(TaskError, match="judged by a large model"):
        tasks.open("vlm:mmvet", written(tmp_path, lost)).generate(Marks(), 200, 0)
    with pytest.raises(TaskError, match="cannot read"):
        tasks.open("vlm:gqa", tmp_path / "nothing.jsonl")


def test_how_replies_are_compared() -> None:
    assert vqa.anls("Tota1 12", ["total 12"]) == 1 - 1 / 8 and vqa.anls("abcd", ["wxyz"]) == 0.0
    assert vqa.relaxed("104", ["100"]) == 1.0 and vqa.relaxed("106", ["100"]) == 0.0
    assert vqa.relaxed("12%", ["0.12"]) == 1.0 and vqa.relaxed("Yes.", ["yes"]) == 1.0
    assert vqa.consensus("a", ["a", "b", "b"]) == 1 / 3 and vqa.consensus("a", ["A."] * 4 + ["b"]) == 1.0
    assert vqa.contains("the word is STOP here", ["s t o p"]) == 1.0 and vqa.exact("Left.", ["left"]) == 1.0
    assert vqa.letter("B", ["B"]) == vqa.letter("b", ["B"]) == vqa.letter("It is (C).", ["C. cat"]) == 1.0
    assert vqa.letter("a cat", ["A"]) == 0.0 and vqa.yes_or_no("Yes, it is", ["yes"]) == 1.0
