"""What one run leaves behind, whichever library ran it, and how two of them are compared."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class Outcome:
    """kept: per layer and head, the original indices held, sorted. logits: (T,V) float32 after the prompt and after
    each token fed. scores: per layer (H,S), where recorded. facts: bytes, times, versions, whatever else."""

    kept: list[list[Tensor]] = field(default_factory=list)
    logits: Tensor = field(default_factory=lambda: torch.zeros(0))
    scores: list[Tensor] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def error(self) -> str | None:
        return self.facts.get("error")

    @property
    def counts(self) -> list[int]:
        """Slots per layer, all heads together."""
        return [sum(len(head) for head in layer) for layer in self.kept]


def kept_lists(packed: Tensor) -> list[Tensor]:
    """(1,H,S) with -1 where nothing is held, as one sorted index tensor per head."""
    return [row[row >= 0].long().sort().values for row in packed[0]]


@dataclass(frozen=True)
class Comparison:
    """heads: Jaccard index of the kept sets, one per layer and head. differing: slots in one set only, all layers.
    gap: largest relative difference between kvpress' scores of slots that changed places within a head, or within a
    layer whose heads share a budget (0 where none did, infinite where a layer holds more). logits: largest absolute
    difference after compression; spread: standard deviation of the logits."""

    heads: list[float]
    differing: int
    slots: int
    gap: float
    logits: float
    spread: float


def compare(theirs: Outcome, ours: Outcome) -> Comparison:
    """Compare two runs over the same model and prompt."""
    heads, differing, slots, gap = [], 0, 0, 0.0
    for layer, (left, right) in enumerate(zip(theirs.kept, ours.kept, strict=True)):
        swaps: list[tuple[Tensor, Tensor]] = []  # per head, scores of slots that only one side kept
        for head, (a, b) in enumerate(zip(left, right, strict=True)):
            only_a, only_b = a[~torch.isin(a, b)], b[~torch.isin(b, a)]
            heads.append((len(a) - len(only_a)) / max(1, len(a) + len(only_b)))
            differing += len(only_a) + len(only_b)
            slots += len(a)
            if theirs.scores:
                swaps.append((theirs.scores[layer][head][only_a], theirs.scores[layer][head][only_b]))
        gap = max(gap, _gap(swaps)) if theirs.scores or not differing else float("inf")
    distance = (theirs.logits - ours.logits).abs().max().item() if theirs.logits.numel() else float("nan")
    return Comparison(heads, differing, slots, gap, distance, theirs.logits.std().item())


def _gap(swaps: list[tuple[Tensor, Tensor]]) -> float:
    """How far apart the scores are of slots that only one side kept, relative to their size."""
    if any(len(a) != len(b) for a, b in swaps):  # heads share a budget: what one lost, another won
        swaps = [(torch.cat([a for a, _ in swaps]), torch.cat([b for _, b in swaps]))]
    gaps = [0.0]
    for a, b in swaps:
        if len(a) != len(b):
            return float("inf")
        both = torch.cat((a, b))
        if not bool(both.isfinite().all()):  # a slot that the other side had given up earlier
            return float("inf")
        if len(both):
            gaps.append(((both.max() - both.min()) / both.abs().max().clamp(min=1e-30)).item())
    return max(gaps)
