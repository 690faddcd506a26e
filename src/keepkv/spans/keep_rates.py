"""What is left of each span."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

from keepkv.core.survival import survival
from keepkv.spans.rows import RowSpans


def keep_rates(spans: RowSpans, layers: list[Tensor], seen: Tensor) -> dict[str, float]:
    """Share of the tokens of each span that are held, mean over layers and heads, by name.

    layers: positions (B,H,S) of the slots of each layer; seen (B,): tokens of each row. Spans of one name count
    together, over all rows. "rest" is what lies in no fair or protected span, "generated" what came after the prompt,
    "prompt" all of it where it is protected as a whole. A span that has not begun is left out.
    """
    if spans.which is None or not layers:
        return {}
    every = torch.arange(int(seen.max()), device=seen.device).expand(len(seen), -1)  # (B,T) the tokens of each row
    held = survival(layers, every.shape[1]).to(seen.device)
    within = every < seen[:, None]
    free, groups = within & ~spans.protects(every), spans.group_of(every)
    masks = {"prompt": within & spans.protects(every)} if spans.policy.prompt else {}
    masks |= {name: free & (groups == spans.groups.fair.size + i) for i, name in enumerate(("rest", "generated"))}
    parts = [
        (span.label, row, within[row] & (every[row] >= span.start) & (every[row] < span.end))
        for row, index in enumerate(spans.which.tolist())
        for span in spans.policy.lists[index]
    ]
    parts += [(name, row, mask[row]) for name, mask in masks.items() for row in range(len(seen))]
    tokens: dict[str, int] = defaultdict(int)
    kept: dict[str, float] = defaultdict(float)
    for name, row, mask in parts:
        tokens[name] += int(mask.sum())
        kept[name] += float(held[row, mask].sum())
    return {name: kept[name] / n for name, n in tokens.items() if n}
