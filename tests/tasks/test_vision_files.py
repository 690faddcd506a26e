"""Files of named benchmarks about pictures become items: those in our own form, and those that are published."""

from __future__ import annotations

import base64
import builtins
import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from seeing_tokens import Marks

from keepkv import tasks
from keepkv.tasks.base import Item, TaskError
from keepkv.vision.mark import MARK

Image = pytest.importorskip("PIL.Image")
RED, BLUE = (250, 10, 20), (5, 15, 240)
SHORT = "\nAnswer the question using a single word or phrase.\n"
LETTER = "\nAnswer with the option's letter from the given choices directly.\n"


def png(colour: tuple[int, int, int] = RED) -> bytes:
    held = io.BytesIO()
    Image.new("RGB", (5, 4), colour).save(held, "PNG")
    return held.getvalue()


def text(colour: tuple[int, int, int] = RED) -> str:
    return base64.b64encode(png(colour)).decode()


def put(path: Path, content: bytes | str | object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return path


def lines(path: Path, *records: dict[str, object]) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in records), encoding="utf-8")
    return path


def parquet(path: Path, *records: dict[str, object]) -> Path:
    arrow = pytest.importorskip("pyarrow")
    from pyarrow.parquet import write_table

    path.parent.mkdir(parents=True, exist_ok=True)
    write_table(arrow.Table.from_pylist(list(records)), path)
    return path


