"""Benchmarks about pictures that EffiVLM-Bench (arXiv 2506.00479) takes, from files of your own.

One record for each question, in one format for all of them:

    image      a file, next to the records or with its whole path; or its bytes, as {"bytes": …} of a parquet file
    images     a list of these, where there are several
    question   the text; behind the pictures, unless it has one U+FFFC for each of them
    answer     or answers: what may be said; of multiple choice the letter
    options    of multiple choice, in order, where the question does not have them

Some of these are judged by a large model, which is not done here: they are refused.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from keepkv.metrics import vqa
from keepkv.tasks.base import Item, Question, TaskError
from keepkv.tasks.files.base import Benchmark
from keepkv.tasks.files.records import FOLDER, Record
from keepkv.vision.mark import MARK

_LETTER = "\nAnswer with the option's letter from the given choices directly."
_SHORT = "\nAnswer the question using a single word or phrase."
# Metric, tokens of a reply, and what is said behind the question.
PARTS: dict[str, tuple[Callable[..., float], int, str]] = {
    "docvqa": (vqa.anls, 32, _SHORT),
    "chartqa": (vqa.relaxed, 16, _SHORT),
    "textvqa": (vqa.consensus, 16, _SHORT),
    "ocrbench": (vqa.contains, 64, ""),
    "ai2d": (vqa.letter, 8, _LETTER),
    "gqa": (vqa.exact, 8, _SHORT),
    "mmmu": (vqa.letter, 16, _LETTER),
    "mme": (vqa.yes_or_no, 8, _SHORT),
    "realworldqa": (vqa.letter, 16, _LETTER),
    "mmstar": (vqa.letter, 8, _LETTER),
    "mathvista": (vqa.relaxed, 16, _SHORT),
    "mmbench": (vqa.letter, 8, _LETTER),
}
JUDGED = ("llava-wilder", "mmvet", "imagedc")  # replies are read by another model


def make(record: Record, part: str) -> Item:
    """Pictures with the question's text before or behind them, which are compressed, and what is asked."""
    if part in JUDGED:
        raise TaskError(f"{part}: its replies are judged by a large model, which is not done here")
    metric, limit, said = PARTS[part]
    held = record["images"] if record.get("images") else [record["image"]]
    pictures = tuple(picture(one, Path(record.get(FOLDER, "."))) for one in held)
    answers = record["answers"] if "answers" in record else [record["answer"]]
    text = str(record["question"])
    options = record.get("options") or ()
    text += "".join(f"\n{chr(ord('A') + i)}. {option}" for i, option in enumerate(options))
    if (marks := text.count(MARK)) not in (0, len(pictures)):
        raise ValueError(f"a question with {marks} marks for {len(pictures)} pictures")
    context = "\n".join([MARK] * len(pictures)) + "\n" if not marks else f"{text[: text.rindex(MARK) + 1]}\n"
    rest = text if not marks else text[text.rindex(MARK) + 1 :]
    right = [str(answer) for answer in answers]
    if not right:
        raise ValueError("no answer")
    asked = Question(f"\n{rest.lstrip()}{said}\n", f" {right[0]}", metric=partial(metric, answers=right), limit=limit)
    return Item(context, (asked,), pictures=pictures)


def picture(given: Any, folder: Path) -> Any:
    """An image as (1,3,H,W) uint8. Raises ``TaskError`` where it cannot be read."""
    import torch

    try:
        from PIL import Image, UnidentifiedImageError
    except ModuleNotFoundError as missing:
        raise TaskError("reading images takes Pillow, which is not installed: pip install pillow") from missing
    raw: Any = given.get("bytes") if isinstance(given, dict) else None
    place = None if raw is not None else folder / str(given["path"] if isinstance(given, dict) else given)
    source: Any = io.BytesIO(raw) if place is None else place
    try:
        with Image.open(source) as image:
            whole = image.convert("RGB")
            flat = torch.frombuffer(bytearray(whole.tobytes()), dtype=torch.uint8)
    except (OSError, UnidentifiedImageError) as error:
        reason = getattr(error, "strerror", None) or "not an image that Pillow reads"
        raise TaskError(f"cannot read the image {str(place or 'in the record')!r}: {reason}") from error
    return flat.view(whole.height, whole.width, 3).movedim(-1, 0)[None]


def _hub(part: str) -> tuple[str, str | None, str]:
    raise TaskError(
        f"vlm:{part} is read from a file of yours: vlm:{part}=PATH, JSON lines with image, question and answer; "
        "keepkv.tasks.files.vlm has the format"
    )


BENCHMARK = Benchmark(
    "vlm", "twelve benchmarks about pictures (arXiv 2506.00479), from local files", make, _hub, (*PARTS, *JUDGED),
    sees=True,
)  # fmt: skip
