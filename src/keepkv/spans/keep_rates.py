"""What is left of each span."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

from keepkv.spans.rows import RowSpans


def keep_rates(spans: RowSpans, layers: list[Tensor], seen: Tensor) -> dict[str, float]:
    """Share of the tokens of each span that are held, mean over layers and heads, by name.

    layers: positions (B,H,S) of the slots of each layer; seen (B,): tokens of each row. Spans of one name count
    together, over all rows. "rest" is what lies in no fair or protected span, "generated" what came after the prompt.
    A span that has not begun is left out.
    """
    tokens: dict[str, float] = defaultdict(float)
    held: dict[str, float] = defaultdict(float)
    if spans.which is None or not layers:
        return {}

    def add(name: str, size: int, row: int, members: list[Tensor]) -> None:
        if size > 0:
            tokens[name] += size
            held[name] += float(torch.stack([x[row].sum(-1).double().mean() for x in members]).mean())

    for row, (index, now) in enumerate(zip(spans.which.tolist(), seen.tolist(), strict=True)):
        for span in spans.policy.lists[index]:
            size = min(span.end, now) - span.start
            add(span.label, size, row, [(x >= span.start) & (x < span.end) for x in layers])
    free = [(x >= 0) & ~spans.protects(x) for x in layers]
    groups, sizes = [spans.group_of(x) for x in layers], spans.tokens(seen).tolist()
    for name, group in (("rest", -2), ("generated", -1)):
        of_layers = [f & (g == spans.groups.fair.size + 2 + group) for f, g in zip(free, groups, strict=True)]
        for row in range(len(sizes)):
            add(name, sizes[row][group], row, of_layers)
    return {name: held[name] / tokens[name] for name in tokens}
