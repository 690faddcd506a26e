"""The study of long replies: every method saw the same contexts, and the tables say what the rows do."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.long_decode import run, tables
from benchmarks.long_decode.run import BUDGETS, METHODS, Recalled, measure
from keepkv.embedded import embedded_model
from keepkv.evaluation.setup import HELD_OUT, Variant
from keepkv.measure.environment import MadeWith
from keepkv.measure.ledger import Ledger

FOLDER = Path(run.__file__).parent


def test_rows_are_balanced_and_the_tables_are_of_them(capsys: pytest.CaptureFixture[str]) -> None:
    rows = Ledger(FOLDER / "results" / "rows.jsonl", Recalled).rows()
    counts = Counter((row.method, row.budget) for row in rows)
    assert set(counts) == {("full", 0)} | {(name, budget) for name in METHODS for budget in BUDGETS}
    assert set(counts.values()) == {64} and len({(row.method, row.budget, row.seed) for row in rows}) == len(rows)
    assert len({(row.seed, tuple(row.ages)) for row in rows}) == 64
    tables.main(FOLDER / "results")
    assert capsys.readouterr().out == (FOLDER / "results" / "tables.md").read_text("utf-8")
    assert all(f"| `{name}` |" in (FOLDER / "README.md").read_text("utf-8") for name in METHODS)


def test_the_full_cache_recalls_all_and_a_random_choice_does_not() -> None:
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(embedded_model()).eval()
    tokenizer = AutoTokenizer.from_pretrained(embedded_model())
    made = MadeWith.of(model, "embedded")
    found = list(measure(model, tokenizer, [HELD_OUT, HELD_OUT + 1], [Variant("random-attention")], made, None))
    assert [(row.method, row.budget) for row in found[::2]] == [
        ("full", 0),
        *[("random-attention", b) for b in BUDGETS],
    ]
    assert all(all(row.right) and row.kl == 0 for row in found[:2])
    assert all(row.kl > 0 for row in found[2:]) and not all(all(row.right) for row in found[2:4])
    assert found[2].kl > found[4].kl  # more slots, less apart
