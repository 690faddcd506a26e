"""Benchmarks about pictures that EffiVLM-Bench (arXiv 2506.00479) takes, from files of your own.

One record for each question. What the benchmarks publish is read as it comes (``published``), and one format for all:

    image      a file, found from the folder of the records or from images/ in it, or with its whole path; or its
               bytes, as {"bytes": …} of a parquet file
    images     a list of these, where there are several
    question   the text; behind the pictures, unless it has one U+FFFC for each of them
    answer     or answers: what may be said; of multiple choice the letter
    options    of multiple choice, in order, where the question does not have them

Some of these are judged by a large model, which is not done here: they are refused.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from string import ascii_uppercase
from typing import NamedTuple

from keepkv.metrics import vqa
from keepkv.metrics.mathvista import mathvista
from keepkv.metrics.mmmu import mmmu
from keepkv.tasks.base import Item, Question, TaskError
from keepkv.tasks.files.base import Benchmark
from keepkv.tasks.files.records import FOLDER, Record
from keepkv.tasks.files.vlm import published
from keepkv.tasks.files.vlm.load import load
from keepkv.tasks.files.vlm.picture import picture
from keepkv.vision.mark import MARK

_LETTER = "\nAnswer with the option's letter from the given choices directly."
_SHORT = "\nAnswer the question using a single word or phrase."


class Part(NamedTuple):
    """A benchmark. limit: tokens of a reply. said: behind a question without options; with them it is the letter's.
    read: a published record as one of ours. folders: where its release has pictures, from the folder of the records."""

    metric: Callable[..., float]
    limit: int
    said: str
    read: Callable[[Record], Record] = published.own
    folders: tuple[str, ...] = ()


PARTS: dict[str, Part] = {
    "docvqa": Part(vqa.anls, 32, _SHORT, published.docvqa, ("documents", "spdocvqa_images", "../spdocvqa_images")),
    "chartqa": Part(vqa.relaxed, 16, _SHORT, published.chartqa, ("png",)),
    "textvqa": Part(vqa.consensus, 16, _SHORT, published.textvqa, ("train_images",)),
    "ocrbench": Part(vqa.contains, 64, "", published.ocrbench, ("OCRBench_Images", "../OCRBench_Images")),
    "ai2d": Part(vqa.letter, 8, _LETTER, published.ai2d),
    "gqa": Part(vqa.exact, 8, _SHORT, published.gqa, ("../images",)),
    "mmmu": Part(mmmu, 16, _SHORT, published.mmmu),
    "mme": Part(vqa.yes_or_no, 8, _SHORT),
    "realworldqa": Part(vqa.letter_or_words, 16, "", published.chosen),
    "mmstar": Part(vqa.leading, 8, _LETTER, published.lettered),
    "mathvista": Part(mathvista, 16, _SHORT, published.mathvista),
    "mmbench": Part(vqa.letter, 8, _LETTER, published.chosen),
}
JUDGED = ("llava-wilder", "mmvet", "imagedc")  # replies are read by another model


def make(record: Record, part: str) -> Item:
    """Pictures with the question's text before or behind them, which are compressed, and what is asked."""
    if part in JUDGED:
        raise TaskError(f"{part}: its replies are judged by a large model, which is not done here")
    known = PARTS[part]
    ours = known.read(record)
    held = ours["images"] if ours.get("images") else [ours["image"]]
    options = ours.get("options") or ()
    right = _answers(ours, len(options))
    text = str(ours["question"])
    text += "".join(f"\n{letter}. {option}" for letter, option in zip(ascii_uppercase, options, strict=False))
    if (marks := text.count(MARK)) not in (0, len(held)):
        raise ValueError(f"a question with {marks} marks for {len(held)} pictures")
    context = "\n".join([MARK] * len(held)) + "\n" if not marks else f"{text[: text.rindex(MARK) + 1]}\n"
    rest = text if not marks else text[text.rindex(MARK) + 1 :]
    folders = [Path(record.get(FOLDER, ".")) / name for name in ("", "images", *known.folders)]
    asked = Question(
        f"\n{rest.lstrip()}{_LETTER if options else known.said}\n", f" {right[0]}", limit=known.limit,
        metric=partial(known.metric, answers=right, **ours.get(published.HOW, {})),
    )  # fmt: skip
    return Item(context, (asked,), pictures=tuple(picture(one, folders) for one in held))


def _answers(record: Record, options: int) -> list[str]:
    """What may be said: texts, or with options a letter of one of them."""
    given = record["answers"] if "answers" in record else record["answer"]
    right = [str(one) for one in (given if isinstance(given, list) else [given]) if one is not None]
    if not any(one.strip() for one in right):
        raise ValueError("no answer, as in a test split whose answers are not published")
    if options and not all(one.strip().upper()[:1] in {*ascii_uppercase[:options]} for one in right):
        raise ValueError(f"the answer {right[0]!r} is the letter of none of {options} options")
    return right


def _hub(part: str) -> tuple[str, str | None, str]:
    raise TaskError(
        f"vlm:{part} is read from a file of yours: vlm:{part}=PATH, a file that the benchmark publishes, or JSON lines "
        "with image, question and answer; keepkv.tasks.files.vlm has the format"
    )


BENCHMARK = Benchmark(
    "vlm", "twelve benchmarks about pictures (arXiv 2506.00479), from local files", make, _hub, (*PARTS, *JUDGED),
    sees=True, load=load,
)  # fmt: skip
