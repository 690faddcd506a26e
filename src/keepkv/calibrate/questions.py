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
    """Token ids of a question with its answer, as they are fed behind a text; the last ``answer`` are the answer's.

    wrong: the same question with an answer of its kind of which the text says nothing; None where none is known.
    """

    def __init__(self, prompt: Ids, answer: Ids, wrong: Ids | None = None) -> None:
        super().__init__(prompt + answer)
        self.answer = len(answer)
        self.wrong = None if wrong is None else Exchange(prompt, wrong)


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
        right, wrong = item.asked[::2], item.asked[1::2]
        asked.append([Exchange(one.prompt, one.answer, no.answer) for one, no in zip(right, wrong, strict=True)])
    return pieces, asked


def _item(rng: random.Random, count: Any, length: int, prose: Sequence[str]) -> Item:
    """A text with facts; each is asked for twice, with its answer and with one of which the text says nothing."""
    facts, asked = [], []
    for said, question, subjects, answers in rng.sample(KINDS, len(KINDS)):
        drawn = rng.sample(answers, 2 * ALIKE)
        for about, known, unsaid in zip(rng.sample(subjects, ALIKE), drawn[:ALIKE], drawn[ALIKE:], strict=True):
            facts.append(said.format(about, known))
            asked += [Question("\n" + question.format(about), f" {x}", values=(x,)) for x in (known, unsaid)]
        if sum(map(count, facts)) > length / 2:
            break
    return Item(weave(rng, count, length, facts, haystack=prose), tuple(asked))
