"""Small made-up worlds for questions and answers: who needs, calls, wants, sees what, and who follows whom."""

import random

from keepkv.tasks.base import Question
from keepkv.tasks.words import NOUNS, names

VERBS = {"need": "needs", "call": "calls", "want": "wants", "see": "sees"}


def world(rng: random.Random, n: int) -> dict[str, dict[str, str]]:
    """``n`` names, each with the object of every verb."""
    return {name: {verb: rng.choice(NOUNS) for verb in VERBS} for name in names(rng, n, alike=True)}


def told(name: str, verb: str, what: str) -> str:
    """The sentence that states one relation."""
    return f" {name} {VERBS[verb]} {what}."


def ask(name: str, verb: str, what: str) -> Question:
    """Answered in a whole sentence, of which the object counts."""
    return Question(f"\nWhat does {name} {verb}?", f" {name} {VERBS[verb]} {what}", values=(what,))


def follows(name: str, other: str) -> str:
    """The sentence that ties two names."""
    return f" {name} follows {other}."


def ask_beyond(name: str, other: str, verb: str, what: str) -> Question:
    """About the one that ``name`` follows: two steps."""
    answer = f" {name} follows {other}, {other} {VERBS[verb]} {what}"
    return Question(f"\nWhat does the one {name} follows {verb}?", answer, values=(what,))
