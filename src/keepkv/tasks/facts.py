"""Facts of names and values, and the questions about them, that several tasks are made of.

Every word is one token of the embedded model's tokenizer.
"""

import math
import random
from collections.abc import Sequence

from keepkv.tasks.base import Count, Question, TaskError

ADJECTIVES = (
    "amber", "ancient", "azure", "bold", "brave", "bright", "bronze", "calm", "clever", "cold", "copper", "coral",
    "crimson", "curious", "dark", "eager", "early", "fair", "fancy", "fast", "gentle", "giant", "golden", "grand",
    "gray", "green", "happy", "hidden", "hollow", "humble", "icy", "ivory", "jolly", "kind", "late", "lazy", "little",
    "lively", "lucky", "mellow", "misty", "modern", "noble", "pale", "patient", "plain", "polite", "proud", "purple",
    "quick", "quiet", "rapid", "red", "royal", "rusty", "shiny", "silent", "silver", "sleepy", "smart", "solar",
    "stormy", "sunny", "tall", "tidy", "tiny", "violet", "warm", "wild", "wise", "young", "yellow",
)  # fmt: skip
NOUNS = (
    "badger", "bear", "beaver", "bison", "cactus", "camel", "canyon", "castle", "cat", "cedar", "cloud", "comet",
    "coyote", "crane", "crow", "deer", "desert", "dog", "dolphin", "dragon", "eagle", "elk", "falcon", "fern", "finch",
    "forest", "fox", "frog", "garden", "goat", "goose", "harbor", "hawk", "heron", "horse", "island", "jaguar",
    "lagoon", "lake", "lemon", "lion", "lotus", "maple", "meadow", "moon", "moose", "mountain", "mouse", "ocean",
    "orchid", "otter", "owl", "panda", "parrot", "pepper", "pigeon", "planet", "pony", "rabbit", "raven", "river",
    "robin", "rocket", "salmon", "seal", "shark", "sparrow", "spider", "tiger", "tulip", "turtle", "walrus", "whale",
    "willow", "wolf", "zebra",
)  # fmt: skip


def names(rng: random.Random, n: int, *, alike: bool = False) -> list[str]:
    """``n`` different two-word names such as ``amber falcon``.

    With ``alike`` they are made of so few words that each word occurs in several names.
    """
    first: Sequence[str] = ADJECTIVES
    second: Sequence[str] = NOUNS
    if alike:
        size = min(len(ADJECTIVES), math.ceil(math.sqrt(1.5 * n)))
        first, second = rng.sample(ADJECTIVES, size), rng.sample(NOUNS, size)
    chosen = _drawn(rng, range(len(first) * len(second)), n, "names")
    return [f"{first[i // len(second)]} {second[i % len(second)]}" for i in chosen]


def codes(rng: random.Random, n: int) -> list[str]:
    """``n`` different four-digit numbers."""
    return [str(code) for code in _drawn(rng, range(1000, 10000), n, "codes")]


def fact(name: str, code: str) -> str:
    """The sentence that states one fact."""
    return f" The code of {name} is {code}."


def question(name: str, code: str) -> Question:
    """The question about one fact."""
    return Question(f"\nWhat is the code of {name}?", f" {code}")


def long_codes(rng: random.Random, n: int, groups: int) -> list[str]:
    """``n`` codes such as ``4821-9032`` of ``groups`` four-digit numbers: no two share their first number."""
    heads = _drawn(rng, range(1000, 10000), n, "codes")
    return ["-".join([str(head), *(str(rng.randrange(1000, 10000)) for _ in range(groups - 1))]) for head in heads]


def _drawn(rng: random.Random, known: range, n: int, what: str) -> list[int]:
    """``n`` of ``known``, all different."""
    if n > len(known):
        raise TaskError(f"{n} different {what} are needed and there are {len(known)}: ask for a shorter context")
    return rng.sample(known, n)


def fill(count: Count, length: int, pieces: Sequence[str]) -> tuple[str, int]:
    """As many of ``pieces``, in order, as fit in ``length`` tokens: their text, and how many they are."""
    sizes, used = 0, 0
    for piece in pieces:
        if sizes + count(piece) > length:
            break
        sizes, used = sizes + count(piece), used + 1
    text = "".join(pieces[:used]).lstrip()
    while used and count(text) > length:  # other tokenizers may need a token more at a seam
        used -= 1
        text = "".join(pieces[:used]).lstrip()
    if not used:
        raise TaskError(f"nothing fits in {length} tokens: {pieces[0]!r} alone is longer")
    return text, used
