"""The rows of ``fidelity.jsonl``."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from keepkv.measure.environment import MadeWith
from keepkv.measure.interval import Estimate
from keepkv.measure.rows import INLINE, Row, method_label


@dataclass(frozen=True, kw_only=True)
class FidelityRow(Row):
    """One method at one budget, against the full cache on the same segments.

    budget: as asked. slots: kept per KV head, mean over layers and heads. bytes, full_bytes, ratio: from the receipt,
    after the compression, mean over segments. context: tokens compressed; continuation: tokens teacher-forced after
    them; greedy: tokens of a greedy reply at most. metrics: by name, see ``fidelity``. layers: relative output error by
    layer. seed: of the bootstrap, and with the segment's number of methods that draw.
    """

    method: str
    options: dict[str, Any]
    budget: float | int | str
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

    @property
    def label(self) -> str:
        """Method and options as the command line takes them."""
        return method_label(self.method, self.options)

    def flat(self) -> dict[str, Any]:
        """One column for each number, without the values of single segments."""
        nested = ("metrics", "layers", "versions", "imports", "options")
        whole = self.to_dict()
        row = {name: value for name, value in whole.items() if name not in nested}
        row |= {"options": json.dumps(whole["options"]), **self.made_with.files_and_versions}
        for name, estimate in self.metrics.items():
            row |= {name: estimate.mean, f"{name}_low": estimate.low, f"{name}_high": estimate.high}
        return row | {f"output_error_layer_{layer}": estimate.mean for layer, estimate in self.layers.items()}
