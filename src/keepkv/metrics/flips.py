"""How answers change under compression, beside how many of them do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from keepkv.measure.interval import Estimate, bootstrap, share
from keepkv.metrics.loyalty import Normalise, identity, same_answer


@dataclass(frozen=True)
class Flips:
    """Shares of n answers. exact: the same as the reference, with its Wilson interval. lost: right before, wrong now;
    won: the reverse; moved: another wrong one; reworded: another right one. net: change of the accuracy, paired."""

    exact: Estimate
    lost: float
    won: float
    moved: float
    reworded: float
    net: Estimate

    @property
    def n(self) -> int:
        return len(self.exact.values)


def flips(
    reference: Sequence[str],
    other: Sequence[str],
    right_before: Sequence[bool],
    right_now: Sequence[bool],
    normalise: Normalise = identity,
) -> Flips:
    """Of the answers ``other`` against those of the ``reference``, each judged; of as many samples, at least one.

    lost + won + moved + reworded = 1 − exact, if answers that are the same are right or wrong together: else
    ``ValueError``, since the ``normalise`` does not fit the judge.
    """
    same = [same_answer(a, b, normalise) for a, b in zip(reference, other, strict=True)]
    judged = list(zip(same, right_before, right_now, strict=True))
    if not judged:
        raise ValueError("flips need at least one answer")
    if any(equal and before != now for equal, before, now in judged):
        raise ValueError("answers that count as the same are judged differently: compare them by a stricter rule")
    changed = [(before, now) for equal, before, now in judged if not equal]
    n = len(judged)
    count = {pair: changed.count(pair) / n for pair in ((True, False), (False, True), (False, False), (True, True))}
    net = bootstrap([float(now) - float(before) for _, before, now in judged])
    return Flips(share(same), count[True, False], count[False, True], count[False, False], count[True, True], net)
