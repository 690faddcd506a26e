"""A score of your own against a registered method, at several budgets: `python examples/own_score.py [MODEL]`."""

from __future__ import annotations

import sys

from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import keepkv
from keepkv.embedded import embedded_model
from keepkv.score.base import FunctionScore
from keepkv.tasks import get, score_item


def large_values(view: keepkv.LayerView) -> Tensor:
    """(B,H,S): a slot with a large value adds much to the output wherever it is attended to."""
    return view.slots.values.float().norm(dim=-1)


def main(path: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    own = keepkv.Method(score=FunctionScore(large_values), window=16, name="large-values")
    items = [get("niah-multikey-1").generate(tokenizer, 500, seed) for seed in range(3)]
    for budget in (0.5, 0.25):
        for method in (own, "snapkv"):
            scores = []
            for item in items:
                cache = keepkv.Cache(model, method, budget)
                scores += score_item(model, tokenizer, item, cache)
            name = method if isinstance(method, str) else method.name
            print(f"budget {budget:4}  {name:14} {sum(one.correct for one in scores)}/{len(scores)} right")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else embedded_model())
