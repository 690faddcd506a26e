"""Which methods keep the same slots."""

from __future__ import annotations

import pytest
import torch
import zoo

from keepkv.errors import KeepKVError, UnknownName
from keepkv.evaluation.alike import alike


def test_what_is_alike_comes_first() -> None:
    torch.manual_seed(0)
    context = torch.randint(3, zoo.VOCAB, (160,)).tolist()
    steps: list[str] = []
    found = alike(zoo.model("llama"), context, "snapkv", ["random", "keepkv3", "snapkv", "adakv"], 0.5, steps.append)
    assert [one.method for one in found][::3] == ["snapkv", "keepkv3"] and found[0].shared == 1.0
    shared = {one.method: one.shared for one in found}
    assert shared["adakv"] > shared["random"] and 0.3 < shared["random"] < 0.7
    assert found[-1].shared is None and "calibration" in found[-1].why
    assert steps == ["snapkv", "random", "keepkv3", "snapkv", "adakv"]


def test_nothing_to_compare_is_refused() -> None:
    with pytest.raises(KeepKVError, match="compressed nothing of 40 tokens"):
        alike(zoo.model("llama"), range(3, 43), "snapkv", ["random"], 60)
    with pytest.raises(UnknownName, match="snapvk"):
        alike(zoo.model("llama"), range(3, 43), "snapvk", ["random"], 10)


def test_methods_that_keep_the_prompt_choose_from_it_here() -> None:
    """Before, one of them ended the whole comparison."""
    model, context = zoo.model("llama"), list(range(3, 103))
    found = alike(model, context, "streaming-llm", ["raas", "random"], 0.5)
    assert {one.method for one in found} == {"random", "raas"} and all(one.shared is not None for one in found)
