"""Loyalty, as EffiVLM-Bench (arXiv 2506.00479) defines it: how often compression leaves the prediction as it was.

    OL = 100 · mean over models m, benchmarks b and samples s of 1[prediction_compressed = prediction_full]

It needs no labels, and bounds what compression can do to accuracy: where answers that count as the same are right or
wrong together, |accuracy change| ≤ 1 − OL / 100.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from keepkv.measure.interval import wilson

Normalise = Callable[[str], str]


def identity(answer: str) -> str:
    """Answers are the same only if every character is."""
    return answer


def casefolded(answer: str) -> str:
    """``answer`` without white space around it, upper and lower case alike."""
    return answer.strip().casefold()


def same_answer(reference: str, other: str, normalise: Normalise = identity) -> bool:
    """The verdict on one sample. Which ``normalise`` was used belongs beside every number made from it."""
    return normalise(reference) == normalise(other)


@dataclass(frozen=True)
class Loyalty:
    """In percent. macro: mean over groups of each group's mean, as published; micro: mean over all samples, with its
    95 % Wilson interval from low to high; n: samples."""

    macro: float
    micro: float
    low: float
    high: float
    n: int


def overall_loyalty(verdicts: Mapping[str, Sequence[bool]]) -> Loyalty:
    """OL of the verdicts of each group, a benchmark of one model; a group without samples is an error."""
    empty = [name for name, found in verdicts.items() if not found]
    if empty or not verdicts:
        raise ValueError(f"loyalty needs at least one verdict in each group; none in {empty or 'no groups'}")
    right, n = sum(map(sum, verdicts.values())), sum(map(len, verdicts.values()))
    macro = sum(sum(found) / len(found) for found in verdicts.values()) / len(verdicts)
    low, high = wilson(right, n)
    return Loyalty(100 * macro, 100 * right / n, 100 * low, 100 * high, n)
