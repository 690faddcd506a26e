"""The scores of every method that compresses a prompt, on the offline tasks at equal bytes, on small models.

    python -m benchmarks.zoo.run --model NAME=FOLDER [--calibration FILE …] [--mode agnostic] [--contexts 3]

A context is read once for each arm and compressed, on copies, to shares of the bytes of a plain cache in bfloat16.
agnostic: no question is known then, and each is asked on a copy. aware: the question stands behind the text when it is
compressed, all but its last token. Only questions that the full cache answers are put to the others; a reply is right
where the task's own rule says so. Every arm keeps the same first and last tokens. ``--calibration`` is what
``keepkv calibrate`` wrote for the model; arms that need one are left out without. A run that is repeated goes on.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.frontier.run import SUITE
from benchmarks.real_models.float32 import multiply_in_float32
from keepkv import tasks
from keepkv.core.when import When
from keepkv.embedded import embedded_model
from keepkv.evaluation.answers import separately
from keepkv.evaluation.setup import HELD_OUT, MODES, Setup, Variant
from keepkv.evaluation.unit import ROWS, look_again, make_cache
from keepkv.measure.environment import MadeWith
from keepkv.measure.ledger import Ledger
from keepkv.measure.rows import INLINE, Row
from keepkv.tasks.asking import Encoded, compressed, encode, read

from .arms import CODED, FULL, STRONG, variants, zoo

AGNOSTIC, AWARE = MODES
BUDGETS = (0.05, 0.1, 0.2, 0.3)
TASKS = (*SUITE, "niah-multikey-3", "niah-multiquery", "qa-2")
LENGTH = 1024


@dataclass(frozen=True, kw_only=True)
class Scored(Row):
    """What one arm answers about one context.

    mode: agnostic or aware. questions: that were put to the full cache. budgets: shares of the bytes of a plain cache
    that were asked for; 1 for the full cache. ratio: the share that is held, of each. right: of each, whether the
    reply to each question that the full cache answers is right. seed: of the context, and of what draws by chance.
    """

    task: str
    mode: str
    context: int
    tokens: int
    arm: str
    questions: int
    budgets: list[float]
    ratio: list[float]
    right: list[list[bool]]
    seed: list[int]
    made_with: MadeWith = field(metadata=INLINE)


def texts(item: Encoded, mode: str) -> list[Encoded]:
    """What is read before it is compressed, and what is asked after."""
    return [item] if mode == AGNOSTIC else item.in_sight()


def answers(
    model: Any, tokenizer: Any, items: list[Encoded], arm: Variant, budgets: tuple[float, ...], seed: int = 0
) -> Iterator[tuple[float, list[bool]]]:
    """At each of ``budgets``: the share of the bytes that is held, and which replies are right."""
    rows = [item.context for item in items]
    cache = make_cache(model, Setup("", TASKS, (), (1.0,)), arm, 1.0, seed, When("deferred"))
    mask = read(model, cache, rows)
    look_again(model, cache, rows)
    for budget in budgets:
        small = compressed(cache, 1.0 if budget == 1 else f"{100 * budget:g}%bytes")
        ratio = small.report().ratio
        scores = separately(model, tokenizer, small, mask, items, ROWS)
        yield ratio, [one.correct for scored in scores for one in scored]


def measure(model: Any, tokenizer: Any, item: Encoded, arms: dict[str, Variant], **facts: Any) -> Iterator[Scored]:
    """A row for each arm; none but that of the full cache where it answers nothing."""
    items = texts(item, facts["mode"])
    ((_, known),) = answers(model, tokenizer, items, Variant(FULL), (1.0,))
    items = texts(replace(item, asked=tuple(one for one, x in zip(item.asked, known, strict=True) if x)), facts["mode"])
    for name, one in arms.items():
        if any(known) or name == FULL:
            budgets = (1.0,) if one.method == FULL else BUDGETS
            found = answers(model, tokenizer, items, one, budgets, facts["context"]) if any(known) else [(1.0, [])]
            ratio, right = zip(*found, strict=True)
            yield Scored(
                tokens=len(item.context), arm=name, questions=len(known), budgets=list(budgets), ratio=list(ratio),
                right=list(right), seed=[HELD_OUT + facts["context"], facts["context"]], **facts,
            )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="NAME=FOLDER, or NAME=EMBEDDED")
    parser.add_argument("--calibration", action="append", default=[], help="a file of keepkv calibrate; repeatable")
    parser.add_argument("--arm", action="append", help="repeatable; all of the study if absent")
    parser.add_argument("--task", action="append", help="repeatable; all of the study if absent")
    parser.add_argument("--mode", choices=MODES, default=AGNOSTIC)
    parser.add_argument("--questions", type=int, default=8, help="of a context at most")
    parser.add_argument("--first", type=int, default=0, help="number of the first context")
    parser.add_argument("--contexts", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    given = parser.parse_args()
    torch.set_num_threads(1)
    name, _, path = given.model.partition("=")
    path = embedded_model() if path == "EMBEDDED" else path
    arms = variants(given.arm or (FULL, *zoo(), *STRONG, *CODED), given.calibration)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
    multiply_in_float32(model)
    tokenizer = AutoTokenizer.from_pretrained(path)
    given.out.mkdir(parents=True, exist_ok=True)
    ledger, made_with = Ledger(given.out / f"{name}.jsonl", Scored), MadeWith.of(model, name)
    done = {(row.task, row.mode, row.context, row.arm) for row in ledger.rows()}
    with torch.inference_mode():
        for context, task in product(range(given.first, given.first + given.contexts), given.task or TASKS):
            left = {arm: one for arm, one in arms.items() if (task, given.mode, context, arm) not in done}
            if left:
                item = encode(tokenizer, tasks.get(task).generate(tokenizer, LENGTH, HELD_OUT + context))
                item = replace(item, asked=item.asked[: given.questions])
                facts = {"task": task, "mode": given.mode, "context": context, "made_with": made_with}
                ledger.append(measure(model, tokenizer, item, left, **facts))
            print(name, given.mode, context, task, len(left), "arms", flush=True)


if __name__ == "__main__":
    main()
