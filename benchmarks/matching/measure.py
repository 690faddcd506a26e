"""Which reference queries Attention Matching should match: past ones, or those of rehearsed questions.

    python -m benchmarks.matching.measure [--items 2] [--out benchmarks/matching/results]

The embedded model reads contexts of some tasks, is compressed before their questions are seen, and is fed these and
their true answers. Written are the error of attention outputs and the KL of the next token against the full cache.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.keepkv2.fidelity import AnswerRow, Reference, compare, reference
from benchmarks.keepkv2.plan import foreign
from keepkv.cli.load import load
from keepkv.core.when import When
from keepkv.engine.passes.rehearse import rehearse
from keepkv.evaluation.setup import Setup, Unit, Variant
from keepkv.evaluation.unit import build, make_cache, within
from keepkv.measure import MadeWith, bootstrap
from keepkv.tasks.asking import Encoded, likely, pad, read

TASKS = ("niah-multikey-1", "qa-1", "variable-tracking", "common-words")
BUDGETS = ("10%bytes", "20%bytes")
BEGUN = ("\nWhat", "\nWhat is", "\nWhich", "\nWho", "\nHow many", "\nWhat is the code of", "\nWhat does", "\nWhat are")
AM = "attention-matching"
# What is shown: method, its options, and what it rehearses.
CASES: tuple[tuple[str, str, dict[str, Any], str], ...] = (
    ("snapkv", "snapkv", {}, ""),
    ("past queries", AM, {}, ""),
    ("text read again", AM, {"rehearsed": True}, "text"),
    ("and questions it asks itself", AM, {"rehearsed": True}, "itself"),
    ("and questions of other kinds", AM, {"rehearsed": True}, "foreign"),
    ("the same, values drawn to 0", AM, {"rehearsed": True, "prior": "zero", "ridge": 1e-4}, "foreign"),
    ("the same, one budget for all heads", AM, {"rehearsed": True, "allocate": "pooled"}, "foreign"),
    ("keepkv2, rehearsed", "keepkv2", {"rehearsed": True}, "foreign"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=2, help="contexts of each task")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    a = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = load(None, "cpu")
    variants = tuple(Variant(method, options) for _, method, options, _ in CASES)
    setup = Setup(
        model="embedded", tasks=TASKS, variants=variants, budgets=BUDGETS, lengths=(a.length,), items=a.items,
        seeds=(7,), sinks=4, window=16,
    )  # fmt: skip
    found: dict[str, list[AnswerRow]] = defaultdict(list)
    made: dict[str, tuple[list[Encoded], Reference]] = {}
    for unit in (unit for unit in setup.units() if unit.variant in variants):
        if unit.task not in made:
            made[unit.task] = reference(model, setup, unit, build(tokenizer, setup, unit))
        for label, _, _, told in (case for case in CASES if Variant(case[1], case[2]) == unit.variant):
            found[label] += measure(model, tokenizer, setup, unit, told, *made[unit.task])
            print(unit.task, label, flush=True)
    a.out.mkdir(parents=True, exist_ok=True)
    made_with = asdict(MadeWith.of(model, "embedded"))
    rows = {label: [row.to_dict() for row in rows] for label, rows in found.items()}
    (a.out / "cpu.json").write_text(json.dumps({"made_with": made_with, "rows": rows}, indent=1) + "\n")
    (a.out / "cpu.md").write_text(table(found, a.items, a.length))


@torch.inference_mode()
def measure(
    model: Any, tokenizer: Any, setup: Setup, unit: Unit, told: str, items: list[Encoded], full: Reference
) -> list[AnswerRow]:
    """A row for each budget and item, after rehearsing what ``told`` says."""
    cache = make_cache(model, setup, unit.variant, 1.0, unit.draw, When("deferred"))
    contexts = [item.context for item in items]
    mask = read(model, cache, contexts)
    if told:
        questions = likely(tokenizer, foreign(unit.task)) if told == "foreign" else ()
        begun = [tokenizer.encode(text, add_special_tokens=False) for text in BEGUN] if told == "itself" else ()
        rehearse(model, cache, *pad(contexts, model.device), questions=questions, begun=begun, new=16)
    return [
        row for budget in unit.budgets for row in compare(model, within(cache, unit, budget), mask, unit, budget, full)
    ]


def table(found: Mapping[str, list[AnswerRow]], items: int, length: int) -> str:
    """Means over tasks and items, with 95 % intervals over them."""
    lines = [
        f"Embedded model, {len(TASKS)} tasks × {items} contexts of {length} tokens, shares of bytes; 95 % intervals",
        "",
        "| matched | " + " | ".join(f"output error, {b[:3]}" for b in BUDGETS) + " | "
        + " | ".join(f"KL of answers, {b[:3]}" for b in BUDGETS) + " |",
        "|---" * (1 + 2 * len(BUDGETS)) + "|",
    ]  # fmt: skip
    for label, rows in found.items():
        cells = []
        for name in ("output_error", "answer_kl"):
            for budget in BUDGETS:
                x = bootstrap([getattr(row, name) for row in rows if str(row.budget) == budget])
                cells.append(f"{x.mean:.3f} [{x.low:.3f}, {x.high:.3f}]")
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
