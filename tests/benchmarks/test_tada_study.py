"""The study of TaDA: its tables are those of its rows, and it compares what it says."""

from __future__ import annotations

import pytest
import torch
import zoo
from transformers import AutoTokenizer

import keepkv
from benchmarks.tada.run import CHOICES, Turned, _turned, ablation, asked
from benchmarks.tada.tables import RESULTS, page
from keepkv.store.codec.tada import Tada


def test_the_tables_are_those_of_the_rows() -> None:
    assert (RESULTS / "tables.md").read_text(encoding="utf-8") == page()


def test_turning_twice_is_nothing() -> None:
    x = torch.randn(2, 4, 5, 32)
    assert torch.allclose(_turned(_turned(x)), x, atol=1e-5) and not torch.allclose(_turned(x), x, atol=0.1)
    keys, values = (codec := Turned(Tada(8, centre=True))).decode(codec.encode(x, x))
    assert torch.allclose(keys, x, atol=0.05) and torch.equal(keys, values)


def test_what_stands_beside_a_mean_takes_no_more_bits() -> None:
    texts = list(torch.randint(3, 60, (2, 1, 24), generator=torch.Generator().manual_seed(7)))
    rows = ablation(zoo.model("llama"), texts)
    held = {f"{row['choice']}, {row['codes']:g} bits": row["held"] for row in rows if not row["beside"]}
    assert len(held) == 3 * len(CHOICES) and all(row["held"] <= held[row["beside"]] for row in rows if row["beside"])
    assert held["plain, 4 bits"] == 4 + 32 / 16  # a scale and a zero for 16 numbers
    assert held["centred, 4 bits"] == pytest.approx(4 + 32 / 16 + 16 / 2)  # and the mean of two heads


def test_texts_have_questions_and_replies() -> None:
    tokenizer = AutoTokenizer.from_pretrained(keepkv.embedded_model())
    texts = asked(tokenizer, 1, 160)
    assert len(texts) == 5 and all(ids.shape[1] <= 160 and "?" in tokenizer.decode(ids[0]) for ids in texts)
