"""Prompts of tasks and files, and their order."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import rl_setup

from keepkv.errors import KeepKVError
from keepkv.evaluation.setup import HELD_OUT
from keepkv.training.config import Data
from keepkv.training.rl.prompts import in_order, prompts_of

TOKENIZER = rl_setup.tokenizer()


def test_every_question_of_a_task() -> None:
    found = prompts_of(Data(source="niah-multivalue", length=128, items=3, options={"keys": 2}), TOKENIZER)
    assert len(found.rows) == len(found.asked) == 6
    assert [row["item"] for row in found.rows] == list(range(6))
    for row, one in zip(found.rows, found.asked, strict=True):
        assert row["prompt"].endswith(one.question.prompt) and row["answer"] == one.question.answer
        assert found.longest is not None and found.longest > one.limit


def test_lines_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "sums.jsonl"
    path.write_text('{"prompt": "1 + 1 =", "reply": "2"}\n\n{"context": "Sums. ", "prompt": "2 + 2 =", "reply": "4"}\n')
    found = prompts_of(Data(source=str(path)), TOKENIZER)
    assert [row["answer"] for row in found.rows] == ["2", "4"] and found.longest is None
    assert [row["prompt"] for row in found.rows] == ["1 + 1 =", "Sums. 2 + 2 ="]
    chat = SimpleNamespace(chat_template="{{ messages }}")
    assert prompts_of(Data(source=str(path)), chat).rows[0]["prompt"] == [{"role": "user", "content": "1 + 1 ="}]
    path.write_text('{"prompt": "1 + 1 =", "answer": "2"}\n')
    with pytest.raises(KeepKVError, match=r"unknown key in sums\.jsonl, line 1: 'answer'"):
        prompts_of(Data(source=str(path)), TOKENIZER)
    path.write_text("\n")
    with pytest.raises(KeepKVError, match="no prompts in"):
        prompts_of(Data(source=str(path)), TOKENIZER)


def test_longer_prompts_are_left_out() -> None:
    data = {"source": "niah-single-2", "items": 4, "length": 64}
    rows = prompts_of(Data(**data), TOKENIZER).rows
    sizes = [len(TOKENIZER.encode(row["prompt"])) for row in rows]
    limit = sorted(sizes)[1]
    found = prompts_of(Data(longest=limit, **data), TOKENIZER)
    assert [row["item"] for row in found.rows] == [i for i, n in enumerate(sizes) if n <= limit]
    assert 0 < len(found.rows) < 4 == len(found.asked)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"source": "niah-single-1", "together": True}, "one prompt at a time"),
        ({"source": "niah-single-1", "longest": 8}, "each of 1 prompts is longer than 8 tokens"),
        ({"source": "perplexity"}, "no questions that are asked one at a time"),
        ({"source": "shared-context"}, "no questions that are asked one at a time"),
        ({"source": "niah-single-1", "seed": HELD_OUT}, "items are for evaluation"),
    ],
)
def test_what_cannot_be_drawn_or_is_held_out(given: dict, said: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(KeepKVError, match=said):
        prompts_of(Data(**{"length": 128, "items": 1, **given}), TOKENIZER)


def test_order_is_the_same_for_a_seed_and_even() -> None:
    rows = [{"item": i} for i in range(5)]
    order = [row["item"] for row in in_order(rows, 12, 3)]
    assert order == [row["item"] for row in in_order(rows, 12, 3)] != [row["item"] for row in in_order(rows, 12, 4)]
    assert sorted(order[:5]) == list(range(5)) and max(Counter(order).values()) == 3
