"""How many machines a load takes, and how many of them compression saves: from measured rows alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from keepkv.characterize.record.rows import ResultRow
from keepkv.errors import KeepKVError

Bound = Literal["memory", "compute", "edge of the grid", "nothing fits"]


@dataclass(frozen=True)
class Load:
    """rate: requests a second that are to be served. tokens: of a request, prompt and reply, on average. memory,
    weights: bytes of a machine, and of the model on it. spare: share of the memory that is kept free."""

    rate: float
    tokens: float
    memory: int
    weights: int
    spare: float = 0.1

    def __post_init__(self) -> None:
        if not (self.rate > 0 and self.tokens > 0 and self.memory > 0 and self.weights >= 0 and 0 <= self.spare < 1):
            raise KeepKVError(f"load {self}: rate, tokens and memory must be above 0, spare a share below 1")


@dataclass(frozen=True)
class Plan:
    """For one choice. fits: requests that a machine holds at once, by the bytes of a token that were measured.
    per_machine: requests a second, the most that was measured with no more at once, with its interval; measured: the
    row it is of. machines: None where nothing measured fits. bound: "memory", more at once would serve more and does
    not fit; "compute", more at once serves no more; "edge of the grid", more would fit and was not measured."""

    choice: str
    fits: int
    per_machine: float | None
    low: float | None
    high: float | None
    at_once: int | None
    measured: ResultRow | None
    machines: int | None
    bound: Bound
    saves: int | None = None


def capacity(rows: Iterable[ResultRow], load: Load, at_once: Sequence[int] | None = None) -> list[Plan]:
    """A plan for each choice of ``rows``, which are of one application and machine, in closed loops of several sizes.

    The one with the fewest machines comes first. saves: machines less than with the full cache. Raises ``KeepKVError``
    where no row is of a closed loop.
    """
    groups: dict[str, list[tuple[int, ResultRow]]] = {}
    for row in rows:
        clients = clients_of(row)
        if clients is not None and row.status == "ok" and (at_once is None or clients in at_once):
            groups.setdefault(row.choice, []).append((clients, row))
    if not groups:
        raise KeepKVError("capacity is planned from closed loops of several sizes, and none was measured")
    plans = [_plan(choice, sorted(held, key=lambda one: one[0]), load) for choice, held in groups.items()]
    full = next((one for one in plans if one.choice == "full"), None)
    if full is not None and full.machines is not None:
        plans = [_saving(one, full.machines) for one in plans]
    return sorted(plans, key=lambda one: (one.machines is None, one.machines or 0, one.choice))


def clients_of(row: ResultRow) -> int | None:
    """Clients of a closed loop; None for another workload."""
    words = row.workload.split(",")[0].split()
    return int(words[1]) if words and words[0] == "closed" else None


def _plan(choice: str, held: Sequence[tuple[int, ResultRow]], load: Load) -> Plan:
    sizes = [size for _, row in held if (size := row.value("kv_bytes_per_token")) is not None]
    if not sizes:
        raise KeepKVError(f"{choice}: bytes of a token were not measured; our own drivers tell them")
    room = load.memory * (1 - load.spare) - load.weights
    fits = max(0, math.floor(room / (max(sizes) * load.tokens)))
    fitting = [(clients, row) for clients, row in held if clients <= fits and row.value("goodput_per_s") is not None]
    if not fitting:
        return Plan(choice, fits, None, None, None, None, None, None, "nothing fits")
    clients, best = max(fitting, key=lambda one: one[1].value("goodput_per_s") or 0.0)
    rate = best.metrics["goodput_per_s"]
    assert rate is not None
    larger = [row for n, row in held if n > fits and (row.value("goodput_per_s") or 0.0) > rate.mean]
    bound: Bound = "compute"
    if larger:
        bound = "memory"
    elif clients == max(n for n, _ in held):
        bound = "edge of the grid" if fits > clients else "memory"
    machines = math.ceil(load.rate / rate.mean - 1e-9) if rate.mean > 0 else None
    return Plan(choice, fits, rate.mean, rate.low, rate.high, clients, best, machines, bound)


def _saving(one: Plan, full: int) -> Plan:
    return one if one.machines is None else replace(one, saves=full - one.machines)
