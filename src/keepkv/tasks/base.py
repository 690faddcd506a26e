"""What a task is: a context that is compressed first, and questions that are asked afterwards."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from keepkv.errors import KeepKVError
from keepkv.tasks.text import prose

Count = Callable[[str], int]


class TaskError(KeepKVError, ValueError):
    """A task cannot be built as asked."""


@dataclass(frozen=True)
class Check:
    """A rule that a reply keeps or breaks. family and text say which rule; strict: whether a reply keeps it."""

    family: str
    text: str
    strict: Callable[[str], bool] = field(compare=False, repr=False)

    def loose(self, reply: str) -> bool:
        """Whether the reply keeps the rule as it stands, or without its first line, its last line, or asterisks
        (the loose accuracy of IFEval, arXiv 2311.07911)."""
        lines = reply.split("\n")
        cut = (lines[1:], lines[:-1], lines[1:-1])
        variants = [reply, *("\n".join(part).strip() for part in cut)]
        return any(self.strict(variant) or self.strict(variant.replace("*", "")) for variant in variants)


@dataclass(frozen=True)
class Question:
    """A prompt that continues the context, and the answer that continues the prompt.

    ``prompt`` starts with a newline and ``answer`` with a space, so that context, prompt and answer tokenise separately
    and their ids concatenate. ``values`` are what the reply is searched for: the score is the share that it has, as in
    RULER; without any, the reply must be the answer, token by token; ``graded``: the score is the share of the answer's
    tokens before the first wrong one; ``judged``: nothing is generated, the score is the geometric mean probability of
    the answer's tokens (one over its perplexity). ``forbidden`` is text that must not occur in the reply (empty:
    nothing is).

    ``checks``: the score is the share of these rules that the reply keeps. ``recall``: the reply leaks where it has
    more than this share of the forbidden words, in order (ROUGE-L recall); None: where it has the forbidden text as it
    stands. ``probe``: asked only for what it leaks; its value belongs in no score. ``limit``: tokens of a reply at
    most, where they are not those of the answer; ``stop``: text that ends it. ``metric``: the score is what this
    function says of the reply, in [0, 1]. ``foil``: a reply that breaks the rule which the answer keeps, for comparing
    how likely both are.
    """

    prompt: str
    answer: str
    forbidden: str = ""
    values: tuple[str, ...] = ()
    graded: bool = False
    judged: bool = False
    checks: tuple[Check, ...] = ()
    recall: float | None = None
    probe: bool = False
    limit: int | None = None
    stop: str = ""
    foil: str = ""
    metric: Callable[[str], float] | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Item:
    """One context and its questions, each asked on its own against the same (compressed) context.

    conversation: the questions are turns of one conversation instead, each asked with the earlier ones and their
    replies in the cache. tags: what a report groups by, such as the depth of a needle. spans: names of stretches of
    the context, as character ranges. framed: context and prompts already stand in the model's chat template. pictures:
    what stands at the marks of the context, as ``keepkv.vision.seeing.Seeing`` takes it.
    """

    context: str
    questions: tuple[Question, ...]
    conversation: bool = False
    tags: dict[str, float] = field(default_factory=dict)
    spans: dict[str, tuple[int, int]] = field(default_factory=dict)
    framed: bool = False
    pictures: tuple[Any, ...] = field(default=(), compare=False, repr=False)


@dataclass(frozen=True)
class Task:
    """A named generator of items: ``build(rng, count, length, **options)``.

    hint: how to word a reply, for models that can follow it (``in_plain_english``). decodes: what is compressed is
    mostly what the model itself writes, so compression has to run while it decodes. sees: its contexts have pictures.
    asks: there is a question; a continuation has none. turns: the questions are one conversation. english: always
    worded in plain English. pooled: its score counts in the mean over all tasks.
    """

    name: str
    summary: str
    build: Callable[..., Item] = field(repr=False)
    hint: str = "Answer with the number only."
    decodes: bool = False
    asks: bool = True
    turns: bool = False
    english: bool = False
    pooled: bool = True
    sees: bool = False

    @property
    def size(self) -> int | None:
        """How many different items there are; None: as many as are asked for."""
        return None

    def generate(self, tokenizer: Any, length: int, seed: int = 0, *, plain: bool = False, **options: Any) -> Item:
        """One item whose context has at most ``length`` tokens, and only a sentence or so less.

        ``tokenizer`` is any Hugging Face tokenizer, or a function from a string to its number of tokens. The same
        seed, tokenizer and Python version give the same item. ``plain``: worded in plain English, for models that were
        not trained on these tasks.
        """
        count = tokenizer if not hasattr(tokenizer, "encode") else counter(tokenizer)
        plain = plain and self.asks and not self.english
        room = length - count(INTRODUCTION) if plain else length
        item = self.build(random.Random(f"{self.name}/{seed}"), count, room, **options)
        return in_plain_english(item, self.hint) if plain else item


INTRODUCTION = "Read the following text with care: questions about what it says come after it.\n\n"


def in_plain_english(item: Item, hint: str) -> Item:
    """``item`` with an introduction before its context, and each question marked as one, with the ``hint`` how to
    answer. Values are then searched in the reply where the answer itself had to be repeated."""
    made = []
    for asked in item.questions:
        prompt = f"\n\nQuestion: {asked.prompt.lstrip()} {hint}".rstrip() + "\nAnswer:"
        values = asked.values or (() if asked.graded or asked.judged else (asked.answer.strip(),))
        made.append(replace(asked, prompt=prompt, values=values))
    shift = len(INTRODUCTION)
    spans = {name: (start + shift, end + shift) for name, (start, end) in item.spans.items()}
    return replace(item, context=INTRODUCTION + item.context, questions=tuple(made), spans=spans)


def counter(tokenizer: Any) -> Count:
    """Function from a string to its number of tokens, special tokens left out."""

    def count(text: str) -> int:
        return len(tokenizer.encode(text, add_special_tokens=False))

    return count


def weave(
    rng: random.Random,
    count: Count,
    length: int,
    facts: Sequence[str],
    *,
    depth: float | None = None,
    keep_order: bool = False,
    haystack: Sequence[str] | None = None,
) -> str:
    """A run of real text of at most ``length`` tokens with ``facts`` hidden between its sentences.

    ``facts`` each start with a space and end with a full stop.
    They land at random gaps, or all at ``depth`` (0 = start,
    1 = end) if given; with ``keep_order`` they stay in the order given. The text starts at a random sentence.
    """
    facts = list(facts)
    if not keep_order:
        rng.shuffle(facts)
    used = sum(count(fact) for fact in facts)
    if used > length:
        raise TaskError(f"{len(facts)} facts need {used} tokens, the context has {length}: give longer contexts")
    source = prose() if haystack is None else haystack
    start, body, missed = rng.randrange(len(source)), [], 0
    for i in range(len(source)):
        piece = source[(start + i) % len(source)]
        size = count(piece)
        if used + size <= length:
            body.append(piece)
            used += size
        elif (missed := missed + 1) == 6:  # a few shorter sentences may still fit
            break
    if depth is None:
        gaps = sorted(rng.randrange(len(body) + 1) for _ in facts)
    else:
        gaps = [round(depth * len(body))] * len(facts)
    while True:
        text = _join(body, facts, gaps)
        # Counts of pieces add up exactly for byte-level BPE; other tokenizers may need a token more at a seam.
        if count(text) <= length or not body:
            return text
        body.pop()
        gaps = [min(gap, len(body)) for gap in gaps]


def _join(body: Sequence[str], facts: Sequence[str], gaps: Sequence[int]) -> str:
    pieces, done = [], 0
    for i in range(len(body) + 1):
        while done < len(facts) and gaps[done] == i:
            pieces.append(facts[done])
            done += 1
        pieces.extend(body[i : i + 1])
    return "".join(pieces).lstrip()
