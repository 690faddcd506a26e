"""What the benchmarks publish, a function each: their record becomes one of ours, and one of ours stays as it is.

Formats are those that the loaders of lmms-eval (EvolvingLMMs-Lab/lmms-eval, lmms_eval/tasks/NAME/utils.py) and
VLMEvalKit (open-compass/VLMEvalKit, vlmeval/dataset) read, and of the authors' own scripts where they are named. Data
sets of ``lmms-lab`` on the Hugging Face hub with image, question and answer or answers are records of ours already.
"""

from __future__ import annotations

import ast
import re
from string import ascii_uppercase
from typing import Any

from keepkv.tasks.files.records import Record
from keepkv.vision.mark import MARK

_PLACE = r"<image (\d+)>"
HOW = "_how"  # of a record: what its metric is told besides the answers


def own(record: Record) -> Record:
    """MME, and everything that has our fields."""
    return record


def docvqa(record: Record) -> Record:
    """``val_v1.0.json`` and ``val_v1.0_withQT.json`` of rrc.cvc.uab.es, challenge 17: questionId, question, image
    ("documents/NAME.png"), answers. The later release has the same pictures without "documents"."""
    image = record.get("image")
    return {**record, "image": image.removeprefix("documents/")} if isinstance(image, str) else record


def textvqa(record: Record) -> Record:
    """``TextVQA_0.5.1_val.json`` of textvqa.org: question, image_id, ten answers."""
    return _pictured(record, "image_id")


def gqa(record: Record) -> Record:
    """``testdev_balanced_questions.json`` of GQA: question, imageId, answer, by the id of the question; and the
    questions of lmms-lab/GQA, whose pictures are in another file."""
    return _pictured(record, "imageId")


def chartqa(record: Record) -> Record:
    """``test_human.json`` and ``test_augmented.json`` of vis-nlp/ChartQA: imgname, query, label; and
    HuggingFaceM4/ChartQA: image, query, label as a list."""
    if "query" not in record:
        return record
    image = record["imgname"] if "imgname" in record else record["image"]
    return {"image": image, "question": record["query"], "answers": record["label"]}


def ocrbench(record: Record) -> Record:
    """``OCRBench.json`` of Yuliang-Liu/MultimodalOCR: dataset_name, image_path, question, answers (one or a list); and
    echo840/OCRBench: dataset, image, question, answer. Formulas are those of HME100k."""
    source = record.get("dataset_name") or record.get("dataset") or record.get("category")
    formula = source in ("HME100k", "Handwritten Mathematical Expression Recognition")
    named = {"image": record["image_path"]} if "image_path" in record else {}
    return {**record, **named, HOW: {"formula": formula}}


def lettered(record: Record) -> Record:
    """``MMBench_DEV_EN.tsv``, tables of VLMEvalKit and lmms-lab/MMBench: options in columns A, B, C, …, of which the
    last may be empty or "nan", and a hint that is said before the question."""
    held = {letter: str(record[letter]) for letter in ascii_uppercase if _given(record.get(letter))}
    if not held:
        return record
    if not ascii_uppercase.startswith("".join(held)):
        raise ValueError(f"options {', '.join(held)}, and none between them")
    hint = f"{record['hint']}\n" if _given(record.get("hint")) else ""
    return {**record, "question": f"{hint}{record['question']}", "options": [*held.values()]}


def chosen(record: Record) -> Record:
    """As ``lettered``; the metric is told the options."""
    record = lettered(record)
    return {**record, HOW: {"options": record["options"]}} if record.get("options") else record


def ai2d(record: Record) -> Record:
    """lmms-lab/ai2d: question, options, answer as the index of an option, from 0; and VLMEvalKit's table."""
    record = chosen(record)
    index = str(record["answer"]) if record.get("options") and "answer" in record else ""
    return {**record, "answer": ascii_uppercase[int(index)]} if index.isdigit() else record


def mmmu(record: Record) -> Record:
    """MMMU/MMMU and lmms-lab/MMMU: question and options with "<image 1>" where a picture stands, options as the text
    of a list, image_1 to image_7, answer; and VLMEvalKit's table, with pictures in a list.

    What has no options is an open question; its answer may be the text of a list.
    """
    record = lettered(record)
    options = record.get("options") or []
    options = listed(options) if isinstance(options, str) else options
    held = {i: record[f"image_{i}"] for i in range(1, 8) if record.get(f"image_{i}") is not None}
    held = held or dict(enumerate(record.get("images") or [record["image"]], 1))
    texts = [str(text) for text in (record["question"], *options)]
    order = [int(number) for text in texts for number in re.findall(_PLACE, text)]
    question, *options = (re.sub(_PLACE, MARK, text) for text in texts)
    if lost := [i for i in order if i not in held]:
        raise ValueError(f"<image {lost[0]}> without image_{lost[0]}")
    answer = record["answers"] if "answers" in record else record["answer"]
    if answer == "?":
        raise ValueError("the answer is '?', as in the test split, whose answers are not published")
    return {
        "question": question, "options": options, "images": [held[i] for i in order or sorted(held)],
        "answers": listed(answer) if isinstance(answer, str) and re.match(r"\[['\"]", answer) else answer,
        HOW: {"options": options},
    }  # fmt: skip


def mathvista(record: Record) -> Record:
    """``testmini.json`` of lupantech/MathVista, by the id of the problem, and AI4Math/MathVista, with decoded_image:
    query (the question with its hint and choices), choices, answer, question_type, answer_type, precision."""
    if "question_type" not in record:
        return record
    kind = record["question_type"] if record["question_type"] == "multi_choice" else record["answer_type"]
    how = {"kind": kind, "options": record.get("choices") or [], "precision": int(float(record["precision"] or 0))}
    image = record.get("decoded_image") or record["image"]
    return {"image": image, "question": record["query"], "answer": record["answer"], HOW: how}


def listed(text: str) -> list[str]:
    """The strings of a list that is written as text. Raises ``ValueError``."""
    try:
        found = ast.literal_eval(text)
    except (ValueError, SyntaxError) as error:
        raise ValueError(f"not a list of texts: {text[:80]!r}") from error
    if not isinstance(found, list):
        raise ValueError(f"not a list of texts: {text[:80]!r}")
    return [str(one) for one in found]


def _pictured(record: Record, field: str) -> Record:
    """With the picture that is named after ``field``, where the record has none."""
    if field not in record or record.get("image") is not None or record.get("images"):
        return record
    return {**record, "image": f"{record[field]}.jpg"}


def _given(value: Any) -> bool:
    return value is not None and str(value) not in ("", "nan")
