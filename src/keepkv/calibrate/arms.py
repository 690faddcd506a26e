"""Bits by layer, found in three ways and compared on texts that none of them has seen."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from statistics import fmean, stdev
from typing import NamedTuple

from keepkv.calibrate import bit_search
from keepkv.calibrate.rounded import Divergence
from keepkv.store.codec import Codec

LEAST = 8  # texts: three quarters to search on, and two to tell whether arms differ


class Arm(NamedTuple):
    """Bits by layer, of a number on average, and the divergence of each text that was held out, nats."""

    bits: tuple[int, ...]
    average: float
    divergence: list[float]

    @property
    def error(self) -> tuple[float, float]:
        """Mean divergence and its standard error."""
        return fmean(self.divergence), stdev(self.divergence) / len(self.divergence) ** 0.5


def compare(
    divergence: Divergence,
    codecs: Mapping[int, Mapping[int, Codec]],
    sizes: list[int],
    target: float,
    proposals: int,
    seed: int,
) -> dict[str, Arm]:
    """ "uniform", the same bits everywhere; "greedy", by the error of each layer alone; "searched", around greedy.

    codecs: by layer of the model and bits. sizes: numbers that each layer writes of a token. target: bits of a number,
    on average at most. Every fourth text is held out. Errors of layers alone are taken on a quarter of the others.
    """
    texts = len(divergence.texts)
    held_out, seen = list(range(3, texts, 4)), [i for i in range(texts) if i % 4 != 3]

    @cache
    def one(bits: tuple[int, ...], text: int) -> float:
        return divergence.of(text, {i: own[b] for (i, own), b in zip(codecs.items(), bits, strict=True)})

    def alone(layer: int, bits: int) -> float:
        return fmean(divergence.of(i, {layer: codecs[layer][bits]}) for i in seen[: max(1, len(seen) // 4)])

    def error(bits: tuple[int, ...], count: int) -> float:
        return fmean(one(bits, i) for i in seen[:count])

    errors = [{2: alone(i, 2), 4: alone(i, 4), 8: 0.0} for i in codecs]  # 8 bits are next to nothing, and a third more
    first = bit_search.greedy(errors, sizes, target)
    found = {
        "uniform": bit_search.uniform(sizes, target),
        "greedy": first,
        "searched": bit_search.searched(first, sizes, target, error, len(seen), proposals, seed),
    }
    return {
        name: Arm(bits, bit_search.average(bits, sizes), [one(bits, i) for i in held_out])
        for name, bits in found.items()
    }


def best(arms: Mapping[str, Arm]) -> str:
    """Greedy, unless another one is better by two standard errors of the difference over texts."""
    name = "greedy"
    for other in ("searched", "uniform"):
        gain = [a - b for a, b in zip(arms[name].divergence, arms[other].divergence, strict=True)]
        if fmean(gain) > 2 * stdev(gain) / len(gain) ** 0.5:
            name = other
    return name
