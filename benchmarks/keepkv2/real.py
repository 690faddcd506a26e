"""A real instruct model: recall of facts in English prose, and what compression changes where answers are read.

    python -m benchmarks.keepkv2.real --model PATH --work DIR --name rivals [--items 10] [--tasks ...] [--methods ...]
    python -m benchmarks.keepkv2.real --model PATH --work DIR --name ours --methods keepkv2    # more, next to those
    python -m benchmarks.keepkv2.real --work DIR --out benchmarks/keepkv2/results            # the tables alone

PATH: a folder as transformers reads it. Tasks in plain English inside the model's chat template; choose those that it
answers with the full cache. Each context is compressed before its questions are seen. Resumes what is unfinished in
``DIR/NAME``; full, random and snapkv always run. In bfloat16, which this processor multiplies fastest; one thread.

    recall    the share of questions answered: ``DIR/NAME/recall``
    fidelity  KL to the full cache and error of attention outputs over true questions and answers, and over a text that
              simply goes on (task ``continuation``): ``DIR/NAME/fidelity-TASK``, see ``fidelity.py``
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import argparse
import random
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from keepkv import tasks
from keepkv.cli.arguments import variant
from keepkv.evaluation.rows import ITEMS
from keepkv.evaluation.runner import evaluate
from keepkv.evaluation.setup import Setup
from keepkv.measure import bootstrap
from keepkv.measure.files import read_lines
from keepkv.tasks import perplexity
from keepkv.tasks.base import Count, Item, Question, Task

from . import fidelity
from .plan import bare, of_bytes

TASKS = ("niah-multikey-1", "niah-multikey-2")
METHODS = (
    "keydiff", "adakv:score=keydiff", "expected-attention", "kvzip", "attention-matching", "reskv:score=keydiff",
    "keepkv",
)  # fmt: skip
BUDGETS = (0.1, 0.2, 0.3)
CONTINUATION = "continuation"
SLACK = 8  # tokens of a reply beyond those of the answer: it may begin with other words


def build(rng: random.Random, count: Count, length: int) -> Item:
    """The perplexity task, whose first word is given as the prompt is elsewhere."""
    item = perplexity.build(rng, count, length)
    first, _, rest = item.questions[0].answer.strip().partition(" ")
    return Item(item.context, (Question(f" {first}", f" {rest}"),), framed=True)  # no chat: the text goes on


def setup(a: argparse.Namespace, names: tuple[str, ...], items: int) -> Setup:
    return Setup(
        model=a.model.name, tasks=names, variants=tuple(map(variant, a.methods)), budgets=of_bytes(a.budgets),
        lengths=(a.length,), items=items, batch=a.batch, plain=True, slack=SLACK,
    )  # fmt: skip


def run(a: argparse.Namespace) -> None:
    """Both parts, or what is left of them."""
    torch.set_num_threads(1)
    tasks.register(Task(CONTINUATION, "a text goes on", build, hint="", asks=False))
    model = AutoModelForCausalLM.from_pretrained(a.model, dtype=torch.bfloat16).eval()
    tokenizer = AutoTokenizer.from_pretrained(a.model)
    began = time.monotonic()
    evaluate(model, tokenizer, setup(a, tuple(a.tasks), a.items), made(a.work / a.name / "recall"))
    print(f"recall: {time.monotonic() - began:.0f} s", flush=True)
    for name in (*a.tasks, CONTINUATION) if a.fidelity_items else ():
        chosen = setup(a, (name,), min(a.items, a.fidelity_items))
        fidelity.evaluate(model, tokenizer, chosen, made(a.work / a.name / f"fidelity-{name}"))
        print(f"fidelity, {name}: {time.monotonic() - began:.0f} s", flush=True)


def made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def table(work: Path, part: str, measure: str) -> str:
    """``measure`` by method and budget, a column for each task, with half of its 95 % interval over contexts."""
    cells: dict[tuple[Any, str], dict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    for folder in sorted(work.glob(f"*/{part}*")):
        for row in read_lines(folder, ITEMS):
            if row["error"] is None:
                cells[bare(row["budget"]), row["method"]][row["task"]][row["seed"]] = row[measure]
    names = list(dict.fromkeys(task for x in cells.values() for task in x))
    lines = [
        f"\n## {part}: {measure}\n",
        f"| budget | method | {' | '.join(names)} |",
        "|---|---|" + "---:|" * len(names),
    ]
    for (budget, method), of in sorted(cells.items(), key=lambda cell: (-cell[0][0], cell[0][1])):
        found = [bootstrap(list(of[name].values())) if of[name] else None for name in names]
        said = [
            "" if x is None else f"{x.mean:.3f} ± {((x.high or x.mean) - (x.low or x.mean)) / 2:.3f}" for x in found
        ]
        lines.append(f"| {budget} | {method} | {' | '.join(said)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="left out: only the tables of what is there")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--name", default="rivals", help="of a folder in --work")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    parser.add_argument("--budgets", nargs="+", type=float, default=list(BUDGETS))
    parser.add_argument("--items", type=int, default=10, help="contexts of a task")
    parser.add_argument("--fidelity-items", type=int, default=10, help="of them, where tokens are compared; 0: none")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=5, help="contexts read together")
    parser.add_argument("--out", type=Path, help="where the tables go; else they are printed")
    a = parser.parse_args()
    if a.model:
        run(a)
    parts = (("recall", "score"), ("fidelity", "answer_kl"), ("fidelity", "kl"), ("fidelity", "output_error"))
    text = "# A real model\n" + "".join(table(a.work, *part) for part in parts)
    if a.out:
        a.out.mkdir(parents=True, exist_ok=True)
        (a.out / "real.md").write_text(text)
    else:
        print(text)


if __name__ == "__main__":
    main()
