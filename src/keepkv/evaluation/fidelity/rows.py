"""The rows of ``fidelity.jsonl`` and ``layers.jsonl``."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from keepkv.measure.environment import MadeWith
from keepkv.measure.interval import Estimate
from keepkv.measure.rows import INLINE, Row, method_label


@dataclass(frozen=True, kw_only=True)
class OfMethod(Row):
    """What was measured of a method at a budget, as it was asked for."""

    method: str
    options: dict[str, Any]
    budget: float | int | str

    @property
    def label(self) -> str:
        """Method and options as the command line takes them."""
        return method_label(self.method, self.options)


@dataclass(frozen=True, kw_only=True)
class FidelityRow(OfMethod):
    """One method at one budget, against the full cache on the same segments.

    budget: as asked. slots: kept per KV head, mean over layers and heads. bytes, full_bytes, ratio: from the receipt,
    after the compression, mean over segments. context: tokens compressed; continuation: tokens teacher-forced after
    them; greedy: tokens of a greedy reply at most. metrics: by name, see ``fidelity``. layers: relative output error by
    layer. seed: of the bootstrap, and with the segment's number of methods that draw.
    """

    slots: float
    bytes: float
    full_bytes: float
    ratio: float
    context: int
    continuation: int
    greedy: int
    segments: int
    metrics: dict[str, Estimate]
    layers: dict[int, Estimate]
    seed: int
    made_with: MadeWith = field(metadata=INLINE)

    def flat(self) -> dict[str, Any]:
        """One column for each number, without the values of single segments."""
        nested = ("metrics", "layers", "versions", "imports", "options")
        whole = self.to_dict()
        row = {name: value for name, value in whole.items() if name not in nested}
        row |= {"options": json.dumps(whole["options"]), **self.made_with.files_and_versions}
        for name, estimate in self.metrics.items():
            row |= {name: estimate.mean, f"{name}_low": estimate.low, f"{name}_high": estimate.high}
        return row | {f"output_error_layer_{layer}": estimate.mean for layer, estimate in self.layers.items()}


@dataclass(frozen=True)
class GivenBack:
    """A layer, or one KV head of it, that was given its slots back while all others stayed compressed.

    held: share of its slots that the compressed cache has. kl: to the full cache, with them given back. accounts: share
    of the KL that is gone then, below 0 where it grows. carries: whether that is half of it or more. starved: whether
    it carries the KL and holds no larger share than all layers do on average.
    """

    layer: int
    head: int | None
    held: float
    kl: Estimate
    accounts: float
    carries: bool
    starved: bool


@dataclass(frozen=True, kw_only=True)
class LayersRow(OfMethod):
    """What each layer accounts for of the KL to the full cache, of one method at one budget.

    budget: as asked. ratio: of bytes, from the receipt. kl: as it is; whole: with all layers given back. layers: every
    one that is compressed; heads: the KV heads of those that were asked for. Estimates are over ``passages``.
    """

    ratio: float
    passages: int
    kl: Estimate
    whole: Estimate
    layers: list[GivenBack]
    heads: list[GivenBack]
    seed: int
    made_with: MadeWith = field(metadata=INLINE)

    def flat(self) -> dict[str, Any]:
        """One column for each number, without the values of single passages."""
        whole = self.to_dict()
        names = ("method", "budget", "ratio", "passages", "seed", "model", "device", "dtype", "revision")
        row = {name: whole[name] for name in names} | {"options": json.dumps(whole["options"])}
        row |= {**self.made_with.files_and_versions, "kl": self.kl.mean, "kl_whole": self.whole.mean}
        for one in (*self.layers, *self.heads):
            place = f"layer_{one.layer}" if one.head is None else f"layer_{one.layer}_head_{one.head}"
            row |= {f"held_{place}": one.held, f"kl_{place}": one.kl.mean, f"accounts_{place}": one.accounts}
        return row
