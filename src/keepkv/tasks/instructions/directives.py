"""Rules for replies: what the model is told, how a reply is checked, and what obeying does to a text.

A check is given the reply stripped.
"""

from __future__ import annotations

import json
import random
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from keepkv.tasks.base import Check, TaskError

# A reply as it might come without any rule; it breaks every one of them once two lines are made of it.
SAMPLE = (
    "The river is wide, and the old bridge over it joins two small towns. People zigzag across it, just to relax! "
    "In winter the water freezes"
)


def words(text: str) -> list[str]:
    """Runs of letters, digits, hyphens and apostrophes."""
    return re.findall(r"\w+(?:['’-]\w+)*", text)


@dataclass(frozen=True)
class Directive:
    """One rule with its values drawn.

    obey: makes a reply that keeps the rule of one that may not. fails: a reply that breaks it. slots: what of a reply
    it settles; two rules that settle the same cannot stand in one prompt.
    """

    check: Check
    fails: str
    slots: frozenset[str]
    obey: Obey = field(compare=False, repr=False)

    @property
    def text(self) -> str:
        """What the model is told: a sentence."""
        return self.check.text

    @property
    def passes(self) -> str:
        """A reply that keeps the rule."""
        return self.obey(SAMPLE)


Strict = Callable[[str], bool]
Obey = Callable[[str], str]
Family = Callable[[random.Random], Directive]


def _rule(family: str, slots: str, text: str, strict: Strict, obey: Obey, fails: str = SAMPLE) -> Directive:
    return Directive(Check(family, text, strict), fails, frozenset(slots.split()), obey)


def _fixed(family: str, slots: str, text: str, strict: Strict, obey: Obey) -> Family:
    """A rule without values to draw."""
    made = _rule(family, slots, text, strict, obey)
    return lambda rng: made


def word_range(rng: random.Random) -> Directive:
    """Between so many and so many words."""
    low = rng.randrange(20, 50, 5)
    strict: Strict = lambda r: low <= len(words(r)) <= low + 40  # noqa: E731
    rule = f"Use at least {low} and at most {low + 40} words."
    obey: Obey = lambda text: " ".join((words(text) + words(SAMPLE) * 9)[: low + 10])  # noqa: E731
    return _rule("word-range", "size", rule, strict, obey, "Too short.")


def forbidden_word(rng: random.Random) -> Directive:
    """A common word is not to be used."""
    word = rng.choice(("the", "is", "and"))
    rule, held = f"Never use the word '{word}'.", re.compile(rf"\b{word}\b ?", re.IGNORECASE)
    return _rule("forbidden-word", "unwanted", rule, lambda r: bool(r) and not held.search(r), partial(held.sub, ""))


def required_word(rng: random.Random) -> Directive:
    """A rare word is to be used once or more."""
    word, times = rng.choice(("lantern", "harvest", "compass", "marble")), rng.randint(1, 3)
    rule = f"Use the word '{word}' at least {times} times." if times > 1 else f"Use the word '{word}'."
    strict: Strict = lambda r: len(re.findall(rf"\b{word}\b", r, re.IGNORECASE)) >= times  # noqa: E731
    return _rule("required-word", "wanted", rule, strict, lambda text: text + f" {word}" * times)


def placeholders(rng: random.Random) -> Directive:
    """Placeholders in square brackets."""
    count = rng.randint(1, 3)
    rule = f"Include at least {count} placeholder{'s' * (count > 1)} in square brackets, such as [name]."
    strict: Strict = lambda r: len(re.findall(r"\[[^\[\]\n]+\]", r)) >= count  # noqa: E731
    return _rule("placeholders", "brackets", rule, strict, lambda text: text + " [name]" * count)


def forbidden_character(rng: random.Random) -> Directive:
    """A character is not to be used."""
    character = rng.choice(",zxj")
    rule = f"Never use {'a comma' if character == ',' else f'the letter {character}'} in the reply."
    gone = str.maketrans("", "", character + character.upper())
    strict: Strict = lambda r: bool(r) and character not in r.casefold()  # noqa: E731
    return _rule("forbidden-character", "characters", rule, strict, lambda text: text.translate(gone))


