"""What an evaluation runs, in which order: everything that decides its rows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from itertools import product
from typing import Annotated, Any

from keepkv import tasks
from keepkv.core.budget import Budget
from keepkv.core.options import between, taken
from keepkv.core.when import When
from keepkv.errors import KeepKVError
from keepkv.measure.interval import Z
from keepkv.measure.rows import method_label, plain

BASELINES = ("full", "random", "snapkv")  # the reference, the null, and a plain eviction: always measured
MODES = ("agnostic", "aware")  # compressed before the question is seen, or with it
SEEDS = 100_000  # from the items of one seed of an evaluation to those of the next
FEW = 20  # items of a cell, below which its interval is not to be trusted
HELD_OUT = 1_000_000  # seeds of items from here on are for evaluation


@dataclass(frozen=True)
class Variant:
    """A method and its options."""

    method: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """Method and options as the command line takes them: ``keepkv:key=zip``."""
        return method_label(self.method, self.options)


FULL = Variant("full")


@dataclass(frozen=True)
class Unit:
    """What is run and recorded together: some items, one method, every budget. items: their seeds. draw: the seed of
    the methods that draw at random. first: whether it is the first of its task, length and mode."""

    task: str
    length: int
    mode: str
    variant: Variant
    budgets: tuple[float | int | str, ...]
    items: tuple[int, ...]
    draw: int
    first: bool


@dataclass(frozen=True)
class Setup:
    """One evaluation.

    items: per task, length and seed. batch: items read together. sinks, window: tokens that every method keeps, so that
    methods differ in what they choose alone; None keeps each method's default. every: decoded tokens between
    compressions in tasks that decode long. plain: tasks in plain English. slack: tokens that a reply may have beyond
    those of the answer. questions: what methods that rehearse are told may be asked, each with the beginning of a
    reply; never those that are asked. size: (height, width) of pictures, for models that take any. budgets: as
    ``keepkv.Budget`` reads them; ``"10%bytes"`` holds the bytes of all methods equal.
    """

    model: str
    tasks: tuple[str, ...]
    variants: tuple[Variant, ...]
    budgets: tuple[float | int | str, ...]
    lengths: tuple[int, ...] = (1024,)
    modes: tuple[str, ...] = ("agnostic",)
    items: int = 25
    seeds: tuple[int, ...] = (0,)
    batch: int = 8
    sinks: int | None = 4
    window: int | None = 16
    every: int = 16
    plain: bool = False
    slack: int = 0
    questions: tuple[tuple[str, str], ...] = ()
    size: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "tasks", tuple(map(tasks.named, self.tasks)))
        for name in self.tasks:
            held = tasks.get(name).size
            if held is not None and held < self.items:
                raise KeepKVError(
                    f"{name} has {held} items, and {self.items} were asked for: give --items {held} or less"
                )
        if self.sees and self.batch != 1:
            raise KeepKVError(f"batch={self.batch}: contexts with pictures are read one at a time: give batch=1")
        budgets = dict.fromkeys(map(Budget.of, self.budgets))
        object.__setattr__(self, "budgets", tuple(budget.value for budget in budgets))
        for mode in self.modes:
            if mode not in MODES:
                raise KeepKVError(f"mode {mode!r}: supported are {' and '.join(MODES)}")
        for name in ("tasks", "budgets", "lengths", "modes", "seeds"):
            if not getattr(self, name):
                raise KeepKVError(f"no {name} to evaluate: give at least one")
        if min(self.items, self.batch, self.every, *self.lengths) < 1:
            raise KeepKVError("items, batch, every and lengths must be at least 1")
        if self.items > SEEDS:
            raise KeepKVError(f"{self.items} items per seed: at most {SEEDS}, as the next seed's items begin there")
        for seed in self.seeds:
            taken("evaluation", "seeds", seed, Annotated[int, between(-(2**40), 2**40)])

    @property
    def sees(self) -> bool:
        """Whether any context has pictures."""
        return any(tasks.get(name).sees for name in self.tasks)

    def methods(self) -> tuple[Variant, ...]:
        """The full cache, the baselines, and the methods asked for, each once."""
        always = (Variant(name) for name in BASELINES)
        return tuple({variant.label: variant for variant in (*always, *self.variants)}.values())

    def modes_of(self, name: str) -> tuple[str, ...]:
        """The modes in which the task ``name`` is run: where nothing is asked, or one thing after another, there is no
        question to be aware of."""
        task = tasks.get(name)
        if task.decodes:
            return ("decode",)
        return self.modes if task.asks and not task.turns else ("agnostic",)

    def units(self) -> Iterator[Unit]:
        """All units in the order in which they are run and recorded."""
        for name in self.tasks:
            for length, mode, draw in product(self.lengths, self.modes_of(name), self.seeds):
                seeds = [HELD_OUT + SEEDS * draw + i for i in range(self.items)]
                for start in range(0, len(seeds), self.batch):
                    chosen = tuple(seeds[start : start + self.batch])
                    first = start == 0 and draw == self.seeds[0]
                    for variant in self.methods():
                        budgets = (1.0,) if variant == FULL else self.budgets
                        yield Unit(name, length, mode, variant, budgets, chosen, draw, first)

    def doubts(self) -> list[str]:
        """What makes results of this setup say less than they seem to, a sentence each."""
        found, count = [], self.items * len(self.seeds)
        pins = (self.sinks or 0) + (self.window or 0)
        for length, budget in product(self.lengths, map(Budget.of, self.budgets)):
            slots = int(length * budget.rate()) if budget.grows else budget.slots
            if slots is not None and slots < 2 * pins:
                found.append(
                    f"of {length} tokens, a budget of {budget} is about {slots} slots per head, of which {pins} are "
                    f"the same for every method (sinks={self.sinks}, window={self.window}): methods differ in "
                    f"{max(0, slots - pins)}. Give longer contexts, a larger budget or a smaller window."
                )
        if count < FEW:
            half = 100 * Z / (2 * math.sqrt(count + Z * Z))  # of Wilson's interval in the middle
            found.append(
                f"{count} items of each task: a score near 50 % is known to ± {half:.0f} points, and intervals over so "
                f"few are too narrow. Take {FEW} items or more to compare methods."
            )
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as ``run.json`` holds it."""
        methods = [variant.label for variant in self.methods()]
        held: dict[str, Any] = plain(self)
        held |= {"variants": plain([(v.method, v.options) for v in self.variants]), "methods": methods}
        if self.size is None:  # as in files of earlier versions
            del held["size"]
        return held | {"shares": "tokens"}

    @classmethod
    def from_dict(cls, held: dict[str, Any]) -> Setup:
        """The setup that ``to_dict`` made ``held`` of."""
        given = {one.name: _tuples(held[one.name]) for one in fields(cls) if one.name in held}
        variants = ((name, _options(options)) for name, options in held["variants"])
        return cls(**{**given, "variants": tuple(Variant(name, options) for name, options in variants)})


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _options(held: dict[str, Any]) -> dict[str, Any]:
    when = held.get("when")
    return held | ({"when": When(**when)} if isinstance(when, dict) else {})
