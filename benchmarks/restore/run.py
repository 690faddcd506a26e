"""Do restore slots earn their place in the budget? Trained on some tasks, judged on those and on others.

    python -m benchmarks.restore.run [--seeds 3] [--contexts 12] [--steps 400]

Restore tokens of the embedded model are trained for a method on texts of the tasks ``TAUGHT``. Then contexts that were
never seen, of these tasks and of others, are read, compressed to the same slots with and without restore slots, and
asked. A row says how far the next tokens are from the full cache's over the right answers, and how many questions
are answered. Calibrations lie beside the rows; a run that is repeated goes on.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import keepkv
from benchmarks.defaults.run import answered, forced
from keepkv import tasks
from keepkv.calibrate import Exchange, calibrate
from keepkv.calibrate.restore import with_window
from keepkv.engine.passes.again import look_again
from keepkv.measure.environment import MadeWith
from keepkv.measure.ledger import Ledger
from keepkv.measure.rows import INLINE, Row
from keepkv.metrics import kl
from keepkv.tasks.asking import Encoded, compressed, encode, pad, read, reply, rows_of

METHODS = ("keepkv2", "kvzip")
TAUGHT = ("niah-multikey-1", "notes")
OTHERS = ("niah-multiquery", "niah-multivalue", "variable-tracking", "qa-1", "needle")
BUDGETS = (0.06, 0.1)
LENGTH, TEXTS, SLOTS, HELD_OUT = 512, 60, 8, 1_000_000


@dataclass(frozen=True, kw_only=True)
class Answered(Row):
    """What one cache says about one context. budget: share of the tokens; 1: the full cache. restored: whether restore
    slots are in the budget. kl: of each question, the mean over the answer's tokens of KL(full cache ‖ this one), in
    nats. right: whether the greedy reply has the answer. seed: of training, and of the context."""

    task: str
    method: str
    seed: int
    context: int
    budget: float
    restored: bool
    kl: list[float]
    right: list[bool]
    made_with: MadeWith = field(metadata=INLINE)


def items(tokenizer: Any, names: tuple[str, ...], numbers: range) -> Iterator[Encoded]:
    for i in numbers:
        yield encode(tokenizer, tasks.get(names[i % len(names)]).generate(tokenizer, LENGTH, i))


def trained(model: Any, tokenizer: Any, method: str, seed: int, steps: int, out: Path) -> keepkv.Calibration:
    """Restore tokens for ``method``, from the file where a former run left them."""
    path = out / f"{method}-{seed}.safetensors"
    if not path.exists():
        made = list(items(tokenizer, TAUGHT, range(seed * TEXTS, (seed + 1) * TEXTS)))
        texts = [torch.tensor([one.context]) for one in made]
        asked = [[Exchange(x.prompt, x.answer) for x in one.asked] for one in made]
        options = dict(method=method, budgets=BUDGETS, slots=SLOTS, steps=steps, seed=seed)
        found = calibrate("restore", model, texts, asked=asked, **options)
        print("\n".join(found.made_with["says"]), flush=True)
        found.save(path)
    return keepkv.Calibration.load(path)


def measure(model: Any, tokenizer: Any, item: Encoded, learned: keepkv.Calibration, **facts: Any) -> Iterator[Answered]:
    """Rows of the full cache and of each budget, without and with restore slots."""
    answers = [one.answer for one in item.asked]
    truth = None
    for restored in (False, True):
        cache = keepkv.Cache(model, with_window(facts["method"], SLOTS if restored else 0), 1.0)
        mask = read(model, cache, [item.context])
        look_again(model, cache, *pad([item.context], model.device))
        if truth is None:
            truth = forced(model, cache.copy(), mask, item, answers)
            yield said(model, tokenizer, cache.copy(), mask, item, truth, budget=1.0, restored=False, **facts)
        if restored:
            mask = keepkv.restore_slots(model, cache, learned, mask)
        for budget in BUDGETS:
            slots = round(budget * len(item.context))  # the same for both, restore slots among them
            small = compressed(cache, slots)
            yield said(model, tokenizer, small, mask, item, truth, budget=budget, restored=restored, **facts)


def said(model: Any, tokenizer: Any, cache: Any, mask: Any, item: Encoded, truth: Any, **facts: Any) -> Answered:
    """The row of ``cache``, which is used up."""
    cache.compressing = False
    found = forced(model, cache, mask, item, [one.answer for one in item.asked])
    twin, own = rows_of(cache, mask, [0] * len(item.asked))
    limit = max(one.limit for one in item.asked)
    replies = reply(model, twin, own, [one.prompt for one in item.asked], limit, tokenizer.eos_token_id)[0].tolist()
    far = [float(kl(a, b).mean()) for a, b in zip(truth, found, strict=True)]
    return Answered(kl=far, right=answered(tokenizer, item, replies), **facts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", action="append", choices=METHODS, help="repeatable; all if absent")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--contexts", type=int, default=12, help="of each task and seed")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    given = parser.parse_args()
    path = keepkv.embedded_model()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    given.out.mkdir(parents=True, exist_ok=True)
    ledger, made_with = Ledger(given.out / "rows.jsonl", Answered), MadeWith.of(model, "embedded")
    done = {(row.method, row.seed, row.task, row.context) for row in ledger.rows()}
    for seed in range(given.seeds):
        for method in given.method or METHODS:
            learned = trained(model, tokenizer, method, seed, given.steps, given.out)
            for task in (*TAUGHT, *OTHERS):
                for context in range(given.contexts):
                    if (method, seed, task, context) in done:
                        continue
                    number = HELD_OUT + 1000 * seed + context
                    item = next(items(tokenizer, (task,), range(number, number + 1)))
                    facts = dict(task=task, method=method, seed=seed, context=context, made_with=made_with)
                    with torch.inference_mode():
                        ledger.append(list(measure(model, tokenizer, item, learned, **facts)))
                print(method, seed, task, flush=True)


if __name__ == "__main__":
    main()
