"""Rewards by name."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import rl_setup

from keepkv import tasks
from keepkv.errors import KeepKVError, UnknownName
from keepkv.tasks.asking import encode
from keepkv.training.rl import reward

TOKENIZER = rl_setup.tokenizer()


def test_a_tasks_own_scoring() -> None:
    """The right reply, half of it, one that goes on behind its end, and a wrong one."""
    item = encode(TOKENIZER, tasks.get("long-decode").generate(TOKENIZER, 24, 0, kind="copy"))
    multi = encode(TOKENIZER, tasks.get("niah-multivalue").generate(TOKENIZER, 128, 0))
    asked = [item.asked[0], multi.asked[0]]
    right = asked[0].answer
    first = TOKENIZER.encode(f" {asked[1].question.values[0]}", add_special_tokens=False)
    score = reward("score", TOKENIZER, asked)
    replies = [right, right[: len(right) // 2], [*right, 7, 7], [9] * 4, first]
    assert score(completion_ids=replies, item=[0, 0, 0, 0, 1], prompts=None) == [1.0, 0.5, 1.0, 0.0, 0.5]


def test_exact_answers_of_texts_and_conversations() -> None:
    exact = reward("exact", TOKENIZER)
    said = [" 42\n", "42.", [{"role": "assistant", "content": "42"}]]
    assert exact(completions=said, answer=["42"] * 3, item=[0, 1, 2]) == [1.0, 0.0, 1.0]


def test_a_function_of_a_module(monkeypatch: Any, tmp_path: Path) -> None:
    (tmp_path / "my_rewards.py").write_text(
        "def short(completions, **others):\n    return [1 / len(x) for x in completions]\nTHIS = 3\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert reward("my_rewards:short", TOKENIZER)(completions=["ab", "abcd"]) == [0.5, 0.25]
    with pytest.raises(KeepKVError, match="'my_rewards' has no 'long'"):
        reward("my_rewards:long", TOKENIZER)
    with pytest.raises(KeepKVError, match="is int, not a function"):
        reward("my_rewards:THIS", TOKENIZER)
    with pytest.raises(KeepKVError, match="cannot import 'no_such_module'"):
        reward("no_such_module:f", TOKENIZER)


def test_unknown_ones_are_refused_with_the_nearest() -> None:
    with pytest.raises(UnknownName, match=r"unknown reward 'exakt'\. Did you mean 'exact'"):
        reward("exakt", TOKENIZER)
    with pytest.raises(KeepKVError, match="give a task, or"):
        reward("score", TOKENIZER)


def test_math_verify(monkeypatch: Any) -> None:
    """Its two functions are called as the package has them; without the package it is refused."""
    fake = ModuleType("math_verify")
    fake.parse = lambda text: [w.strip("$") for w in text.split() if w.strip("$").isdigit()][-1:]  # type: ignore[attr-defined]
    fake.verify = lambda gold, said: gold == said  # type: ignore[attr-defined]
    monkeypatch.setattr("keepkv.training.rl.rewards.find_spec", lambda name: None)
    with pytest.raises(KeepKVError, match="pip install math-verify"):
        reward("math-verify", TOKENIZER)
    monkeypatch.setattr("keepkv.training.rl.rewards.find_spec", lambda name: fake)
    monkeypatch.setitem(sys.modules, "math_verify", fake)
    found = reward("math-verify", TOKENIZER)(completions=["so it is 7", "it is 8", "none"], answer=["7", "$7$", "x"])
    assert found == [1.0, 0.0, None]
