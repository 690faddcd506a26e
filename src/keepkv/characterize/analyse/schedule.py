"""Which setting to run at which load so that a day takes the least energy, replayed on a trace."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from keepkv.characterize.analyse.recommend import Limit
from keepkv.characterize.record.rows import ResultRow
from keepkv.characterize.workload.trace import Arrival
from keepkv.errors import KeepKVError

COLUMNS = ("choice", "rate", "j_per_output_token")


@dataclass(frozen=True)
class Setting:
    """A choice at a load, as it was measured. rate: requests a second. joules: per token written. feasible: whether all
    limits were kept and the queue did not grow. source: of the joules."""

    choice: str
    rate: float
    joules: float
    feasible: bool
    source: str


@dataclass(frozen=True)
class Step:
    """An interval of a replay. load: requests a second in it. met: whether a feasible setting was there."""

    start: float
    load: float
    choice: str
    joules: float
    met: bool


@dataclass(frozen=True)
class Replay:
    """joules: of the whole trace. switches: changes of choice. unmet: intervals without a feasible setting."""

    name: str
    joules: float
    switches: int
    unmet: int
    steps: tuple[Step, ...]


def settings(
    rows: Iterable[ResultRow], limits: Sequence[Limit] = (), power: Sequence[Setting] | None = None
) -> list[Setting]:
    """The rows of open loops that say what a token takes. power: joules from elsewhere, which then are used alone, each
    at the load and choice that a row says whether it is feasible at. Raises ``KeepKVError`` where none does."""
    told = {(one.choice, one.rate): one for one in power or ()}
    found = []
    for row in rows:
        rate = rate_of(row)
        if rate is None or row.status != "ok":
            continue
        good = not row.unstable and all(limit.excess(row) == 0 for limit in limits)
        if power is not None:
            if (one := told.get((row.choice, rate))) is not None:
                found.append(Setting(row.choice, rate, one.joules, good, one.source))
        elif (joules := row.value("j_per_output_token")) is not None:
            found.append(Setting(row.choice, rate, joules, good, row.energy_source))
    if not found:
        raise KeepKVError(
            "no row of an open loop says what a token takes: measure Poisson or gamma arrivals at several rates on a "
            f"machine with a sensor, or give --power FILE, a CSV with the columns {', '.join(COLUMNS)}"
        )
    return found


def read_power(path: str | Path) -> list[Setting]:
    """Joules per token that were measured elsewhere: a CSV with ``COLUMNS``. Raises ``KeepKVError``."""
    try:
        with Path(path).expanduser().open(encoding="utf-8", newline="") as file:
            made = [
                Setting(row["choice"], float(row["rate"]), float(row["j_per_output_token"]), True, Path(path).name)
                for row in csv.DictReader(file)
            ]
    except (OSError, UnicodeDecodeError, KeyError, TypeError, ValueError) as error:
        raise KeepKVError(f"{str(path)!r}: expected a CSV with the columns {', '.join(COLUMNS)} ({error})") from error
    if not made or not all(math.isfinite(one.joules) and one.joules > 0 for one in made):
        raise KeepKVError(f"{str(path)!r}: joules must be above 0")
    return made


def rate_of(row: ResultRow) -> float | None:
    """Requests a second of an open loop; None for another workload."""
    words = row.workload.split(",")[0].split()
    return float(words[1].removesuffix("/s")) if words and words[0] in ("poisson", "gamma") else None


def replay(
    table: Sequence[Setting], trace: Sequence[Arrival], *, every: float, tokens: float, hysteresis: float = 0.05,
    only: str | None = None,
) -> Replay:  # fmt: skip
    """What ``trace`` takes when, every ``every`` seconds, the setting of least energy is run that is feasible at the
    load of the interval. tokens: written by a request whose length the trace does not say. hysteresis: share by which
    another choice must take less before it replaces one that is feasible. only: a choice that is never left.

    A load stands for the smallest measured rate that is not below it, and one above all for the largest, unmet. Energy
    is what a token takes there times the tokens of the interval: nothing is drawn between two measured rates.
    """
    rates = sorted({one.rate for one in table})
    present, switches, steps = only, 0, list[Step]()
    for start, arrivals in _intervals(trace, every):
        load = len(arrivals) / every
        rate = next((x for x in rates if x >= load - 1e-9), rates[-1])
        here = {one.choice: one for one in table if one.rate == rate and only in (None, one.choice)}
        good = {name: one for name, one in here.items() if one.feasible}
        if not here:
            raise KeepKVError(f"{only!r} was not measured at {rate:g} requests a second")
        best = min((good or here).values(), key=lambda one: (one.joules, one.choice))
        stays = good.get(present or "")
        chosen = stays if stays is not None and best.joules > stays.joules * (1 - hysteresis) else best
        switches += present is not None and chosen.choice != present
        present = chosen.choice
        written = sum(one.n_out if one.n_out is not None else tokens for one in arrivals)
        met = bool(good) and load <= rates[-1] + 1e-9
        steps.append(Step(start, load, chosen.choice, chosen.joules * written, met))
    total = sum(step.joules for step in steps)
    return Replay(only or "schedule", total, switches, sum(not step.met for step in steps), tuple(steps))


def against_fixed(
    table: Sequence[Setting], trace: Sequence[Arrival], *, every: float, tokens: float, hysteresis: float = 0.05
) -> list[Replay]:
    """The schedule, and every choice that was measured at all rates as a fixed setting: those that leave the fewest
    intervals unmet first, and among them the one of least energy."""
    rates = {one.rate for one in table}
    fixed = [name for name in dict.fromkeys(one.choice for one in table)
             if {one.rate for one in table if one.choice == name} == rates]  # fmt: skip

    def run(only: str | None = None) -> Replay:
        return replay(table, trace, every=every, tokens=tokens, hysteresis=hysteresis, only=only)

    found = [run(name) for name in fixed]
    return [run(), *sorted(found, key=lambda one: (one.unmet, one.joules))]


def _intervals(trace: Sequence[Arrival], every: float) -> list[tuple[float, list[Arrival]]]:
    if not trace or every <= 0:
        raise KeepKVError("a replay needs a trace and intervals of above 0 seconds")
    count = int(trace[-1].at // every) + 1
    made: list[tuple[float, list[Arrival]]] = [(i * every, []) for i in range(count)]
    for one in trace:
        made[int(one.at // every)][1].append(one)
    return made
