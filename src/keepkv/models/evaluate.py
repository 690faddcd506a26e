"""Accuracy of the embedded model, full cache, per task and context length: ``python -m keepkv.models.evaluate``."""

import argparse
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from keepkv import tasks
from keepkv.metrics import wilson
from keepkv.models import embedded_model

LENGTHS = (512, 1024, 2048)
HELD_OUT = 1_000_000  # seeds from here on are for evaluation


def evaluate(
    model: Any,
    tokenizer: Any,
    names: Iterable[str],
    lengths: Iterable[int] = LENGTHS,
    questions: int = 200,
    seed: int = HELD_OUT,
    report: Callable[[dict[str, Any]], None] | None = None,
) -> list[dict[str, Any]]:
    """One row per task and length: exact answers among at least ``questions`` questions, and the 95 % interval."""
    rows = []
    for name in names:
        for length in lengths:
            right = total = leaks = item = 0
            while total < questions:
                made = tasks.get(name).generate(tokenizer, length, seed + item)
                scores = tasks.score_item(model, tokenizer, made)
                right += sum(score.correct for score in scores)
                leaks += sum(score.leaked for score in scores)
                total += len(scores)
                item += 1
            low, high = wilson(right, total)
            row = {"task": name, "length": length, "contexts": item, "questions": total, "right": right}
            row |= {"accuracy": round(right / total, 4), "low": round(low, 4), "high": round(high, 4)}
            rows.append(row | {"leaked": leaks})
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
    parser.add_argument("--seed", type=int, default=HELD_OUT)
    parser.add_argument("--out", type=Path, help="write the rows here as JSON")
    parser.add_argument("--threads", type=int, default=2)
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    model = AutoModelForCausalLM.from_pretrained(a.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(a.model)
    console = Console()
    with console.status("evaluating"):
        rows = evaluate(
            model, tokenizer, a.tasks, a.lengths, a.questions, a.seed,
            report=lambda row: console.log(f"{row['task']} {row['length']}: {row['accuracy']:.3f}"),
        )  # fmt: skip
    table = Table("task", *(f"{length} tokens" for length in a.lengths))
    for name in a.tasks:
        cells = [f"{r['accuracy']:.3f} [{r['low']:.3f}, {r['high']:.3f}]" for r in rows if r["task"] == name]
        table.add_row(name, *cells)
    console.print(table)
    if a.out:
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        found = {"seed": a.seed, "cache": "full", "versions": versions, "rows": rows}
        a.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
