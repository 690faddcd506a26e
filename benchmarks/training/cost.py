"""What recording and replay cost on this machine, in seconds of a processor, so that other work on it counts little.

    python -m benchmarks.training.cost > benchmarks/training/results/cost.jsonl

The embedded model, one thread, 8 rows of 128 + 128 tokens, g-kv at 64 slots. A row says how many seconds a pass over
the batch took, median, 20th and 80th percentile; of recording also which share of the decoding it is.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from keepkv import training
from keepkv.core.when import When
from keepkv.embedded import embedded_model
from keepkv.engine.cache import Cache
from keepkv.engine.versions import CACHE
from keepkv.measure.environment import MadeWith
from keepkv.measure.interval import Percentiles
from keepkv.measure.rows import INLINE, Row
from keepkv.training.feed import feed

ROWS, READ, LENGTH, EVERY, SLOTS, REPEATS = 8, 128, 256, 16, 64, 3


@dataclass(frozen=True, kw_only=True)
class Cost(Row):
    """seconds: of a processor, for all tokens; tokens_per_second: by its median. share: of recording in the decoding of
    the same cache; None elsewhere. record_bytes: of the record."""

    what: str
    seconds: Percentiles
    tokens_per_second: float
    share: float | None
    record_bytes: int
    made_with: MadeWith = field(metadata=INLINE)


def timed(run: Callable[[], Any]) -> Percentiles:
    found = []
    run()
    for _ in range(REPEATS):
        start = time.process_time()
        run()
        found.append(time.process_time() - start)
    made = Percentiles.of(found)
    assert made is not None
    return made


def decode(model: Any, ids: Tensor, recorded: bool) -> float:
    """Feeds the batch token by token; seconds that recording took."""
    cache, spent = Cache(model, "g-kv", SLOTS, window=8, when=When(every=EVERY)), 0.0
    if recorded:
        left = training.record(cache).left

        def watched(*given: Any) -> None:
            nonlocal spent
            start = time.process_time()
            left(*given)
            spent += time.process_time() - start

        cache.shared.recorder.left = watched  # type: ignore[union-attr,method-assign]
    with torch.no_grad():
        model(input_ids=ids[:, :READ], **{CACHE: cache}, logits_to_keep=1)
        for token in ids[:, READ:].split(1, 1):
            model(input_ids=token, **{CACHE: cache}, logits_to_keep=1)
    return spent


def main() -> None:
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(embedded_model()).train()
    ids = torch.randint(3, 2048, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    mask, made = torch.ones_like(ids), MadeWith.of(model, "embedded")

    def fresh() -> Cache:
        return Cache(model, "g-kv", SLOTS, window=8, when=When(every=EVERY))

    record, held = feed(model, fresh(), ids, mask, READ), fresh()

    def plain() -> None:
        model(input_ids=ids, attention_mask=mask, use_cache=False).logits.square().mean().backward()

    def replayed() -> None:
        training.replay(model, ids, mask, record).square().mean().backward()

    spent: list[float] = []
    tasks: dict[str, tuple[Callable[[], Any], int]] = {
        "decode": (lambda: decode(model, ids, False), LENGTH - READ),
        "decode, recorded": (lambda: spent.append(decode(model, ids, True)), LENGTH - READ),
        "feed in blocks": (lambda: feed(model, fresh(), ids, mask, READ), LENGTH),
        "forward and backward": (plain, LENGTH),
        "replay and backward": (replayed, LENGTH),
    }
    for name, (run, tokens) in tasks.items():
        seconds = timed(run)
        share = sum(spent) / len(spent) / seconds.median if spent and name == "decode, recorded" else None
        row = Cost(
            what=name, seconds=seconds, tokens_per_second=round(ROWS * tokens / seconds.median, 1), share=share,
            record_bytes=record.nbytes, made_with=made,
        )  # fmt: skip
        print(json.dumps(row.to_dict()), flush=True)
    del held


if __name__ == "__main__":
    main()
