"""What eviction while decoding keeps of facts that the reply itself stated, every method with the prompt kept whole.

    python -m benchmarks.long_decode.run --items 48 --out benchmarks/long_decode/results

A context of ``niah-multikey-1`` is read up to its last ``REPLY`` tokens: that is the prompt. The others are fed one by
one, as if the model had written them, and every ``EVERY`` of them the cache is compressed. Then it is asked for each
fact that was stated behind the prompt, on a copy that compresses no more. A row is one context, method and budget; a
run that is repeated goes on.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from keepkv import tasks
from keepkv.calibrate import batches, calibrate
from keepkv.cli.arguments import variant
from keepkv.core.when import When
from keepkv.embedded import embedded_model
from keepkv.engine.cache import Cache
from keepkv.evaluation.answers import separately
from keepkv.evaluation.setup import FULL, HELD_OUT, Setup, Variant
from keepkv.measure.environment import MadeWith
from keepkv.measure.ledger import Ledger
from keepkv.measure.rows import INLINE, Row
from keepkv.methods import method_info
from keepkv.metrics import kl
from keepkv.spans import SpanPolicy
from keepkv.tasks.asking import Asked, Encoded, encode, pad, read, step

METHODS = (
    "random-attention", "streaming-llm", "snapkv-decode", "morphkv", "r-kv", "r-kv:lam=0.5", "g-kv", "g-kv:lam=1",
    "h2o", "tova", "raas", "protected-lru", "lazy-eviction", "vase", "triattention", "r-kv:lam=0", "keydiff",
    "keepkv2:allocate=uniform",
)  # fmt: skip
BUDGETS = (96, 144)  # slots per head, the prompt's included
TASK, LENGTH, REPLY, EVERY, SINKS, WINDOW, BATCH = "niah-multikey-1", 256, 208, 16, 4, 8, 16


@dataclass(frozen=True, kw_only=True)
class Recalled(Row):
    """One context with one method at one budget.

    seed: of the context. tokens: of the prompt. kl: mean over the fed tokens of KL(full cache ‖ this one), in nats.
    ages: tokens between each fact and the question, of the facts behind the prompt. right: whether each was recalled.
    """

    seed: int
    method: str
    budget: int
    tokens: int
    kl: float
    ages: list[int]
    right: list[bool]
    made_with: MadeWith = field(metadata=INLINE)


def age(tokenizer: Any, item: Encoded, one: Asked) -> int:
    """Tokens of the context behind the fact that ``one`` asks for."""
    text = item.item.context
    place = text.find(one.question.answer.strip())
    assert place >= 0, one.question
    return len(tokenizer.encode(text[place:], add_special_tokens=False))


def make(model: Any, one: Variant, budget: Any, draw: int, **options: Any) -> Cache:
    """A cache of ``one`` that keeps the prompt, and the same first and last tokens as every other."""
    known = method_info(one.method).options
    given = {"sinks": SINKS, "window": WINDOW, "when": When(every=EVERY), **one.options}
    mine = {name: x for name, x in given.items() if name in known}
    return Cache(model, one.method, budget, seed=draw, spans=SpanPolicy([], prompt=True), **mine, **options)


def told(model: Any, cache: Cache, items: Sequence[Encoded]) -> tuple[Tensor, Tensor]:
    """Feeds the contexts; returns logits (REPLY,B,V) behind each fed token, and the mask."""
    mask = read(model, cache, [item.context[:-REPLY] for item in items])
    ids = pad([item.context[-REPLY:] for item in items], model.device)[0]
    logits = []
    for token in ids.split(1, dim=1):
        mask = torch.cat((mask, torch.ones_like(token)), 1)
        logits.append(step(model, cache, token, mask)[:, -1])
    return torch.stack(logits), mask


@torch.inference_mode()
def measure(model: Any, tokenizer: Any, seeds: Sequence[int], methods: Sequence[Variant], made: MadeWith,
            calibration: Any) -> Iterator[Recalled]:  # fmt: skip
    """A row for each context, method and budget, the full cache first."""
    items = [encode(tokenizer, tasks.get(TASK).generate(tokenizer, LENGTH, seed)) for seed in seeds]
    ages = [[age(tokenizer, item, one) for one in item.asked] for item in items]
    truth = None
    for one in (FULL, *methods):
        for budget in BUDGETS if one != FULL else (0,):
            extra = {"calibration": calibration} if one.method == "triattention" else {}
            cache = make(model, one, budget or 1.0, seeds[0], **extra)
            logits, mask = told(model, cache, items)
            truth = logits if truth is None else truth
            assert one == FULL or cache.report().compressed
            cache.compressing = False
            scores = separately(model, tokenizer, cache, mask, items, 64)
            apart = kl(truth, logits).mean(0).tolist()
            for i, seed in enumerate(seeds):
                kept = [(n, x.correct) for n, x in zip(ages[i], scores[i], strict=True) if n <= REPLY]
                yield Recalled(
                    seed=seed, method=one.label, budget=budget, tokens=len(items[i].context) - REPLY, kl=apart[i],
                    ages=[n for n, _ in kept], right=[x for _, x in kept], made_with=made,
                )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=48)
    parser.add_argument("--method", action="append", help="these alone; repeatable")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    given = parser.parse_args()
    torch.set_num_threads(1)
    path = embedded_model()
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    setup = Setup("embedded", (TASK,), tuple(map(variant, given.method or METHODS)), BUDGETS)
    made = MadeWith.of(model, setup.model)
    texts = [tasks.get(TASK).generate(tokenizer, LENGTH, seed).context for seed in range(64)]  # others than are asked
    calibration = calibrate("triattention", model, batches(tokenizer, texts, 16_384, LENGTH))
    given.out.mkdir(parents=True, exist_ok=True)
    ledger = Ledger(given.out / "rows.jsonl", Recalled)
    done = {(row.seed, row.method) for row in ledger.rows()}
    for start in range(0, given.items, BATCH):
        seeds = [HELD_OUT + i for i in range(start, min(start + BATCH, given.items))]
        methods = [one for one in setup.variants if (seeds[0], one.label) not in done]
        if methods:
            rows = measure(model, tokenizer, seeds, methods, made, calibration)
            ledger.append([row for row in rows if (row.seed, row.method) not in done])
            print(f"{start + len(seeds)} of {given.items} contexts", flush=True)


if __name__ == "__main__":
    main()
