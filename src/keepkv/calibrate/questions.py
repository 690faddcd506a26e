"""Texts with facts in them and questions on these, for calibrations that watch a model answer."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from keepkv.calibrate.everyday import KINDS
from keepkv.errors import CalibrationError
from keepkv.tasks.asking import Ids, encode
from keepkv.tasks.base import Item, Question, counter, in_plain_english, weave
from keepkv.tasks.text import sentences_of

ALIKE = 2  # facts of each kind
LEAST = 20  # sentences that a text must have
HINT = "Answer with a few words."
ROOM = 60  # tokens of a piece that the introduction and the chat template take


class Exchange(list[int]):
    """Token ids of a question with its answer, as they are fed behind a text; the last ``answer`` are the answer's."""

    def __init__(self, prompt: Ids, answer: Ids) -> None:
        super().__init__(prompt + answer)
        self.answer = len(answer)


def with_questions(
    tokenizer: Any, texts: Sequence[str], tokens: int, length: int, seed: int = 0
) -> tuple[list[Tensor], list[list[Exchange]]]:
    """Pieces (1,T) int64 of ``texts``, T about ``length``, ``tokens`` in all, with everyday facts between their
    sentences; and for each the questions on its facts, each with its answer, as they are fed behind it.

    Inside the tokenizer's chat template where it has one. Pieces start at sentences drawn with ``seed``. Raises
    ``CalibrationError`` where the texts have too few sentences.
    """
    prose = [sentence for text in texts for sentence in sentences_of(text)]
    if len(prose) < LEAST:
        raise CalibrationError(
            f"the texts have {len(prose)} plain sentences, {LEAST} are needed to hide facts between: give --text FILE "
            "with prose"
        )
    rng, pieces, asked = random.Random(seed), [], []
    for _ in range(max(1, tokens // length)):
        item = encode(tokenizer, in_plain_english(_item(rng, counter(tokenizer), length - ROOM, prose), HINT))
        pieces.append(torch.tensor([item.context]))
        asked.append([Exchange(one.prompt, one.answer) for one in item.asked])
    return pieces, asked


def _item(rng: random.Random, count: Any, length: int, prose: Sequence[str]) -> Item:
    facts, asked = [], []
    for said, question, subjects, answers in rng.sample(KINDS, len(KINDS)):
        for about, known in zip(rng.sample(subjects, ALIKE), rng.sample(answers, ALIKE), strict=True):
            facts.append(said.format(about, known))
            asked.append(Question("\n" + question.format(about), f" {known}", values=(known,)))
        if sum(map(count, facts)) > length / 2:
            break
    return Item(weave(rng, count, length, facts, haystack=prose), tuple(asked))
