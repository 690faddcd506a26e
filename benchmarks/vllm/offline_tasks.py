"""Offline tasks answered by the model in the package inside vLLM, and by transformers at the same budget.

    OMP_NUM_THREADS=1 python -m benchmarks.vllm.offline_tasks --out benchmarks/vllm/results/offline_tasks.json

A prompt is a context and one question behind it, so the question is seen when it is compressed. Both engines keep the
same number of slots, so the bytes of keys and values are equal; replies are compared token by token, and graded.
Needs an environment with vLLM.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from keepkv.integrations.vllm.bench import IN_PROCESS, Load, engine

os.environ.update(IN_PROCESS)

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import keepkv
from benchmarks.vllm.ties import is_tie
from keepkv import tasks
from keepkv.engine.versions import CACHE
from keepkv.integrations.vllm.versions import installed
from keepkv.integrations.vllm.wish import wish_of
from keepkv.measure.environment import revision, versions
from keepkv.tasks.asking import Asked, encode

TASKS = ("niah-single-1", "niah-multikey-1", "niah-multivalue", "shared-context", "variable-tracking")
BUDGETS = (1.0, 0.5, 0.25, 0.1)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", default=keepkv.embedded_model())
    options.add_argument("--method", default="keepkv2")
    options.add_argument("--tasks", nargs="+", default=TASKS)
    options.add_argument("--items", type=int, default=6, help="contexts of each task")
    options.add_argument("--length", type=int, default=400, help="tokens of a context")
    options.add_argument("--out", type=Path, required=True)
    given = options.parse_args()
    tokenizer: Any = AutoTokenizer.from_pretrained(given.model)
    asked = [
        (name, seed, item.context + one.prompt, one)
        for name in given.tasks
        for seed in range(given.items)
        for item in [encode(tokenizer, tasks.get(name).generate(tokenizer, given.length, seed))]
        for one in item.asked[:1]
        if not one.question.judged
    ]
    served = in_vllm(given, asked)
    model = AutoModelForCausalLM.from_pretrained(given.model)
    rows = []
    for budget in BUDGETS:
        for (name, seed, prompt, one), reply in zip(asked, served[budget], strict=True):
            rows.append({"task": name, "seed": seed, "budget": budget, "prompt": len(prompt)})
            rows[-1] |= compared(model, tokenizer, given.method, budget, prompt, one, reply)
        print(summary(rows, budget), flush=True)
    made_with = {"model": str(given.model), "method": given.method, "length": given.length, "device": "cpu"}
    made_with |= {"dtype": "float32", "vllm": str(installed()), "revision": revision(), **versions()}
    given.out.parent.mkdir(parents=True, exist_ok=True)
    whole = {"made_with": made_with, "summary": [summary(rows, budget) for budget in BUDGETS], "rows": rows}
    given.out.write_text(json.dumps(whole, indent=1) + "\n")


def in_vllm(given: Any, asked: list[tuple[str, int, list[int], Asked]]) -> dict[float, list[list[int]]]:
    """The replies by budget."""
    from vllm import SamplingParams

    longest = max(len(prompt) + one.limit for *_, prompt, one in asked)
    load = Load(
        model=str(given.model), requests=len(asked), prompt=longest, reply=8, kv_bytes=48 << 20, block=32, at_once=512,
        dtype="float32",
    )  # fmt: skip
    found = {}
    with engine(load, ours=True) as llm:
        for budget in BUDGETS:
            extra = {"keepkv_method": given.method, "keepkv_budget": budget}
            sampling = [
                SamplingParams(temperature=0, ignore_eos=True, detokenize=False, max_tokens=one.limit, extra_args=extra)
                for *_, one in asked
            ]
            prompts = [{"prompt_token_ids": prompt} for *_, prompt, _ in asked]
            outs = llm.generate(prompts, sampling, use_tqdm=False)
            found[budget] = [list(out.outputs[0].token_ids) for out in outs]
    return found


def compared(
    model: Any, tokenizer: Any, method: str, budget: float, prompt: list[int], one: Asked, reply: list[int]
) -> dict[str, Any]:
    """Scores of both replies, and whether they are the same."""
    wish = wish_of({"keepkv_method": method, "keepkv_budget": budget}, None)
    ids = torch.tensor([prompt])

    def replied(chosen: Any) -> list[int]:
        kept = {} if chosen is None or wish is None else {CACHE: keepkv.Cache(model, chosen, wish.budget)}
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=one.limit, do_sample=False, eos_token_id=None,
            **kept,
        )  # fmt: skip
        said: list[int] = out[0, len(prompt) :].tolist()
        return said

    other = replied(None if wish is None else wish.method)
    grades = [tasks.grade(tokenizer, one.question, one.answer, x) for x in (reply, other)]
    same = reply == other
    return {
        "vllm": grades[0].value, "transformers": grades[1].value, "same": same,
        "tie": not same and wish is not None and is_tie(wish.method, reply, replied),
    }  # fmt: skip


def summary(rows: list[dict[str, Any]], budget: float) -> dict[str, Any]:
    """Means at a budget, and how many replies are the same."""
    mine = [row for row in rows if row["budget"] == budget]
    counts = {name: sum(x[name] for x in mine) for name in ("same", "tie")}
    return {
        "budget": budget, "replies": len(mine), **counts,
        **{name: round(sum(x[name] for x in mine) / len(mine), 4) for name in ("vllm", "transformers")},
    }  # fmt: skip


if __name__ == "__main__":
    main()
