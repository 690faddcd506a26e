"""Which choices no other beats, told apart from those that only chance makes look better."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from keepkv.characterize.record.names import metric
from keepkv.characterize.record.resample import Samples, difference
from keepkv.errors import KeepKVError


@dataclass(frozen=True)
class Axis:
    """A metric, and which way is better."""

    name: str
    best: Literal["min", "max"]

    def loss(self, value: float) -> float:
        """A number that is smaller where ``value`` is better."""
        return value if self.best == "min" else -value


@dataclass(frozen=True)
class Standing:
    """Where a choice stands. dominated_by: choices that are at least as good on every axis, and better on one beyond
    chance. tied_with: those that are at least as good on every axis, but by no more than chance. missing: axes on which
    it was not measured, which leaves it out of the comparison."""

    name: str
    dominated_by: tuple[str, ...] = ()
    tied_with: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()

    @property
    def on_front(self) -> bool:
        return not self.dominated_by and not self.missing


def axes_of(names: Iterable[str]) -> list[Axis]:
    """Axes by the names of metrics; ``min:…`` or ``max:…`` where a metric has no better way of its own, or the other
    one is meant. Raises ``KeepKVError``."""
    found = []
    for text in names:
        way, colon, name = text.rpartition(":")
        best = metric(name).best
        if colon and way in ("min", "max"):
            best = "min" if way == "min" else "max"
        elif colon or best is None:
            raise KeepKVError(f"axis {text!r}: say which way is better, min:{name} or max:{name}")
        found.append(Axis(name, best))
    if not found:
        raise KeepKVError("no axes: give metrics to compare by")
    return found


def pareto(
    candidates: Mapping[str, Mapping[str, Samples]], axes: Sequence[Axis], paired: bool = True
) -> list[Standing]:
    """The standing of each of ``candidates``, samples of metrics by name, in their order.

    A dominates B where it is at least as good on all axes and the 95 % interval of the difference leaves zero out on
    one of those on which it is better; else they are tied. paired: over the samples that both have; else as if drawn
    apart.
    """
    values = {
        name: {axis.name: held[axis.name].point for axis in axes if axis.name in held}
        for name, held in candidates.items()
    }
    whole = [name for name in candidates if len(values[name]) == len(axes)]
    found = []
    for b in candidates:
        missing = tuple(axis.name for axis in axes if axis.name not in values[b])
        over: list[str] = []
        tied: list[str] = []
        for a in whole if not missing else ():
            if a == b or any(axis.loss(values[a][axis.name]) > axis.loss(values[b][axis.name]) for axis in axes):
                continue
            beyond = any(_better(candidates[a][x.name], candidates[b][x.name], x, paired) for x in axes)
            (over if beyond else tied).append(a)
        found.append(Standing(b, tuple(over), tuple(tied), missing))
    return found


def _better(a: Samples, b: Samples, axis: Axis, paired: bool) -> bool:
    """Whether ``a`` is better than ``b`` on ``axis`` beyond chance."""
    if axis.loss(a.point) >= axis.loss(b.point):
        return False
    apart = Samples(b.values, tuple((-1 - key[0], *key[1:]) for key in b.keys), b.statistic)
    bounds = difference(a, b if paired else apart)
    return bounds is not None and (bounds[1] < 0 if axis.best == "min" else bounds[0] > 0)
