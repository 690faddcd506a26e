"""Pieces of methods by name."""

from __future__ import annotations

from keepkv.allocate.base import ALLOCATIONS, Allocate
from keepkv.errors import KeepKVError
from keepkv.methods.base import METHODS
from keepkv.score.base import SCORES, Score


def as_score(score: str | Score, window: int | None = None) -> Score:
    """A score by name, or as given; one that looks through the window of the prompt gets the method's own."""
    if not isinstance(score, str):
        return score
    if score not in SCORES and score in METHODS:
        raise KeepKVError(
            f"score={score!r} is a method, and a score is due: give one by name, such as 'snapkv', or an object of "
            "keepkv.score, such as ChunkKV(SnapKV())"
        )
    name = SCORES.named(score)
    return SCORES.build(name, window=window) if name == "snapkv" and window else SCORES.build(name)


def shared(allocate: str | Allocate, safeguard: float) -> Allocate:
    """An allocation by name, or as given; those by which heads share a budget get ``safeguard``, the share of it that
    each keeps for itself."""
    name = ALLOCATIONS.named(allocate) if isinstance(allocate, str) else ""
    return ALLOCATIONS.build(name, alpha=safeguard) if name in ("adakv", "pooled") else as_allocation(allocate)


def as_allocation(allocate: str | Allocate) -> Allocate:
    """An allocation by name, with its defaults, or as given."""
    return ALLOCATIONS.build(allocate) if isinstance(allocate, str) else allocate
