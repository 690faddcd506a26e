"""A search over methods and budgets under a limit of time: many short measurements, then whole ones of the best."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from keepkv.characterize.analyse.pareto import Axis, pareto
from keepkv.characterize.analyse.recommend import Limit, Recommendation, recommend
from keepkv.characterize.analyse.shape import normalised
from keepkv.characterize.drive.run import Step, characterize
from keepkv.characterize.grid.lengths import Lengths
from keepkv.characterize.grid.levels import FULL, Point, Technique
from keepkv.characterize.grid.plan import plan
from keepkv.characterize.grid.possible import refusal
from keepkv.characterize.grid.read import Grid
from keepkv.characterize.record.folder import read
from keepkv.characterize.record.summary import Choice, choices
from keepkv.errors import KeepKVError

PROXY, STEPS = "proxy", 20  # folder of the short measurements; budgets are multiples of 1 / STEPS
SHORTER = 4  # times, of prompts and windows in the proxy
Measure = Callable[[Grid, Path, Sequence[Point]], list[Choice]]


@dataclass(frozen=True)
class Space:
    """methods: techniques whose budgets are searched. least, most: shares of the tokens. codecs, weights: to choose
    from."""

    methods: tuple[Technique, ...]
    least: float = 0.1
    most: float = 0.9
    codecs: tuple[str, ...] = ("none",)
    weights: tuple[str, ...] = ("none",)

    def __post_init__(self) -> None:
        if not self.methods or not 0 < self.least <= self.most <= 1:
            raise KeepKVError("a search needs methods, and budgets from above 0 to 1")


@dataclass(frozen=True)
class Found:
    """tried: short measurements. survivors: what was then measured in full. best: among these alone."""

    tried: int
    survivors: tuple[str, ...]
    best: Recommendation


def search(
    grid: Grid, space: Space, out: str | Path, axes: Sequence[Axis], limits: Sequence[Limit] = (), *,
    seconds: float, trials: int = 1000, keep: int = 4, seed: int = 0, step: Step = lambda points, what: None,
    measure: Measure | None = None,
) -> Found:  # fmt: skip
    """Searches the first application, workload and hardware of ``grid`` for ``seconds``: three fifths of them with
    prompts and windows a quarter as long, the rest for the ``keep`` best of those, in full, beside the full cache, with
    one seed of the grid after the other.

    Suggestions are of optuna's TPE with ``seed``, so the same measurements give the same search; those that ``out``
    holds are taken from there. measure: in the place of ``characterize``. Raises ``KeepKVError`` without optuna.
    """
    optuna = _optuna()
    base, whole = _base(grid), time.monotonic() + seconds
    short, folder = proxy(grid), Path(out).expanduser()
    act = measure or _measured(step, whole)
    study = optuna.create_study(
        directions=["minimize" if axis.best == "min" else "maximize" for axis in axes],
        sampler=optuna.samplers.TPESampler(seed=seed, multivariate=True),
    )
    tried: dict[str, Point] = {}
    until, shortened = time.monotonic() + 0.6 * seconds, replace(base, workload=short.workloads[0])
    for _ in range(trials):
        if time.monotonic() > until:
            break
        trial = study.ask()
        point = suggested(trial, space, shortened)
        why = refusal(short, point)
        found = [] if why else act(short, folder / PROXY, [shortened.as_baseline("baseline", 0), point])
        mine = next((one for one in found if one.row.choice == point.choice and one.row.status == "ok"), None)
        if mine is None or any(axis.name not in mine.samples for axis in axes):
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
            continue
        tried[point.choice] = point
        study.tell(trial, [mine.samples[axis.name].point for axis in axes])
    if not tried:
        raise KeepKVError(f"nothing was measured within {seconds:g} s: give more time, or a lighter workload")
    names = survivors(act(short, folder / PROXY, []), [*tried], axes, keep)
    measured = act(grid, folder, in_turn(base, [tried[name] for name in names], grid.seeds))
    here = [one for one in measured if one.row.place == base.place]
    return Found(len(tried), tuple(names), recommend(here, axes, limits))


def in_turn(base: Point, points: Sequence[Point], seeds: Sequence[int]) -> list[Point]:
    """The full cache and each of ``points`` at its place, once for each of ``seeds``: a block each, so that a machine
    which is slower for some minutes is slower for all of them."""
    return [
        replace(one, workload=base.workload, seed=seed, block=block)
        for block, seed in enumerate(seeds)
        for one in (base.as_baseline("baseline", block), *points)
    ]


def proxy(grid: Grid) -> Grid:
    """``grid`` with prompts and windows a quarter as long: what it says of an order is a hint, and no more."""
    one, phases = grid.workloads[0], grid.phases
    v = one.n_in.values
    fewer = tuple(x if one.n_in.kind == "mixture" and i % 2 else max(64.0, x / SHORTER) for i, x in enumerate(v))
    if one.n_in.kind in ("normal", "lognormal"):
        fewer = (fewer[0], v[1] / SHORTER if one.n_in.kind == "normal" else v[1])
    brief = replace(
        phases, seconds=phases.seconds / SHORTER, requests=max(4, phases.requests // SHORTER),
        warm_most=max(phases.warm_least, phases.warm_most // SHORTER), idle=0.0,
    )  # fmt: skip
    return replace(grid, workloads=(replace(one, n_in=Lengths(one.n_in.kind, fewer)),), phases=brief)


def suggested(trial: Any, space: Space, base: Point) -> Point:
    """The point that a trial of optuna asks for."""
    index = trial.suggest_categorical("method", range(len(space.methods)))
    steps = trial.suggest_int("budget", round(space.least * STEPS), round(space.most * STEPS))
    codec = trial.suggest_categorical("codec", space.codecs)
    weights = trial.suggest_categorical("weights", space.weights)
    one = space.methods[index]
    options = one.options | ({} if codec == "none" else {"codec": codec})
    budget = None if one.method == FULL else max(1, steps) / STEPS
    return replace(base, technique=Technique(one.method, budget, options), weights=weights, role="point")


def survivors(found: Sequence[Choice], names: Sequence[str], axes: Sequence[Axis], keep: int) -> list[str]:
    """Of the choices that were tried, those on the front, nearest to the best of every axis first; then the others."""
    held = {one.row.choice: one for one in found if one.row.choice in names and one.row.status == "ok"}
    held = {name: one for name, one in held.items() if all(axis.name in one.samples for axis in axes)}
    standing = {one.name: one for one in pareto({name: one.samples for name, one in held.items()}, axes)}
    points = normalised([[axis.loss(one.samples[axis.name].point) for axis in axes] for one in held.values()])
    loss = {name: sum(point) for name, point in zip(held, points, strict=True)}
    return sorted(held, key=lambda name: (not standing[name].on_front, loss[name], name))[:keep]


def _base(grid: Grid) -> Point:
    one = replace(grid, seeds=grid.seeds[:1], techniques=(Technique(),), weights=("none",))
    made = plan(one, lambda point: refusal(grid, point))
    if not made.points:
        raise KeepKVError(f"the full cache cannot be run here: {made.dropped[0][1]}")
    first = Point(grid.applications[0], grid.workloads[0], Technique(), "none", grid.hardware[0], grid.seeds[0])
    return first


def _measured(step: Step, until: float) -> Measure:
    def act(grid: Grid, folder: Path, points: Sequence[Point]) -> list[Choice]:
        if points:
            characterize(grid, folder, step, only=points, until=until)
        return choices(read(folder))

    return act


def _optuna() -> Any:
    try:
        import optuna
    except ModuleNotFoundError as error:
        raise KeepKVError("a search needs optuna: pip install 'keepkv[tune]'") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
