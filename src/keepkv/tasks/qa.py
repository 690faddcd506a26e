"""Questions about small made-up worlds: who needs, calls, wants or sees what, and who follows whom."""

import random

from keepkv.tasks.base import Count, Item, Question, Task, weave
from keepkv.tasks.facts import NOUNS, names

VERBS = {"need": "needs", "call": "calls", "want": "wants", "see": "sees"}
World = dict[str, dict[str, str]]  # names, each with the object of every verb


def one_step(rng: random.Random, count: Count, length: int, *, names: int | None = None, questions: int = 8) -> Item:
    """``names`` (by default one per 100 tokens, at least 2) are told of, with two relations each."""
    people = _world(rng, length, names)
    known = [(name, verb, what[verb]) for name, what in people.items() for verb in rng.sample(list(VERBS), 2)]
    asked = [
        # Answered in a whole sentence, of which the object counts.
        Question(f"\nWhat does {name} {verb}?", _told(name, verb, what).rstrip("."), values=(what,))
        for name, verb, what in rng.sample(known, min(questions, len(known)))
    ]
    return Item(weave(rng, count, length, [_told(*one) for one in known]), tuple(asked))


def two_steps(rng: random.Random, count: Count, length: int, *, names: int | None = None, questions: int = 8) -> Item:
    """``names`` (by default one per 100 tokens, at least 2): each follows another one and has one relation. A question
    needs two sentences, which stand anywhere: about the one that a name follows."""
    people = _world(rng, length, names)
    order = list(people)
    after = dict(zip(order, order[1:] + order[:1], strict=True))
    verbs = {name: rng.choice(list(VERBS)) for name in order}
    facts = [_told(name, verbs[name], people[name][verbs[name]]) for name in order]
    facts += [f" {name} follows {after[name]}." for name in order]
    asked = []
    for name in rng.sample(order, min(questions, len(order))):
        other, verb = after[name], verbs[after[name]]
        answer = f" {name} follows {other}, {other} {VERBS[verb]} {people[other][verb]}"
        asked.append(Question(f"\nWhat does the one {name} follows {verb}?", answer, values=(people[other][verb],)))
    return Item(weave(rng, count, length, facts), tuple(asked))


def _world(rng: random.Random, length: int, size: int | None) -> World:
    people = names(rng, max(2, length // 100) if size is None else size, alike=True)
    return {name: {verb: rng.choice(NOUNS) for verb in VERBS} for name in people}


def _told(name: str, verb: str, what: str) -> str:
    """The sentence that states one relation."""
    return f" {name} {VERBS[verb]} {what}."


_HINT = "Answer with one short sentence."
TASKS = (
    Task("qa-1", "questions about one sentence among similar ones", one_step, _HINT),
    Task("qa-2", "questions that need two sentences", two_steps, _HINT),
)
