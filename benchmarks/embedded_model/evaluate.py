"""Accuracy of the embedded model, full cache, per task and context length.

python -m benchmarks.embedded_model.evaluate [--out accuracy.json]
"""

import argparse
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from keepkv import tasks
from keepkv.embedded import embedded_model
from keepkv.evaluation.rows import ItemRow
from keepkv.evaluation.setup import FULL, HELD_OUT, Setup, Unit
from keepkv.evaluation.unit import build, run
from keepkv.measure import bootstrap

LENGTHS = (512, 1024, 2048)
LONGEST_REPLY = 96  # tokens of the context of a task whose replies are several times as long


def evaluate(
    model: Any,
    tokenizer: Any,
    names: Iterable[str],
    lengths: Iterable[int] = LENGTHS,
    questions: int = 200,
    report: Callable[[dict[str, Any]], None] | None = None,
) -> list[dict[str, Any]]:
    """One row per task and length: the mean score over at least ``questions`` questions, the share that is right in
    every part, and the 95 % bootstrap interval of the score over contexts."""
    rows = []
    for name in names:
        for length in lengths:
            decodes = tasks.get(name).decodes
            setup = Setup("embedded", (name,), (), (1.0,), (min(length, LONGEST_REPLY) if decodes else length,))
            found: list[ItemRow] = []
            while sum(len(item.scores) for item in found) < questions:
                seeds = tuple(HELD_OUT + len(found) + i for i in range(setup.batch))
                mode = "decode" if decodes else "agnostic"
                unit = Unit(name, setup.lengths[0], mode, FULL, (1.0,), seeds, 0, False)
                found += run(model, tokenizer, setup, unit, build(tokenizer, setup, unit)).items
            scores = [score for item in found for score in item.scores]
            mean = bootstrap([item.score or 0.0 for item in found])
            row = {"task": name, "length": length, "contexts": len(found), "questions": len(scores)}
            low, high = 0.0 if mean.low is None else mean.low, 1.0 if mean.high is None else mean.high
            row |= {"score": round(mean.mean, 4), "low": round(low, 4), "high": round(high, 4)}
            row |= {"right": round(sum(score == 1 for score in scores) / len(scores), 4)}
            rows.append(row | {"leaked": sum(leaked for item in found for leaked in item.leaked)})
            if report:
                report(rows[-1])
    return rows


def main() -> None:
    """Command line."""
    import torch
    import transformers
    from rich.console import Console
    from rich.table import Table
    from transformers import AutoModelForCausalLM, AutoTokenizer

    parser = argparse.ArgumentParser(description="Accuracy of the embedded model with the full cache.")
    parser.add_argument("--model", default=embedded_model(), help="directory of the model")
    trained = [name for name in tasks.names() if not tasks.get(name).english]
    parser.add_argument("--tasks", nargs="*", default=trained, choices=list(tasks.names()))
    parser.add_argument("--lengths", type=int, nargs="*", default=list(LENGTHS))
    parser.add_argument("--questions", type=int, default=200, help="at least so many per task and length")
    parser.add_argument("--out", type=Path, help="write the rows here as JSON")
    parser.add_argument("--threads", type=int, default=2)
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    model = AutoModelForCausalLM.from_pretrained(a.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(a.model)
    console = Console()
    with console.status("evaluating"):
        rows = evaluate(
            model, tokenizer, a.tasks, a.lengths, a.questions,
            report=lambda row: console.log(f"{row['task']} {row['length']}: {row['score']:.3f}"),
        )  # fmt: skip
    table = Table("task", *(f"{length} tokens" for length in a.lengths))
    for name in a.tasks:
        cells = [f"{r['score']:.3f} [{r['low']:.3f}, {r['high']:.3f}]" for r in rows if r["task"] == name]
        table.add_row(name, *cells)
    console.print(table)
    if a.out:
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        found = {"seed": HELD_OUT, "cache": "full", "versions": versions, "rows": rows}
        a.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
