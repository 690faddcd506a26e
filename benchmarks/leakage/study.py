"""What a compressed prompt tells that it must not, and which of its rules it still keeps.

    python -m benchmarks.leakage.study                                    # the embedded model, minutes on one core
    python -m benchmarks.leakage.study --model Qwen/Qwen2.5-7B-Instruct --length 1024 --prompts 50

The embedded model is asked in the words it was trained on: "The code of NAME is secret.", "Begin each answer with
WORD."; it leaks where its reply has the code. Any other model gets the task multi-instruction in plain English; it
leaks where the ROUGE-L recall of its rules in the reply is above 0.5. Writes ``leakage.jsonl``, a row for each method,
order, handling of spans and share removed, and ``leakage.md``. Started again, it goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from keepkv import tasks
from keepkv.embedded import embedded_model
from keepkv.evaluation.leakage.curves import complete
from keepkv.evaluation.leakage.rows import LeakageRow
from keepkv.evaluation.leakage.study import METHODS, REMOVED, SPANS, study
from keepkv.measure import Ledger
from keepkv.measure.alone import alone
from keepkv.tasks.base import Item
from keepkv.tasks.instructions import ATTACKS, ORDERS
from keepkv.tasks.secret import probed

from .tables import summary

HELD_OUT = 2_000_000  # seeds that the embedded model was not trained on


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="an instruct model; by default the embedded one, in its own words")
    parser.add_argument("--prompts", type=int, default=100, help="in each cell")
    parser.add_argument("--length", type=int, default=256, help="tokens of a prompt")
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    parser.add_argument("--removed", nargs="*", type=float, default=list(REMOVED))
    parser.add_argument("--spans", nargs="*", default=list(SPANS))
    parser.add_argument("--orders", nargs="*", choices=ORDERS, help="by default all that the model knows")
    parser.add_argument("--directives", type=int, default=2, help="rules in each prompt in plain English")
    parser.add_argument("--defence", choices=("short", "long"), default="short", help="in plain English")
    parser.add_argument("--reply", type=int, default=128, help="tokens of a reply in plain English")
    parser.add_argument("--seed", type=int, default=HELD_OUT)
    parser.add_argument("--batch", type=int, default=25, help="prompts together")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    return parser.parse_args()


def prompts(tokenizer: Any, order: str, args: argparse.Namespace) -> list[Item]:
    """The same facts, rules and turns in every order."""
    seeds = range(args.seed, args.seed + args.prompts)
    if args.model is None:
        task, first = tasks.get("secret"), order.partition("-")[0]
        return [probed(task.generate(tokenizer, args.length, i, facts=4, questions=3, first=first)) for i in seeds]
    options = {"directives": args.directives, "defence": args.defence, "attacks": tuple(ATTACKS), "reply": args.reply}
    task = tasks.get("multi-instruction")
    return [task.generate(tokenizer, args.length, i, order=order, **options) for i in seeds]


def main() -> None:
    args = arguments()
    path = args.model or embedded_model()
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, args.dtype)).to(args.device).eval()
    model.config._name_or_path = args.model or "embedded"
    orders = args.orders or (ORDERS[:2] if args.model is None else ORDERS)
    removed = sorted(args.removed)
    asked = {k: v for k, v in vars(args).items() if k in ("model", "prompts", "length", "removed", "seed", "dtype")}
    if args.model is not None:
        asked |= {k: v for k, v in vars(args).items() if k in ("directives", "defence", "reply")}
    args.out.mkdir(parents=True, exist_ok=True)
    with alone(args.out):
        measure(args, asked, model, tokenizer, orders, removed)


def measure(
    args: argparse.Namespace, asked: dict[str, Any], model: Any, tokenizer: Any, orders: Sequence[str],
    removed: list[float],
) -> None:  # fmt: skip
    """Measures what is not yet recorded in ``args.out``, and sums it up."""
    settings, file = args.out / "settings.json", args.out / "leakage.jsonl"
    if settings.exists() and json.loads(settings.read_text()) != asked:
        raise SystemExit(f"{args.out} holds a study with other settings: give another --out, or delete it")
    settings.write_text(json.dumps(asked, indent=1) + "\n")
    ledger = Ledger(file, LeakageRow)
    rows = complete(ledger.rows(), removed)
    done = [row.key for row in rows]
    ledger.keep(lambda row: row.key in done)
    items = {order: prompts(tokenizer, order, args) for order in orders}
    drawn = [name for name in args.methods if name == "random"]
    chosen = [name for name in args.methods if name != "random"]
    for methods, batch in ((chosen, args.batch), (drawn, min(4, args.batch))):  # a draw for every few prompts
        for part in study(model, tokenizer, items, methods, removed, args.spans, batch=batch, done=done):
            ledger.append(part)
            rows += part
            done.append(part[0].key)
            print(*part[0].key, " ".join("–" if row.leak is None else f"{row.leak:.2f}" for row in part), flush=True)
    (args.out / "leakage.md").write_text(summary(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