def bullets(rng: random.Random) -> Directive:
    """An exact number of bullet points."""
    count = rng.randint(2, 5)
    rule = f"Answer in exactly {count} bullet points, each on a line that starts with a hyphen and a space."
    strict: Strict = lambda r: len(re.findall(r"^\s*[-*•] ", r, re.MULTILINE)) == count  # noqa: E731
    return _rule("bullets", "shape", rule, strict, lambda text: "- " + "\n- ".join(_parts(text, count)))


def paragraphs(rng: random.Random) -> Directive:
    """An exact number of paragraphs."""
    count = rng.randint(2, 4)
    rule = f"Write exactly {count} paragraphs with an empty line between them."
    strict: Strict = lambda r: sum(map(bool, map(str.strip, re.split(r"\n\s*\n", r)))) == count  # noqa: E731
    return _rule("paragraphs", "shape", rule, strict, lambda text: "\n\n".join(_parts(text, count)))


def first_phrase(rng: random.Random) -> Directive:
    """The words to begin with."""
    phrase = rng.choice(("Certainly, dear reader", "Good news from our desk", "Here you are", "As you wish"))
    strict: Strict = lambda r: r.casefold().startswith(phrase.casefold())  # noqa: E731
    rule = f"Begin every reply with the words '{phrase}'."
    return _rule("first-phrase", "start", rule, strict, lambda text: f"{phrase}\n{text}")


def last_phrase(rng: random.Random) -> Directive:
    """The words to end with."""
    phrase = rng.choice(("That will be all", "Ask me anything else", "Until we meet again", "End of message"))
    strict: Strict = lambda r: r.casefold().endswith(phrase.casefold())  # noqa: E731
    rule = f"End every reply with the words '{phrase}' and nothing after them."
    return _rule("last-phrase", "end", rule, strict, lambda text: f"{text}\n{phrase}")


_ALPHABETS = {"GREEK": "αβκδεφγηιικλμνοπκρστυβωξυζ", "CYRILLIC": "абкдефгхийклмнопкрстувшхыз"}


def script(rng: random.Random) -> Directive:
    """Another alphabet."""
    name = rng.choice(list(_ALPHABETS))
    table = str.maketrans("abcdefghijklmnopqrstuvwxyz", _ALPHABETS[name])
    slots = "letters case start end wanted unwanted brackets characters"
    rule = f"Write the whole reply in {name.title()} letters."

    def strict(reply: str) -> bool:
        letters = [x for x in reply if x.isalpha()]
        return bool(letters) and all(unicodedata.name(x, "").startswith(name) for x in letters)

    return _rule("script", slots, rule, strict, lambda text: text.lower().translate(table))


def _is_json(reply: str) -> bool:
    """Is one JSON object, in a code fence or without."""
    fenced = re.match(r"^```(?:json)?\s*(.*?)\s*```$", reply, re.DOTALL | re.IGNORECASE)
    try:
        return isinstance(json.loads(fenced[1] if fenced else reply), dict)
    except ValueError:
        return False


title = _fixed(
    "title", "start", "Put a title on the first line, between two equals signs on each side, such as == Rivers ==.",
    lambda r: re.fullmatch("== .+ ==", r.split("\n")[0].strip()) is not None, lambda text: "== Rivers ==\n" + text,
)  # fmt: skip
quoted = _fixed(
    "quoted", "shape start end", "Put the whole reply between double quotation marks.",
    lambda r: len(r) > 2 and r[0] + r[-1] in ('""', "“”"), lambda text: f'"{text}"',
)  # fmt: skip
json_object = _fixed(
    "json", "shape start end", "Give the whole reply as one JSON object and nothing else.",
    _is_json, lambda text: json.dumps({"reply": text}),
)  # fmt: skip
_LOWER, _UPPER = "Write in lower case only, without any capital letter.", "Write every word in capital letters only."
lower_case = _fixed("lower-case", "case", _LOWER, lambda r: r == r.lower() and any(map(str.isalpha, r)), str.lower)
upper_case = _fixed("upper-case", "case", _UPPER, lambda r: r == r.upper() and any(map(str.isalpha, r)), str.upper)

# In the order in which they are obeyed, so that what one does, no later one undoes.
FAMILIES: dict[str, Family] = {
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
