"""Which layers get how many bits: functions of errors that others measure (KVTuner's and TaDA's search, simplified).

Bits of a layer are 2, 4 or 8; they keep to a target, bits of a number on average. sizes: numbers of each layer.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence

from keepkv.kernels.codes import BITS

Error = Callable[[tuple[int, ...], int], float]  # of bits by layer, on so many texts


def average(bits: Sequence[int], sizes: Sequence[int]) -> float:
    """Bits of a number."""
    return sum(map(int.__mul__, bits, sizes)) / sum(sizes)


def uniform(sizes: Sequence[int], target: float) -> tuple[int, ...]:
    """The most bits that all layers can have."""
    return (max(b for b in BITS if b <= target),) * len(sizes)


def greedy(errors: Sequence[Mapping[int, float]], sizes: Sequence[int], target: float) -> tuple[int, ...]:
    """From 2 bits everywhere, always the step that lowers the error most for its bits, while one keeps to the target.

    errors: by layer and bits, where that layer alone is written in so many.
    """
    bits = [BITS[0]] * len(sizes)
    while steps := [
        ((errors[i][old] - errors[i][new]) / (sizes[i] * (new - old)), i, new)
        for i, old in enumerate(bits)
        for new in BITS
        if new > old and average([*bits[:i], new, *bits[i + 1 :]], sizes) <= target
    ]:
        _, i, new = max(steps, key=lambda step: (step[0], -step[1], -step[2]))
        bits[i] = new
    return tuple(bits)


def exchanged(bits: Sequence[int], sizes: Sequence[int], target: float, rng: random.Random) -> tuple[int, ...]:
    """One layer a step up, others steps down until the target is kept to, and what is then to spare is spent."""
    made, layers = list(bits), range(len(bits))

    def step(i: int, by: int) -> None:
        made[i] = BITS[BITS.index(made[i]) + by]

    if not (low := [i for i in layers if made[i] < BITS[-1]]):
        return tuple(bits)
    up = rng.choice(low)
    step(up, 1)
    while average(made, sizes) > target:
        if not (high := [i for i in layers if i != up and made[i] > BITS[0]]):
            return tuple(bits)
        step(rng.choice(high), -1)
    for i in rng.sample(layers, len(layers)):
        if made[i] < BITS[-1]:
            step(i, 1)
            if average(made, sizes) > target:
                step(i, -1)
    return tuple(made)


def searched(
    start: tuple[int, ...], sizes: Sequence[int], target: float, error: Error, texts: int, proposals: int, seed: int
) -> tuple[int, ...]:
    """The best of ``start`` and as many as ``proposals`` others, each one to three exchanges away from it.

    Successive halving: all of them on a sixteenth of the texts, the best quarter on a quarter, the best quarter of
    these on all. Which are looked at depends on ``seed`` alone.
    """
    rng, pool = random.Random(seed), {start: None}
    for _ in range(8 * proposals):
        made = start
        for _ in range(rng.randint(1, 3)):
            made = exchanged(made, sizes, target, rng)
        if len(pool) <= proposals:
            pool[made] = None
    ranked = list(pool)
    for count in (max(1, texts // 16), max(1, texts // 4), texts):
        ranked.sort(key=lambda bits: error(bits, count))
        ranked = ranked[: max(1, len(ranked) // 4)]
    return ranked[0]