def table(path: Path, *rows: dict[str, str]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as held:
        writer = csv.DictWriter(held, list(rows[0]), dialect="excel-tab")
        writer.writeheader()
        writer.writerows(rows)
    return path


def struct(colour: tuple[int, int, int] = RED) -> dict[str, Any]:
    return {"bytes": png(colour), "path": "somewhere.png"}


def items(part: str, path: Path | str) -> list[Item]:
    task = tasks.open(f"vlm:{part}", path)
    return [task.generate(Marks(), 200, seed) for seed in range(task.size or 0)]


def colours(item: Item) -> list[tuple[int, ...]]:
    assert all(x.shape == (1, 3, 4, 5) for x in item.pictures)
    return [tuple(x[0, :, 0, 0].tolist()) for x in item.pictures]


def check(item: Item, prompt: str, answer: str, *seen: tuple[int, int, int], wrong: str = "no such answer") -> None:
    """One picture or several in front of a question, of which ``answer`` is right and ``wrong`` is not."""
    asked = item.questions[0]
    assert colours(item) == list(seen or (RED,)) and item.context == "\n".join([MARK] * len(item.pictures)) + "\n"
    assert asked.prompt == f"\n{prompt}" and asked.answer == f" {answer}" and asked.metric is not None
    assert asked.metric(answer) == 1.0 and asked.metric(wrong) == 0.0


def test_records_of_our_own(tmp_path: Path) -> None:
    put(tmp_path / "a.png", png())
    put(tmp_path / "images" / "b.png", png(BLUE))
    record = {"image": "a.png", "question": "What does it say?", "answers": ["Total 12", "12"]}
    task = tasks.open("vlm:docvqa", lines(tmp_path / "one.jsonl", record))
    assert task.sees and task.size == 1
    check(task.generate(Marks(), 200, 0), f"What does it say?{SHORT}", "Total 12")
    two = {"images": ["a.png", "b.png"], "question": f"{MARK} or {MARK} after?", "answer": "B", "options": ["x", "y"]}
    path = lines(tmp_path / "two.jsonl", two)
    item = items("mmmu", path)[0]
    assert item.context == f"{MARK} or {MARK}\n" and colours(item) == [RED, BLUE]
    assert item.questions[0].prompt == f"\nafter?\nA. x\nB. y{LETTER}"
    with pytest.raises(TaskError, match="give longer contexts"):
        tasks.open("vlm:mmmu", path).generate(Marks(), 10, 0)


def test_docvqa(tmp_path: Path) -> None:
    record = {"questionId": 1, "question": "Which date?", "image": "documents/x_1.png", "answers": ["1/8/93", "1/8"]}
    whole = {"dataset_name": "docvqa", "dataset_split": "val", "data": [record, {**record, "question": "When?"}]}
    for file, image in (
        ("val/val_v1.0.json", "val/documents/x_1.png"),
        ("new/spdocvqa_qas/val_v1.0_withQT.json", "new/spdocvqa_images/x_1.png"),
        ("ours/val.json", "ours/images/x_1.png"),
    ):
        put(tmp_path / image, png())
        one, two = items("docvqa", put(tmp_path / file, whole))
        check(one, f"Which date?{SHORT}", "1/8/93")
        check(two, f"When?{SHORT}", "1/8/93")
    hub = {"questionId": "1", "question": "Which date?", "image": struct(BLUE), "answers": ["1/8/93"]}
    check(items("docvqa", parquet(tmp_path / "hub.parquet", hub))[0], f"Which date?{SHORT}", "1/8/93", BLUE)


def test_textvqa(tmp_path: Path) -> None:
    said = ["canon"] * 4 + ["nikon"] * 6
    record = {"question_id": 1, "question": "what brand?", "image_id": "0054c91397f2fe05", "answers": said}
    put(tmp_path / "train_images" / "0054c91397f2fe05.jpg", png())
    item = items("textvqa", put(tmp_path / "TextVQA_0.5.1_val.json", {"dataset_version": "0.5.1", "data": [record]}))[0]
    check(item, f"what brand?{SHORT}", "canon")
    check(items("textvqa", parquet(tmp_path / "v.parquet", {**record, "image": struct(BLUE)}))[0],
          f"what brand?{SHORT}", "canon", BLUE)  # fmt: skip


def test_chartqa(tmp_path: Path) -> None:
    put(tmp_path / "png" / "41699051005347.png", png())
    record = {"imgname": "41699051005347.png", "query": "How many food items?", "label": "14"}
    check(items("chartqa", put(tmp_path / "test_human.json", [record]))[0], f"How many food items?{SHORT}", "14")
    hub = {"image": struct(BLUE), "query": "How many?", "label": ["14"], "human_or_machine": 0}
    check(items("chartqa", parquet(tmp_path / "m4.parquet", hub))[0], f"How many?{SHORT}", "14", BLUE)
    lab = {"type": "human_test", "question": "How many?", "answer": "14", "image": struct()}
    check(items("chartqa", parquet(tmp_path / "lab.parquet", lab))[0], f"How many?{SHORT}", "14")


def test_gqa(tmp_path: Path) -> None:
    put(tmp_path / "images" / "n161313.jpg", png())
    put(tmp_path / "images" / "n7.jpg", png(BLUE))
    asked = {"201307251": {"question": "Is it overcast?", "imageId": "n161313", "answer": "no"},
             "20": {"question": "Who is it?", "imageId": "n7", "answer": "girl"}}  # fmt: skip
    one, two = items("gqa", put(tmp_path / "questions1.2" / "testdev_balanced_questions.json", asked))
    check(one, f"Is it overcast?{SHORT}", "no")
    check(two, f"Who is it?{SHORT}", "girl", BLUE)


def test_ocrbench(tmp_path: Path) -> None:
    put(tmp_path / "OCRBench_Images" / "IIIT5K" / "test" / "1.png", png())
    word = {"dataset_name": "IIIT5K", "id": 1, "image_path": "IIIT5K/test/1.png", "question": "what is written?",
            "answers": "CENTRE", "type": "Regular Text Recognition"}  # fmt: skip
    formula = {**word, "dataset_name": "HME100k", "answers": ["x ^ 2", "x x"]}
    one, two = items("ocrbench", put(tmp_path / "OCRBench" / "OCRBench.json", [word, formula]))
    check(one, "what is written?\n", "CENTRE")
    check(two, "what is written?\n", "x ^ 2", wrong="X^2")
    assert one.questions[0].metric("It says centre.") == two.questions[0].metric("x^2") == 1.0  # type: ignore[misc]
    assert one.questions[0].metric("cen tre") == 0.0  # type: ignore[misc]
    hub = {"dataset": "HME100k", "question": "what?", "question_type": "x", "answer": ["a b"], "image": struct(BLUE)}
    item = items("ocrbench", parquet(tmp_path / "hub.parquet", hub))[0]
    check(item, "what?\n", "a b", BLUE, wrong="A b")


def test_mme(tmp_path: Path) -> None:
    asked = "Is there a dog? Please answer yes or no.\tYes\nIs there a cat? Please answer yes or no.\tNo\n\n"
    put(tmp_path / "MME" / "existence" / "0001.txt", asked.encode())
    put(tmp_path / "MME" / "existence" / "0001.jpg", png())
    put(tmp_path / "MME" / "scene" / "questions_answers_YN" / "7.txt", asked.encode())
    put(tmp_path / "MME" / "scene" / "images" / "7.png", png(BLUE))
    found = items("mme", tmp_path / "MME")
    assert [colours(item) for item in found] == [[RED], [RED], [BLUE], [BLUE]]
    check(found[0], f"Is there a dog? Please answer yes or no.{SHORT}", "Yes", wrong="No, there is none")
    check(found[3], f"Is there a cat? Please answer yes or no.{SHORT}", "No", BLUE, wrong="yes")
    assert len(items("mme", tmp_path / "MME" / "existence")) == 2
    three = put(tmp_path / "MME" / "existence" / "existence.txt", b"0001.jpg\tIs there a dog?\tYes\n")
    check(items("mme", three)[0], f"Is there a dog?{SHORT}", "Yes", wrong="no")
    put(tmp_path / "lost" / "0001.txt", asked.encode())
    with pytest.raises(TaskError, match=r"0001.txt' asks about an image that is not there: .*0001.jpg' or .png"):
        items("mme", tmp_path / "lost")
    put(tmp_path / "odd" / "0001.txt", asked.replace("\tNo", " No").encode())
    put(tmp_path / "odd" / "0001.jpg", png())
    with pytest.raises(TaskError, match=r"0001.txt', line 2, has 1 fields in place of question, answer"):
        items("mme", tmp_path / "odd")
    with pytest.raises(TaskError, match="holds no texts of MME"):
        items("mme", tmp_path / "MME" / "scene" / "images")
    lab = {"question_id": "a/1.png", "image": struct(), "question": "Is it?", "answer": "Yes", "category": "scene"}
    check(items("mme", parquet(tmp_path / "mme.parquet", lab))[0], f"Is it?{SHORT}", "Yes", wrong="No")
    row = {"index": "0", "image": text(BLUE), "category": "OCR", "question": "Is it?", "answer": "No"}
    check(items("mme", table(tmp_path / "MME.tsv", row))[0], f"Is it?{SHORT}", "No", BLUE, wrong="Yes")


def test_tables_of_lettered_options(tmp_path: Path) -> None:
    row = {"index": "3", "question": "Which?", "hint": "Look.", "A": "cat", "B": "dog", "C": "", "D": "", "answer": "B",
           "category": "x", "image": text(BLUE), "source": "s"}  # fmt: skip
    shared = {**row, "index": "1000003", "image": "3", "hint": "", "answer": "A", "C": "cow\nand calf"}
    for part in ("mmbench", "mmstar", "realworldqa", "ai2d"):
        one, two = items(part, table(tmp_path / f"{part}.tsv", row, shared))
        check(one, f"Look.\nWhich?\nA. cat\nB. dog{LETTER}", "B", BLUE, wrong="A")
        check(two, f"Which?\nA. cat\nB. dog\nC. cow\nand calf{LETTER}", "A", BLUE, wrong="B")
    assert colours(items("mmbench", tmp_path)[1]) == [BLUE]  # the file in a folder that is named after it
    assert items("mmbench", tmp_path / "mmbench.tsv")[0].questions[0].metric("the dog is") == 1.0  # type: ignore[misc]
    hub = {"index": 3, "question": "Which?", "hint": "nan", "answer": "B", "A": "cat", "B": "dog", "C": "nan",
           "D": "nan", "image": struct()}  # fmt: skip
    check(items("mmbench", parquet(tmp_path / "lab.parquet", hub))[0], f"Which?\nA. cat\nB. dog{LETTER}", "B",
          wrong="A")  # fmt: skip


@pytest.mark.parametrize(("part", "end"), [("docvqa", SHORT), ("textvqa", SHORT), ("ocrbench", "\n"), ("gqa", SHORT)])
def test_tables_of_answers(part: str, end: str, tmp_path: Path) -> None:
    rows = [{"index": str(i), "image": text(BLUE), "question": "What?", "answer": answer}
            for i, answer in enumerate((str(["12 %", "it's 12"]), "12"))]  # fmt: skip
    one, two = items(part, table(tmp_path / "all.tsv", *rows))
    assert one.questions[0].metric is not None and colours(one) == [BLUE]
    assert one.questions[0].prompt == f"\nWhat?{end}" and one.questions[0].metric("it's 12") > 0
    check(two, f"What?{end}", "12", BLUE)


def test_options_within_the_question_and_open_answers(tmp_path: Path) -> None:
    star = {"index": 0, "question": "Which?\nOptions: A: cat, B: dog", "image": struct(), "answer": "B"}
    check(items("mmstar", parquet(tmp_path / "star.parquet", star))[0], f"{star['question']}{LETTER}", "B", wrong="A")
    world = [{"image": struct(), "question": "Which?\n\nA. Left\nB. Right\nAnswer with the letter.", "answer": "A"},
             {"image": struct(), "question": "How many? Answer with a number.", "answer": "3"}]  # fmt: skip
    one, two = items("realworldqa", parquet(tmp_path / "world.parquet", *world))
    check(one, f"{world[0]['question']}\n", "A", wrong="B. Left")
    check(two, f"{world[1]['question']}\n", "3", wrong="4")
    diagram = {"question": "Which?", "options": ["0", "1", "cat", "dog"], "answer": "2", "image": struct(BLUE)}
    item = items("ai2d", parquet(tmp_path / "ai2d.parquet", diagram))[0]
    check(item, f"Which?\nA. 0\nB. 1\nC. cat\nD. dog{LETTER}", "C", BLUE, wrong="B")


def test_mmmu(tmp_path: Path) -> None:
    empty = {f"image_{i}": None for i in range(3, 8)}
    chosen = {"id": "validation_Art_1", "question": "Is <image 2> like this? <image 1>", "options": "['$6', '7%']",
              "answer": "B", "question_type": "multiple-choice", "image_1": struct(), "image_2": struct(BLUE),
              **empty}  # fmt: skip
    among = {**chosen, "question": "Which is it?", "options": "['<image 1>', '<image 2>']"}
    plain = {**chosen, "question": "Which is it?", "answer": "['3.5', 'three']", "options": "[]", "image_2": None,
             "question_type": "open"}  # fmt: skip
    one, two, three = items("mmmu", parquet(tmp_path / "validation.parquet", chosen, among, plain))
    assert one.context == f"Is {MARK} like this? {MARK}\n" and colours(one) == [BLUE, RED]
    assert one.questions[0].prompt == f"\nA. $6\nB. 7%{LETTER}"
    assert two.context == f"Which is it?\nA. {MARK}\nB. {MARK}\n" and colours(two) == [RED, BLUE]
    assert two.questions[0].prompt == LETTER.replace("\n", "\n\n", 1)
    check(three, f"Which is it?{SHORT}", "3.5", wrong="4")
    row = {"index": "1", "question": "Is it <image 1> or <image 2>?", "A": "yes", "B": "no", "answer": "A",
           "image": str([text(), text(BLUE)])}  # fmt: skip
    item = items("mmmu", table(tmp_path / "MMMU_DEV_VAL.tsv", row))[0]
    assert item.context == f"Is it {MARK} or {MARK}\n" and colours(item) == [RED, BLUE]
    for i, (change, said) in enumerate((({"answer": "?"}, "not published"), ({"image_2": None}, "without image_2"))):
        bad = parquet(tmp_path / f"{i}.parquet", {**chosen, **change})
        with pytest.raises(TaskError, match=rf"record 1 of .*{i}.parquet' is not one of vlm:mmmu: .*{said}"):
            items("mmmu", bad)


def test_mathvista(tmp_path: Path) -> None:
    put(tmp_path / "images" / "1.jpg", png())
    number = {"question": "How far?", "image": "images/1.jpg", "choices": None, "unit": None, "precision": 1,
              "answer": "1.2", "question_type": "free_form", "answer_type": "float", "pid": "1",
              "query": "Hint: one decimal place.\nQuestion: How far?"}  # fmt: skip
    choice = {**number, "choices": ["3/11", "8/11"], "precision": None, "answer": "8/11", "answer_type": "text",
              "question_type": "multi_choice", "query": "Question: Which?\nChoices:\n(A) 3/11\n(B) 8/11"}  # fmt: skip
    one, two = items("mathvista", put(tmp_path / "testmini.json", {"1": number, "2": choice}))
    check(one, f"{number['query']}{SHORT}", "1.2", wrong="1.3")
    assert one.questions[0].metric("It is 1.2345 m.") == 1.0  # type: ignore[misc]
    check(two, f"{choice['query']}{SHORT}", "8/11", wrong="A")
    assert two.questions[0].metric("(B) 8/11") == two.questions[0].metric("B") == 1.0  # type: ignore[misc]
    hub = {**number, "precision": 1.0, "decoded_image": struct(BLUE)}
    item = items("mathvista", parquet(tmp_path / "testmini.parquet", hub))[0]
    check(item, f"{number['query']}{SHORT}", "1.2", BLUE, wrong="1.3")


def test_several_files_of_one_split(tmp_path: Path) -> None:
    for i, colour in enumerate((RED, BLUE)):
        record = {"image": struct(colour), "question": str(i), "answers": ["a"]}
        parquet(tmp_path / f"validation-0000{i}-of-00002.parquet", record)
    parquet(tmp_path / "test-00000-of-00001.parquet", {"image": struct(), "question": "2", "answers": ["a"]})
    assert [colours(item) for item in items("docvqa", tmp_path / "validation-*.parquet")] == [[RED], [BLUE]]
    with pytest.raises(TaskError, match="no file is named like"):
        items("docvqa", tmp_path / "train-*.parquet")


def test_what_cannot_be_read_says_so(tmp_path: Path) -> None:
    lost = {"image": "none.png", "question": "?", "answer": "a"}
    with pytest.raises(TaskError, match=r"cannot read the image 'none.png': it is in none of '.*', '.*/images'"):
        tasks.open("vlm:gqa", lines(tmp_path / "lost.jsonl", lost)).item(0)
    (tmp_path / "none.png").write_text("text", encoding="utf-8")
    with pytest.raises(TaskError, match=r"cannot read the image '.*none.png': not an image"):
        tasks.open("vlm:gqa", lines(tmp_path / "text.jsonl", lost)).item(0)
    with pytest.raises(TaskError, match="vlm:gqa=PATH"):
        tasks.open("vlm:gqa")
    with pytest.raises(TaskError, match="judged by a large model"):
        tasks.open("vlm:mmvet", lines(tmp_path / "judged.jsonl", lost)).item(0)
    with pytest.raises(TaskError, match="cannot read"):
        tasks.open("vlm:gqa", tmp_path / "nothing.jsonl")
    bad = {"index": "0", "image": "none.png", "question": "?", "answer": "['a"}
    with pytest.raises(TaskError, match=r"record 1 of .*list.tsv': not a list of texts"):
        items("docvqa", table(tmp_path / "list.tsv", bad))
    (tmp_path / "odd.tsv").write_text("index\tquestion\n1\n", encoding="utf-8")
    with pytest.raises(TaskError, match=r"odd.tsv', line 2, has not as many cells"):
        tasks.open("vlm:mmbench", tmp_path / "odd.tsv")


@pytest.mark.parametrize(
    ("part", "record", "said"),
    [
        ("gqa", {"question": "?", "answer": "a"}, "no field 'image'; its fields are question, answer"),
        ("chartqa", {"imgname": "a.png", "query": "?"}, "no field 'label'"),
        ("docvqa", {"image": "a.png", "question": "?", "answers": None}, "no answer, as in a test split"),
        (
            "ai2d",
            {"image": "a.png", "question": "?", "options": ["x"], "answer": "1"},
            "'B' is the letter of none of 1",
        ),
        ("mmbench", {"image": "a.png", "question": "?", "A": "x", "C": "y", "answer": "A"}, "options A, C, and none"),
        ("mmmu", {"image_1": "a.png", "question": "?", "options": "['x'", "answer": "A"}, "not a list of texts"),
        ("mmstar", {"image": {"base64": "%"}, "question": "?", "answer": "A"}, "base64"),
        ("mathvista", {"image": "a.png", "question_type": "free_form"}, "no field 'answer_type'"),
    ],
)
def test_a_record_of_another_form_is_named(part: str, record: dict[str, object], said: str, tmp_path: Path) -> None:
    put(tmp_path / "a.png", png())
    right = {"image": "a.png", "question": "?", "answer": "A"}
    task = tasks.open(f"vlm:{part}", lines(tmp_path / "these.jsonl", right, record))
    with pytest.raises(TaskError, match=rf"record 2 of '.*these.jsonl' is not one of vlm:{part}: .*{said}"):
        task.item(1)


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **options: Any) -> Any:
        if name.startswith("pyarrow"):
            raise ModuleNotFoundError(name)
        return real(name, *args, **options)

    path = put(tmp_path / "a.parquet", b"PAR1")
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(TaskError, match=r"needs pyarrow, which is not installed: pip install 'keepkv\[eval\]'"):
        tasks.open("vlm:docvqa", path)
