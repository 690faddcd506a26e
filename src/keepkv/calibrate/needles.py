"""Texts with one needle in them, at a known place, and a question on it: made of token ids."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, product
from typing import Any

import torch
from torch import Tensor

from keepkv.calibrate.everyday import KINDS, PEOPLE
from keepkv.calibrate.questions import HINT, LEAST
from keepkv.errors import CalibrationError
from keepkv.evaluation.fidelity.segments import tokenise
from keepkv.tasks.asking import Asked, Ids
from keepkv.tasks.base import INTRODUCTION, Item, Question, in_plain_english
from keepkv.tasks.chat import frame
from keepkv.tasks.facts import NOUNS, codes, fact, names, question
from keepkv.tasks.text import sentences_of

ROOM = 16  # tokens of a reply beside its answer
DEPTHS = 9  # from .1 to .9
# What is noted, what is asked, and pairs of what the note has and what follows from it, which the note does not say.
KNOWLEDGE = (
    (" {} has moved to the capital of {}.", "To which city has {} moved?",
     (("France", "Paris"), ("Italy", "Rome"), ("Japan", "Tokyo"), ("Spain", "Madrid"), ("Germany", "Berlin"),
      ("England", "London"), ("Russia", "Moscow"), ("Greece", "Athens"))),
    (" {} arrives on the day after {}.", "On which day does {} arrive?",
     (("Monday", "Tuesday"), ("Tuesday", "Wednesday"), ("Wednesday", "Thursday"), ("Thursday", "Friday"),
      ("Friday", "Saturday"), ("Saturday", "Sunday"))),
    (" {} has painted the door in the colour of {}.", "Which colour is the door of {}?",
     (("grass", "green"), ("snow", "white"), ("coal", "black"), ("blood", "red"), ("lemons", "yellow"))),
    (" {} has exactly as many cats as a {} has.", "How many cats does {} have?",
     (("triangle has sides, and a tricycle", "three"), ("dog has legs, and a car", "four"),
      ("hand has fingers, and a foot", "five"), ("human has eyes, and a bird", "two"))),
    (" {} looks after a {} every day.", "Which kind of animal does {} look after?",
     (("puppy", "dog"), ("kitten", "cat"), ("lamb", "sheep"), ("foal", "horse"), ("calf", "cow"))),
)  # fmt: skip
SORTS = ("code", "everyday", "chain", "knowledge")


@dataclass(frozen=True)
class Needle:
    """One needle in a text, and the question on it.

    start: position of its first token. ids: its tokens, as they stand in the text. asked: question and answer as they
    are fed behind the text. answers: token ids of which one must stand in a reply that knows the answer. sort: one of
    ``SORTS``; "chain" and "knowledge" are to be composed, the others copied.
    """

    start: int
    ids: tuple[int, ...]
    asked: Asked
    answers: tuple[tuple[int, ...], ...]
    sort: str = "code"


def with_needles(
    tokenizer: Any, texts: Sequence[str], tokens: int, length: int, seed: int = 0
) -> tuple[list[Tensor], list[Needle]]:
    """Pieces (1,T) int64 of ``texts``, T at most ``length`` or half of it, ``tokens`` in all at most, and the needle in
    each.

    Every sort of needle, both lengths and ``DEPTHS`` depths take turns, in an order drawn with ``seed``. A piece is
    put together of token ids, sentence by sentence, so that a needle stands in it as it was encoded, and nothing
    special inside. Inside the tokenizer's chat template where it has one. Raises ``CalibrationError`` where the texts
    have too few sentences, or ``tokens`` are too few for one piece.
    """
    prose = [sentence for text in texts for sentence in sentences_of(text)]
    if len(prose) < LEAST:
        raise CalibrationError(
            f"the texts have {len(prose)} plain sentences, {LEAST} are needed to hide needles between: give --text "
            "FILE with prose"
        )
    rng = random.Random(f"needles/{seed}")
    cases = list(product((length // 2, length), range(1, DEPTHS + 1), SORTS))
    rng.shuffle(cases)
    hay = [tokenizer.encode(sentence, add_special_tokens=False) for sentence in prose]
    pieces: list[Tensor] = []
    needles: list[Needle] = []
    used = 0
    while True:
        size, depth, sort = cases[len(pieces) % len(cases)]
        ids, one = _piece(tokenizer, rng, hay, size, depth / (DEPTHS + 1), sort)
        used += len(ids)
        if used > tokens:
            break
        pieces.append(torch.tensor([ids]))
        needles.append(one)
    if not pieces:
        raise CalibrationError(
            f"{tokens} tokens are too few for a text of up to {length} with a needle in it: give --tokens {length} or "
            "more (a hundred such texts for a stable measurement), or a smaller --length"
        )
    return pieces, needles


def _piece(
    tokenizer: Any, rng: random.Random, hay: Sequence[Ids], length: int, depth: float, sort: str
) -> tuple[Ids, Needle]:
    said, asked = _needle(rng, sort)
    around = frame(tokenizer)
    if around.before or sort in ("everyday", "knowledge"):
        asked = in_plain_english(Item("", (asked,)), HINT).questions[0]
        opening = INTRODUCTION
    else:
        opening = ""  # as the tasks of the package word it
    start = tokenise(tokenizer, "a")[1]
    lead = [start] if start is not None and not around.before else []
    lead = lead + tokenizer.encode(around.before + opening, add_special_tokens=False)
    needle = tokenizer.encode(said, add_special_tokens=False)
    first, filler, before = rng.randrange(len(hay)), list[Ids](), [0]
    while len(lead) + len(needle) + before[-1] + len(more := hay[(first + len(filler)) % len(hay)]) <= length:
        filler.append(more)
        before.append(before[-1] + len(more))
    cut = min(range(len(before)), key=lambda i: abs(before[i] - depth * before[-1]))
    ids = [*lead, *chain(*filler[:cut]), *needle, *chain(*filler[cut:])]
    words = asked.answer.strip()
    prompt = tokenizer.encode(around.between + asked.prompt + around.end, add_special_tokens=False)
    spelled = [words, f" {words}"] if around.end else [f" {words}", words]
    spelled += [x for y in spelled for x in (y.lower(), y.replace(words, words.capitalize()))]
    answers = tuple(dict.fromkeys(tuple(tokenizer.encode(x, add_special_tokens=False)) for x in spelled))
    one = Asked(asked, prompt, list(answers[0]), len(answers[0]) + ROOM)
    return ids, Needle(len(lead) + before[cut], tuple(needle), one, answers, sort)


def _needle(rng: random.Random, sort: str) -> tuple[str, Question]:
    """A note, and the question on it."""
    if sort == "code":
        [name], [code] = names(rng, 1), codes(rng, 1)
        return fact(name, code), question(name, code)
    if sort == "everyday":
        said, ask, subjects, known = rng.choice(KINDS)
        about, answer = rng.choice(subjects), rng.choice(known)
        return said.format(about, answer), Question("\n" + ask.format(about), f" {answer}")
    if sort == "chain":
        first, second = rng.sample(NOUNS, 2)
        [code] = codes(rng, 1)
        return f" Let {second} be {code}. Let {first} be {second}.", Question(f"\nWhat is {first}?", f" {code}")
    said, ask, pairs = rng.choice(KNOWLEDGE)
    about, (hint, answer) = rng.choice(PEOPLE), rng.choice(pairs)
    return said.format(about, hint), Question("\n" + ask.format(about), f" {answer}")
