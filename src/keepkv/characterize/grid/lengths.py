"""Lengths of prompts and replies, drawn from a distribution."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Any

from keepkv.errors import KeepKVError

KINDS = {"fixed": 1, "uniform": 2, "normal": 2, "lognormal": 2}  # numbers that each takes; mixture takes pairs


@dataclass(frozen=True)
class Lengths:
    """Token counts of at least 1.

    kind and values: "fixed" n; "uniform" from, to (both included); "normal" mean, deviation; "lognormal" median, sigma;
    "mixture" length, weight, length, weight, ….
    """

    kind: str = "fixed"
    values: tuple[float, ...] = (512,)

    def __post_init__(self) -> None:
        count, values = len(self.values), self.values
        good = all(math.isfinite(x) and x >= 0 for x in values)
        if self.kind == "mixture":
            good = good and count >= 2 and count % 2 == 0 and sum(values[1::2]) > 0 and min(values[::2]) >= 1
        else:
            good = good and KINDS.get(self.kind) == count and values[0] >= 1
            good = good and (self.kind != "uniform" or values[0] <= values[1])
        if not good:
            raise KeepKVError(
                f"lengths {self.kind} {list(values)}: give a number, or one of uniform: [from, to], normal: [mean, "
                "deviation], lognormal: [median, sigma], mixture: {length: weight}, in tokens"
            )

    @classmethod
    def read(cls, given: Any) -> Lengths:
        """The lengths that a grid says: ``512``, ``{uniform: [256, 1024]}``, ``{mixture: {256: 3, 1024: 1}}``."""
        if isinstance(given, Lengths):
            return given
        if isinstance(given, dict) and len(given) == 1:
            kind, values = next(iter(given.items()))
            if isinstance(values, dict):
                values = [x for pair in values.items() for x in pair]
            values = values if isinstance(values, list) else [values]
        else:
            kind, values = "fixed", [given]
        if not all(isinstance(x, (int, float)) and not isinstance(x, bool) for x in values):
            raise KeepKVError(f"lengths {given!r}: numbers of tokens were expected")
        return cls(str(kind), tuple(values))

    def draw(self, rng: random.Random) -> int:
        """One length."""
        v = self.values
        if self.kind == "fixed":
            found = v[0]
        elif self.kind == "uniform":
            found = rng.randint(int(v[0]), int(v[1]))
        elif self.kind == "normal":
            found = rng.gauss(v[0], v[1])
        elif self.kind == "lognormal":
            found = rng.lognormvariate(math.log(v[0]), v[1])
        else:
            found = rng.choices(v[::2], v[1::2])[0]
        return max(1, round(found))

    @property
    def longest(self) -> float:
        """The most that is drawn; of normal and lognormal, what one in a thousand exceeds."""
        v = self.values
        if self.kind in ("normal", "lognormal"):
            return v[0] + 3.1 * v[1] if self.kind == "normal" else v[0] * math.exp(3.1 * v[1])
        return max(v[::2]) if self.kind == "mixture" else v[-1]

    def __str__(self) -> str:
        said = "-".join(f"{x:g}" for x in self.values)
        return said if self.kind == "fixed" else f"{self.kind} {said}"
