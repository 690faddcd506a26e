"""Policies: what survives a compression of a stream, as methods over the same slots."""

from __future__ import annotations

from typing import Any

from keepkv.core.registry import known_as
from keepkv.core.when import When
from keepkv.errors import KeepKVError
from keepkv.methods import Method
from keepkv.score import SCORES, EvenFrames, InfiniPotV, NewestFrames, Score, TaR, TextFirst, VaN

POLICIES = ("infinipot-v", "tar", "van", "uniform", "sliding", "random")


def method_of(policy: str | Score, cap: int, recent: float, moves: bool, options: dict[str, Any]) -> Method:
    """The method of a stream. policy: one of ``POLICIES``, the name of any other score, or a score. recent: share of
    the vision budget that the newest steps take. options: of the score."""
    score = policy if isinstance(policy, Score) else _score(policy, recent, options)
    if score.needs_calibration or score.looks_again:
        raise KeepKVError(
            f"policy={policy!r} needs more than one reading of a text, or a calibration: give one of "
            f"{', '.join(map(repr, POLICIES))}, or a score that does not"
        )
    first = TextFirst(score, recent, moves)
    return Method(first, when=When(prefill=None, cap=cap), sinks=0, name=f"video-{policy}"[:60])


def _score(policy: str, recent: float, options: dict[str, Any]) -> Score:
    if policy == "infinipot-v":
        return InfiniPotV(recent=recent, **options)
    if policy == "tar":
        return TaR(recent=recent, **{k: v for k, v in options.items() if k in ("alignment", "space")})
    if policy == "van":
        return VaN(**{k: v for k, v in options.items() if k in ("pool", "thresholds")})
    whole = {"uniform": EvenFrames, "sliding": NewestFrames}
    if policy in whole:
        return whole[policy]()
    return SCORES.build(known_as(policy, [*POLICIES, *SCORES], "policy"))
