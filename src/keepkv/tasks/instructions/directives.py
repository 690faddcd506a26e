"""Rules for replies: what the model is told, how a reply is checked, and what obeying does to a text."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from keepkv.tasks.base import Check, TaskError
from keepkv.tasks.instructions import checks
from keepkv.tasks.instructions.checks import words

# A reply as it might come without any rule; it breaks every one of them once two lines are made of it.
SAMPLE = (
    "The river is wide, and the old bridge over it joins two small towns. People zigzag across it, just to relax! "
    "In winter the water freezes"
)


@dataclass(frozen=True)
class Directive:
    """One rule with its values drawn.

    obey: makes a reply that keeps the rule of one that may not. fails: a reply that breaks it. slots: what of a reply
    it settles; two rules that settle the same cannot stand in one prompt.
    """

    check: Check
    fails: str
    slots: frozenset[str]
    obey: Callable[[str], str] = field(compare=False, repr=False)

    @property
    def text(self) -> str:
        """What the model is told: a sentence."""
        return self.check.text

    @property
    def passes(self) -> str:
        """A reply that keeps the rule."""
        return self.obey(SAMPLE)


def _rule(
    family: str, slots: str, text: str, strict: Callable[[str], bool], obey: Callable[[str], str], fails: str = SAMPLE
) -> Directive:
    return Directive(Check(family, text, strict), fails, frozenset(slots.split()), obey)


def word_range(rng: random.Random) -> Directive:
    """Between so many and so many words."""
    low = rng.randrange(20, 50, 5)
    high, base = low + 40, words(SAMPLE)

    def obey(text: str) -> str:
        return " ".join((words(text) + base * 9)[: low + 10])

    rule = f"Use at least {low} and at most {high} words."
    return _rule("word-range", "size", rule, lambda r: checks.has_words(r, low, high), obey, "Too short.")


def forbidden_word(rng: random.Random) -> Directive:
    """A common word is not to be used."""
    word = rng.choice(("the", "is", "and"))

    def obey(text: str) -> str:
        return re.sub(rf"\b{word}\b ?", "", text, flags=re.IGNORECASE)

    return _rule(
        "forbidden-word", "unwanted", f"Never use the word '{word}'.", lambda r: checks.lacks_word(r, word), obey
    )


def required_word(rng: random.Random) -> Directive:
    """A rare word is to be used once or more."""
    word, times = rng.choice(("lantern", "harvest", "compass", "marble")), rng.randint(1, 3)
    rule = f"Use the word '{word}' at least {times} times." if times > 1 else f"Use the word '{word}'."
    strict: Callable[[str], bool] = lambda r: checks.has_word(r, word, times)  # noqa: E731
    return _rule("required-word", "wanted", rule, strict, lambda text: text + f" {word}" * times)


def placeholders(rng: random.Random) -> Directive:
    """Placeholders in square brackets."""
    count = rng.randint(1, 3)
    rule = f"Include at least {count} placeholder{'s' * (count > 1)} in square brackets, such as [name]."
    strict: Callable[[str], bool] = lambda r: checks.has_placeholders(r, count)  # noqa: E731
    return _rule("placeholders", "brackets", rule, strict, lambda text: text + " [name]" * count)


def forbidden_character(rng: random.Random) -> Directive:
    """A character is not to be used."""
    character, name = rng.choice(
        ((",", "a comma"), ("z", "the letter z"), ("x", "the letter x"), ("j", "the letter j"))
    )

    def obey(text: str) -> str:
        return text.replace(character, "").replace(character.upper(), "")

    rule = f"Never use {name} in the reply."
    return _rule("forbidden-character", "characters", rule, lambda r: checks.lacks(r, character), obey)


def bullets(rng: random.Random) -> Directive:
    """An exact number of bullet points."""
    count = rng.randint(2, 5)
    rule = f"Answer in exactly {count} bullet points, each on a line that starts with a hyphen and a space."
    strict: Callable[[str], bool] = lambda r: checks.has_bullets(r, count)  # noqa: E731
    return _rule("bullets", "shape", rule, strict, lambda text: "- " + "\n- ".join(_parts(text, count)))


def paragraphs(rng: random.Random) -> Directive:
    """An exact number of paragraphs."""
    count = rng.randint(2, 4)
    rule = f"Write exactly {count} paragraphs with an empty line between them."
    strict: Callable[[str], bool] = lambda r: checks.has_paragraphs(r, count)  # noqa: E731
    return _rule("paragraphs", "shape", rule, strict, lambda text: "\n\n".join(_parts(text, count)))


def title(rng: random.Random) -> Directive:
    """A marked title on the first line."""
    rule = "Put a title on the first line, between two equals signs on each side, such as == Rivers ==."
    return _rule("title", "start", rule, checks.has_title, lambda text: "== Rivers ==\n" + text)


def first_phrase(rng: random.Random) -> Directive:
    """The words to begin with."""
    phrase = rng.choice(("Certainly, dear reader", "Good news from our desk", "Here you are", "As you wish"))
    rule = f"Begin every reply with the words '{phrase}'."
    return _rule("first-phrase", "start", rule, lambda r: checks.begins(r, phrase), lambda text: f"{phrase}\n{text}")


def last_phrase(rng: random.Random) -> Directive:
    """The words to end with."""
    phrase = rng.choice(("That will be all", "Ask me anything else", "Until we meet again", "End of message"))
    rule = f"End every reply with the words '{phrase}' and nothing after them."
    return _rule("last-phrase", "end", rule, lambda r: checks.ends(r, phrase), lambda text: f"{text}\n{phrase}")


def quoted(rng: random.Random) -> Directive:
    """The whole reply in quotation marks."""
    rule = "Put the whole reply between double quotation marks."
    return _rule("quoted", "shape start end", rule, checks.is_quoted, lambda text: f'"{text}"')


def json_object(rng: random.Random) -> Directive:
    """The whole reply as JSON."""
    rule = "Give the whole reply as one JSON object and nothing else."
    return _rule("json", "shape start end", rule, checks.is_json, lambda text: json.dumps({"reply": text}))


_ALPHABETS = {"GREEK": ("Greek", "αβκδεφγηιικλμνοπκρστυβωξυζ"), "CYRILLIC": ("Cyrillic", "абкдефгхийклмнопкрстувшхыз")}


def script(rng: random.Random) -> Directive:
    """Another alphabet."""
    unicode_name = rng.choice(list(_ALPHABETS))
    name, letters = _ALPHABETS[unicode_name]
    table = str.maketrans("abcdefghijklmnopqrstuvwxyz", letters)
    rule = f"Write the whole reply in {name} letters."
    strict: Callable[[str], bool] = lambda r: checks.in_script(r, unicode_name)  # noqa: E731
    slots = "letters case start end wanted unwanted brackets characters"
    return _rule("script", slots, rule, strict, lambda text: text.lower().translate(table))


def lower_case(rng: random.Random) -> Directive:
    """No capitals."""
    return _rule(
        "lower-case", "case", "Write in lower case only, without any capital letter.", checks.is_lower, str.lower
    )


def upper_case(rng: random.Random) -> Directive:
    """Capitals only."""
    return _rule("upper-case", "case", "Write every word in capital letters only.", checks.is_upper, str.upper)


# In the order in which they are obeyed, so that what one does, no later one undoes.
FAMILIES: dict[str, Callable[[random.Random], Directive]] = {
    "word-range": word_range, "forbidden-word": forbidden_word, "required-word": required_word,
    "placeholders": placeholders, "forbidden-character": forbidden_character, "bullets": bullets,
    "paragraphs": paragraphs, "title": title, "first-phrase": first_phrase, "last-phrase": last_phrase,
    "quoted": quoted, "json": json_object, "script": script, "lower-case": lower_case, "upper-case": upper_case,
}  # fmt: skip


def draw(rng: random.Random, count: int, families: Sequence[str] = tuple(FAMILIES)) -> list[Directive]:
    """``count`` rules of different families that one reply can keep all together."""
    for _ in range(100):  # the first few rules may leave no room for the last
        chosen: list[Directive] = []
        for name in rng.sample(list(families), len(families)):
            made = FAMILIES[name](rng)
            if not any(made.slots & other.slots for other in chosen):
                chosen.append(made)
            if len(chosen) == count:
                return chosen
    raise TaskError(f"{count} directives at once: not that many of {', '.join(families)} can stand together")


def obey(directives: Sequence[Directive], reply: str = SAMPLE) -> str:
    """A reply that keeps all the rules."""
    order = list(FAMILIES)
    for directive in sorted(directives, key=lambda x: order.index(x.check.family)):
        reply = directive.obey(reply)
    return reply


def _parts(text: str, count: int) -> list[str]:
    """``text`` cut into ``count`` pieces of about as many words; a text too short is said again."""
    said = text.split()
    said *= -(-count // max(1, len(said)))
    return [" ".join(said[i * len(said) // count : (i + 1) * len(said) // count]) for i in range(count)]
