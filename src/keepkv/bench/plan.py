"""A sweep: everything that decides its rows, and their order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

from keepkv.bench.hardware import BUFFER
from keepkv.bench.shapes import Shape
from keepkv.bench.systems import PLAIN, System
from keepkv.errors import KeepKVError

DTYPES = ("auto", "float32", "bfloat16", "float16")
NEXT_TO_NOTHING, BARELY_MORE = 64, 128  # slots and context where only overhead is to be measured


@dataclass(frozen=True)
class Sweep:
    """models × devices × contexts × batches × systems.

    models: directories, Hub names, or shapes. cap: bytes ("256MiB") or "plain@N"; each system then runs at the
    largest batch whose cache fits, and ``batches`` is not used. dtype: "auto" is the model's own. new: tokens decoded
    in a turn. repeats: turns. prefills: how many of them read the prompt anew; the others decode from its end again.
    chunk: tokens read at once. together: processes alive at once, which take turns. overhead: also measure what Python
    costs, on a model of the same depth with next to no arithmetic. kvpress_python: of the environment of kvpress.
    probe: bytes copied to measure the bandwidth.
    """

    models: tuple[str | Shape, ...]
    systems: tuple[System, ...]
    contexts: tuple[int, ...] = (2048,)
    batches: tuple[int, ...] = (1,)
    cap: str | None = None
    devices: tuple[str, ...] = ("cpu",)
    dtype: str = "auto"
    new: int = 32
    repeats: int = 5
    prefills: int = 3
    chunk: int | None = None
    threads: int | None = None
    together: int = 4
    overhead: bool = True
    kvpress_python: str | None = None
    probe: int = BUFFER
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("models", "systems", "contexts", "batches", "devices"):
            if not getattr(self, name):
                raise KeepKVError(f"no {name} to measure: give at least one")
        least = (
            *self.contexts,
            *self.batches,
            self.new,
            self.repeats,
            self.prefills,
            self.chunk or 1,
            self.threads or 1,
        )
        if min(least) < 1:
            raise KeepKVError("contexts, batches, new, repeats, prefills, chunk and threads must be at least 1")
        if self.together < 2:
            raise KeepKVError(f"together={self.together}: a system and its reference take turns, so at least 2")
        if self.dtype not in DTYPES:
            raise KeepKVError(f"dtype {self.dtype!r}: supported are {', '.join(DTYPES)}")


@dataclass(frozen=True)
class Point:
    """Where systems are compared. batch: None where a cap decides it. overhead: see ``Sweep``."""

    model: str | Shape
    device: str
    context: int
    batch: int | None
    overhead: bool = False


def points(sweep: Sweep) -> Iterator[Point]:
    """All points of a sweep, in the order in which they are measured."""
    for model in sweep.models:
        for device in sweep.devices:
            for context, batch in product(sweep.contexts, (None,) if sweep.cap else sweep.batches):
                yield Point(model, device, context, batch)
            if sweep.overhead:
                yield Point(model, device, BARELY_MORE, 1, overhead=True)


def blocks(systems: Sequence[System], together: int) -> list[tuple[System, ...]]:
    """Systems that take turns with each other, ``together`` at most, the plain cache in every block if it is one of
    them: a comparison is only made within a block."""
    reference = [one for one in systems if one == PLAIN]
    others = [one for one in systems if one != PLAIN]
    size = together - len(reference)
    parts = [others[i : i + size] for i in range(0, len(others), size)] or [[]]
    return [(*reference, *part) for part in parts]


def by_budget(systems: Sequence[System]) -> tuple[System, ...]:
    """The systems in the order in which budgets first occur, those without one first: equal budgets then fall into one
    block where they can."""
    order = list(dict.fromkeys(str(one.budget) for one in systems if one.budget is not None))
    place = {"None": -1} | {budget: i for i, budget in enumerate(order)}
    return tuple(sorted(systems, key=lambda one: place[str(one.budget)]))


def at(point: Point, systems: Sequence[System]) -> tuple[System, ...]:
    """The systems to compare at ``point``: where only overhead counts, every budget is the same few slots."""
    if not point.overhead:
        return tuple(systems)
    slim = [one if one.budget is None else replace(one, budget=NEXT_TO_NOTHING) for one in systems]
    slim = [one for i, one in enumerate(slim) if one not in slim[:i]]
    return tuple(slim)


def total(sweep: Sweep) -> int:
    """Number of rows."""
    return sum(len(block) for p in points(sweep) for block in blocks(at(p, sweep.systems), sweep.together))
