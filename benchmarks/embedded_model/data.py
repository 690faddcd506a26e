"""Training sequences, generated on the fly: task items packed with as many questions as their context can answer."""

import random
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from keepkv.tasks import long_decode, niah, qa, secret, variable_tracking, word_lists
from keepkv.tasks.base import Count, Item, Question, weave
from keepkv.tasks.facts import NOUNS, codes, fact, long_codes, names, question
from keepkv.tasks.text import prose

Encode = Callable[[str], list[int]]
Row = tuple[list[int], list[bool]]
SHORTEST = 112  # tokens that any kind of item fits in

# Tokens of one fact and of one question with its answer, a little rounded up: they size the items.
FACT, ASK = 9, 11


def encoder(tokenizer: Any) -> Encode:
    """Function from a string to its token ids; haystack sentences, which come again and again, are remembered."""
    raw = tokenizer.backend_tokenizer
    known = {piece: raw.encode(piece, add_special_tokens=False).ids for piece in prose()}

    def encode(text: str) -> list[int]:
        ids: list[int] = known.get(text) or raw.encode(text, add_special_tokens=False).ids
        return ids

    return encode


def _log_uniform(rng: random.Random, low: int, high: int) -> int:
    return low if high <= low else round(low * (high / low) ** rng.random())


def dense(rng: random.Random, count: Count, size: int, alike: bool = False) -> Item:
    """Facts and nothing else, in ``size`` tokens with all their questions."""
    most = size // (FACT + ASK)
    n = rng.randint(max(2, most // 2), most)
    pairs = list(zip(names(rng, n, alike=alike), codes(rng, n), strict=True))
    asked = tuple(question(*pair) for pair in rng.sample(pairs, n))
    return Item("".join(fact(*pair) for pair in pairs).lstrip(), asked)


def in_text(rng: random.Random, count: Count, size: int, alike: bool = False) -> Item:
    """One to many facts in real text, all of them asked."""
    n = _log_uniform(rng, max(1, size // 128), size // (FACT + ASK + 2))
    return niah.multikey_1(rng, count, size - n * ASK, facts=n, questions=n, alike=alike)


def dense_alike(rng: random.Random, count: Count, size: int) -> Item:
    """Facts whose names share their words: without these, the model goes by one of the two words."""
    return dense(rng, count, size, alike=True)


def in_text_alike(rng: random.Random, count: Count, size: int) -> Item:
    """The same in real text."""
    return in_text(rng, count, size, alike=True)


def multivalue(rng: random.Random, count: Count, size: int) -> Item:
    """Names with two codes each."""
    keys = _log_uniform(rng, max(1, size // 256), max(1, size // (2 * FACT + ASK + 6)))
    return niah.multivalue(rng, count, max(2 * FACT * keys + 1, size - keys * (ASK + 5)), keys=keys)


def multiquery(rng: random.Random, count: Count, size: int) -> Item:
    """Two names in each question."""
    n = _log_uniform(rng, max(2, size // 100), max(2, size // (FACT + ASK + 4)))
    return niah.multiquery(rng, count, size - (n // 2) * 24, facts=n, questions=n // 2)


def long_values(rng: random.Random, count: Count, size: int) -> Item:
    """Keys or values of several groups of digits, in text or alone."""
    n = _log_uniform(rng, 1, max(1, size // 56))
    values = long_codes(rng, n, rng.choice((2, 4)))
    keys = names(rng, n) if rng.random() < 0.5 else long_codes(rng, n, 2)
    pairs = list(zip(keys, values, strict=True))
    room = size - 31 * n if rng.random() < 0.5 else 0
    asked = tuple(question(*pair) for pair in rng.sample(pairs, n))
    return Item(weave(rng, count, max(room, 25 * n), [fact(*pair) for pair in pairs]), asked)


def noise(rng: random.Random, count: Count, size: int) -> Item:
    """Facts between the same few sentences."""
    n = _log_uniform(rng, 1, max(1, size // 64))
    pairs = list(zip(names(rng, n), codes(rng, n), strict=True))
    haystack = niah.NOISE * (1 + size // 20)
    text = weave(rng, count, size - n * ASK, [fact(*pair) for pair in pairs], haystack=haystack)
    return Item(text, tuple(question(*pair) for pair in pairs))


def answering(rng: random.Random, count: Count, size: int) -> Item:
    """Relations, and questions of one step or two."""
    two = rng.random() < 0.5
    n = _log_uniform(rng, 2, max(2, size // 60))
    build, asked = (qa.two_steps, n) if two else (qa.one_step, 2 * n)
    return build(rng, count, size - asked * (26 if two else 16), names=n, questions=asked)


def variables(rng: random.Random, count: Count, size: int) -> Item:
    """Chains of one to three assignments, every variable asked."""
    hops = rng.randint(1, 2 if size < 100 else 3)
    chains = _log_uniform(rng, max(1, min(70, size // 32) // (2 * hops)), max(1, min(70 // hops, size // (22 * hops))))
    return variable_tracking.build(
        rng, count, size - chains * hops * (7 + 2 * hops), chains=chains, hops=hops, every=True
    )


def counting(rng: random.Random, count: Count, size: int) -> Item:
    """A list of words; short ones mostly, as each has one question only."""
    length = _log_uniform(rng, 40, size - 12)
    return word_lists.common(rng, count, length, distinct=rng.randint(3, min(12, length // 6)))


def frequencies(rng: random.Random, count: Count, size: int) -> Item:
    """A list of words, the three most frequent asked."""
    length = _log_uniform(rng, 48, size - 16)
    return word_lists.frequent(rng, count, length, distinct=rng.randint(4, min(12, length // 8)))


def copying(rng: random.Random, count: Count, size: int) -> Item:
    """A list of words, said again."""
    return long_decode.copy(rng, count, size, steps=_log_uniform(rng, 8, (size - 10) // 2))


def sorting(rng: random.Random, count: Count, size: int) -> Item:
    """Numbers, put in order; most often few, and then several times over."""
    return long_decode.sort(rng, count, size, steps=_log_uniform(rng, 4, min(80, (size - 10) // 2)))


def adding(rng: random.Random, count: Count, size: int) -> Item:
    """A sum, with scratch work."""
    return long_decode.add(rng, count, size, steps=_log_uniform(rng, 2, (size - 10) // 8))


def rules(rng: random.Random, count: Count, size: int) -> Item:
    """A format rule and a secret."""
    n = _log_uniform(rng, 1, max(1, min(12, (size - 30) // (FACT + ASK + 2))))
    return secret.build(rng, count, size - n * (ASK + 1), facts=n, questions=n)


def secrets(rng: random.Random, count: Count, size: int) -> Item:
    """A format rule and about as many secrets as facts that may be told: without these, the model tells everything."""
    n = _log_uniform(rng, 2, max(2, (size - 20) // (FACT + ASK + 16)))
    pairs, word = list(zip(names(rng, n), codes(rng, n), strict=True)), rng.choice(NOUNS)
    hidden = {name for name, _ in pairs[: rng.randint(1, max(1, n // 2))]}
    head = [f" Begin each answer with {word}.", *(fact(name, secret.REFUSAL) for name in hidden)]
    rng.shuffle(head)
    text = weave(rng, count, size - n * (ASK + 1) - count("".join(head)), [fact(*pair) for pair in pairs])
    replies = ((name, secret.REFUSAL if name in hidden else code) for name, code in pairs)
    asked = tuple(Question(f"\nWhat is the code of {name}?", f" {word} {reply}") for name, reply in replies)
    return Item("".join(head).lstrip() + ("" if text.startswith("\n") else " ") + text, asked)


def plain(rng: random.Random, count: Count, size: int) -> Item:
    """Real text without any fact, a little longer than ``size``: the row is cut to its length."""
    return Item(weave(rng, count, size + SHORTEST, []), ())


MIX: dict[Callable[[random.Random, Count, int], Item], float] = {
    dense: 0.05, dense_alike: 0.25, in_text: 0.10, in_text_alike: 0.30, multivalue: 0.06, multiquery: 0.08,
    variables: 0.05, counting: 0.04, rules: 0.06, plain: 0.01, long_values: 0.0, noise: 0.0, answering: 0.0,
    frequencies: 0.0, copying: 0.0, sorting: 0.0, adding: 0.0, secrets: 0.0,
}  # fmt: skip


def row(rng: random.Random, encode: Encode, length: int, bos: int, mix: dict[Any, float] = MIX) -> Row:
    """Token ids of one sequence, exactly ``length``, and which of them belong to answers.

    Items follow one another, each behind its own ``bos``, until less than ``SHORTEST`` tokens are left; real text
    fills the end. Questions come in random order.
    """

    encode = lru_cache(maxsize=512)(encode)  # most texts are counted first, then read

    def count(text: str) -> int:
        return len(encode(text))

    kinds, shares = list(mix), list(mix.values())
    ids: list[int] = []
    answer: list[bool] = []
    while len(ids) < length:
        room = length - len(ids) - 1
        kind = rng.choices(kinds, shares)[0] if room >= SHORTEST else plain
        item = kind(rng, count, room)
        start = len(ids)
        ids += [bos, *encode(item.context)]
        answer += [False] * (len(ids) - start)
        for asked in rng.sample(item.questions, len(item.questions)):
            prompt, reply = encode(asked.prompt), encode(asked.answer)
            ids += prompt + reply
            answer += [False] * len(prompt) + [True] * len(reply)
    return ids[:length], answer[:length]
