"""Which score, key and threshold KeepKV should default to: measured on the embedded model, before questions are known.

    python -m benchmarks.evaluation.keepkv_choices [--contexts 8] [--out DIRECTORY]

Each context (the shipped document, twelve facts woven in) is compressed once per method and budget; then its questions
are asked together on copies of that cache, teacher-forced. Writes ``keepkv_choices.json`` and ``.md``: accuracy over
questions, KL to the full cache on the answers, and for each merge the paired difference in accuracy to the same
eviction without merging, with a 95 % bootstrap interval over contexts.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import keepkv
from keepkv.embedded import embedded_model
from keepkv.engine.versions import CACHE
from keepkv.methods import METHODS
from keepkv.methods.own.keepkv import keepkv as keepkv_method
from keepkv.reduce.drop import Drop
from keepkv.tasks import demo_document

BUDGETS = (0.04, 0.06, 0.1, 0.2, 0.4)
SCORES = ("keydiff", "snapkv", "expected-attention", "h2o")
MERGES: dict[str, dict[str, Any]] = {
    "fixed, 0.8": {"key": "fixed", "threshold": 0.8},
    "fixed, all": {"key": "fixed", "threshold": None},
    "bias, 0.8": {"key": "bias", "threshold": 0.8},
    "zip, 0.8 (paper)": {"key": "zip", "threshold": 0.8},
    "code, 0.8": {"key": "code", "threshold": 0.8},
}


def answers(model: Any, tokenizer: Any, cache: keepkv.Cache, questions: Any) -> list[Tensor]:
    """Log-probabilities (answer tokens, vocabulary) of each question's answer, all questions in one padded batch."""
    encoded = [tokenizer.encode(q.prompt + q.answer, add_special_tokens=False) for q in questions]
    width = max(map(len, encoded))
    ids = torch.tensor([[0] * (width - len(x)) + x for x in encoded])
    mask = torch.tensor([[0] * (width - len(x)) + [1] * len(x) for x in encoded])
    seen = cache.get_seq_length()
    batch = cache.copy()
    batch.compressing = False
    batch.batch_repeat_interleave(len(questions))
    mask = torch.cat((torch.ones(len(questions), seen, dtype=torch.long), mask), dim=1)
    positions = (mask.cumsum(-1) - 1)[:, -width:].clamp_min(0)
    logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, **{CACHE: batch}).logits
    lengths = [len(tokenizer.encode(q.answer, add_special_tokens=False)) for q in questions]
    return [logits[i, -n - 1 : -1].log_softmax(-1) for i, n in enumerate(lengths)]


def variants() -> dict[str, tuple[str, str, keepkv.Method]]:
    """Label → (score, merge, method)."""
    found = {}
    for score in SCORES:
        plain = replace(keepkv_method(score=score), reduce=Drop())
        found[f"{score}: evict"] = (score, "evict", plain)
        for label, options in MERGES.items():
            found[f"{score}: {label}"] = (score, label, keepkv_method(score=score, **options))
    found["random: evict"] = ("random", "evict", METHODS.build("random"))
    return found


def interval(differences: Tensor, seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval of the mean of per-context differences."""
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randint(len(differences), (2000, len(differences)), generator=generator)
    low, high = differences[draws].mean(-1).quantile(torch.tensor([0.025, 0.975], dtype=differences.dtype)).tolist()
    return low, high


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=int, default=8)
    parser.add_argument("--characters", type=int, default=4000, help="length of a context")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(embedded_model())
    model = AutoModelForCausalLM.from_pretrained(embedded_model(), dtype=torch.float32).eval()
    right: dict[tuple[str, float], list[float]] = {}
    divergence: dict[tuple[str, float], list[float]] = {}
    tokens = []
    for seed in range(args.contexts):
        text, questions = demo_document(100 + seed, characters=args.characters)
        ids = torch.tensor([tokenizer.encode(text)])
        tokens.append(ids.shape[1])
        truth = [tokenizer.encode(q.answer, add_special_tokens=False) for q in questions]
        full = keepkv.Cache(model, "full")
        model(input_ids=ids, **{CACHE: full}, logits_to_keep=1)
        reference = answers(model, tokenizer, full, questions)
        runs: list[tuple[str, float, list[Tensor]]] = [("full", 1.0, reference)]
        for budget in BUDGETS:
            for label, (_, _, method) in variants().items():
                cache = keepkv.Cache(model, method, budget)
                model(input_ids=ids, **{CACHE: cache}, logits_to_keep=1)
                assert cache.report().compressed
                runs.append((label, budget, answers(model, tokenizer, cache, questions)))
        for label, budget, got in runs:
            hits = [x.argmax(-1).tolist() == want for x, want in zip(got, truth, strict=True)]
            kl = [(f.exp() * (f - x)).sum(-1).mean() for f, x in zip(reference, got, strict=True)]
            right.setdefault((label, budget), []).append(sum(hits) / len(hits))
            divergence.setdefault((label, budget), []).append(float(torch.stack(kl).mean()))
        print(f"context {seed + 1} of {args.contexts}: {tokens[-1]} tokens", flush=True)
    rows = []
    for (label, budget), scores in right.items():
        score, merge, _ = variants().get(label, (label, "", None))
        mean = torch.tensor(scores, dtype=torch.float64)
        row = {"score": score, "merge": merge, "budget": budget, "accuracy": mean.mean().item()}
        row["kl"] = sum(divergence[label, budget]) / len(scores)
        if merge not in ("", "evict"):
            differences = mean - torch.tensor(right[f"{score}: evict", budget], dtype=torch.float64)
            row["minus_evict"], row["interval"] = differences.mean().item(), interval(differences)
        rows.append(row)
    head = {
        "contexts": args.contexts, "questions": 12, "tokens": tokens, "seeds": [100 + i for i in range(args.contexts)],
        "device": "cpu", "torch": torch.__version__, "transformers": transformers.__version__,
        "keepkv": keepkv.__version__,
    }  # fmt: skip
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "keepkv_choices.json").write_text(json.dumps({**head, "rows": rows}, indent=1) + "\n")
    (args.out / "keepkv_choices.md").write_text(table(rows))
    print(table(rows))


def table(rows: list[dict[str, Any]]) -> str:
    """Accuracy and KL as a Markdown table, a line per score and merge, a column per budget."""
    lines = [
        "| score | leaving slots | " + " | ".join(f"{b:g}" for b in BUDGETS) + " |",
        "|" + "---|" * (2 + len(BUDGETS)),
    ]
    for score, merge in dict.fromkeys((r["score"], r["merge"]) for r in rows):
        cells = []
        for budget in BUDGETS:
            row = next((r for r in rows if (r["score"], r["merge"], r["budget"]) == (score, merge, budget)), None)
            cell = "" if row is None else f"{row['accuracy']:.3f} / {row['kl']:.2f}"
            if row is not None and "interval" in row:
                low, high = row["interval"]
                cell += f" ({row['minus_evict']:+.3f} [{low:+.3f}, {high:+.3f}])"
            cells.append(cell)
        if merge:
            lines.append(f"| {score} | {merge} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
