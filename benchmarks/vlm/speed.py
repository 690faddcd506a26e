"""Time to the first token and for each further one, of methods and reducers on the model in the package that sees.

python -m benchmarks.vlm.speed --out benchmarks/vlm/results
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

import keepkv
from keepkv import tasks
from keepkv.cli.arguments import variant
from keepkv.evaluation.setup import HELD_OUT
from keepkv.measure import Ledger, MadeWith, Percentiles, Row
from keepkv.measure.latency import latency
from keepkv.methods import method_info
from keepkv.tasks.asking import encode, step
from keepkv.vision.reduced import read_reduced, vision_tokens
from keepkv.vision.reducers import REDUCERS
from keepkv.vision.seeing import Seeing, read

from .methods import BUDGETS, METHODS

PINS = {"sinks": 1, "window": 4}  # tokens that every method keeps


@dataclass(frozen=True, kw_only=True)
class LatencyRow(Row):
    """tokens: of the prompt. entries: cached in a layer when the reply begins, mean. first, each: seconds."""

    method: str
    budget: float
    tokens: int
    entries: float
    reply: int
    first: Percentiles
    each: Percentiles
    made_with: MadeWith


def measured(model: Any, seeing: Seeing, name: str, budget: float, length: int, reply: int, repeats: int) -> LatencyRow:
    """One row: a moving scene of ``length`` tokens and a question, compressed together."""
    item = encode(seeing, tasks.get("scene-seen").generate(seeing, length, HELD_OUT))
    prompt, last = item.context + item.asked[0].prompt[:-1], item.asked[0].prompt[-1]
    entries: list[float] = []

    def begin() -> tuple[Any, torch.Tensor, torch.Tensor]:
        seen = seeing.seen(prompt, item.item.pictures, model.device)
        if name in REDUCERS:
            cache = keepkv.Cache(model, "full")
            vision = int(seen.vision.sum())
            count = vision_tokens(budget, vision, len(prompt) - vision)
            mask, _ = read_reduced(model, cache, prompt, seen, seeing, name, count)
        else:
            one = variant(name)
            pins = {key: n for key, n in PINS.items() if key in method_info(one.method).options}
            cache = keepkv.Cache(model, one.method, None if name == "full" else budget, **pins, **one.options)
            mask = read(model, cache, prompt, seen, seeing)
            if cache.compressing and name != "full":
                cache.compress()
        kept = [slots for layer in cache.report().kept.values() for row in layer for slots in row]
        entries[:] = [sum(kept) / len(kept)]
        return decode((cache, mask, torch.tensor([[last]], device=model.device)))

    @torch.inference_mode()
    def decode(state: tuple[Any, torch.Tensor, torch.Tensor]) -> tuple[Any, torch.Tensor, torch.Tensor]:
        cache, mask, ids = state
        mask = torch.cat((mask, torch.ones_like(ids)), 1)
        return cache, mask, step(model, cache, ids, mask)[:, -1].argmax(-1, keepdim=True)

    found = latency(begin, decode, reply, model.device, repeats)
    said = name if name in REDUCERS else variant(name).label
    return LatencyRow(
        method=said, budget=budget, tokens=len(prompt), entries=entries[0], reply=reply, first=found.first,
        each=found.each, made_with=MadeWith.of(model, "embedded-vlm"),
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="benchmarks/vlm/results")
    parser.add_argument("--lengths", nargs="*", type=int, default=[300, 1200])
    parser.add_argument("--budgets", nargs="*", type=float, default=BUDGETS)
    parser.add_argument("--reply", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=8)
    asked = parser.parse_args()
    model, processor = keepkv.embedded_vlm()
    seeing = Seeing(model, processor.tokenizer, None, processor)
    ledger = Ledger(Path(asked.out) / "latency.jsonl", LatencyRow)
    arms = [("full", 1.0), *product(METHODS, asked.budgets)]
    for length in asked.lengths:
        # In turn, round by round: a machine that changes its pace does so for all.
        turns = [
            [measured(model, seeing, name, budget, length, asked.reply, 2) for name, budget in arms]
            for _ in range(asked.rounds)
        ]
        for rows in zip(*turns, strict=True):
            first, each = (
                Percentiles.of([x for row in rows for x in getattr(row, part).values]) for part in ("first", "each")
            )
            assert first is not None and each is not None
            row = replace(rows[0], first=first, each=each)
            ledger.append([row])
            print(f"{row.method} {row.budget}: {first.median:.3f} s, {1000 * each.median:.1f} ms", flush=True)


if __name__ == "__main__":
    main()
