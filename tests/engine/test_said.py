"""What caches and receipts say of themselves, in every state, in words a newcomer reads."""

from __future__ import annotations

import copy

import pytest
import torch
import zoo
from running import batch, generate

import keepkv
from keepkv.engine.versions import CACHE
from keepkv.errors import KeepKVError, UnsupportedInput


def made(method: str = "snapkv", budget: float | int | str = 10, **options: object) -> keepkv.Cache:
    return keepkv.Cache(zoo.model("llama"), method, budget, **{"window": 4, "sinks": 2, **options})  # type: ignore[arg-type]


def test_a_cache_that_has_read_nothing() -> None:
    cache = made(budget="25%")
    assert repr(cache) == "keepkv.Cache(snapkv, budget 25% of the tokens, nothing read yet)"
    lines = str(cache.report()).splitlines()
    assert len(lines) == 3 and lines[2].split(maxsplit=1) == ["note", "nothing read yet"]


def test_a_cache_that_has_read() -> None:
    cache = made()
    generate(zoo.model("llama"), batch(), cache, new=6)
    rows = len(cache.seen)
    receipt, said = cache.report(), str(cache.report())
    assert repr(cache).startswith("keepkv.Cache(snapkv, budget 10 slots per head, ")
    assert f"{int(cache.seen.max())} tokens read in the longest of {rows} rows, " in repr(cache)
    assert f"ratio {receipt.ratio:.3f})" in repr(cache)
    assert f"held                {10 + 5} slots per head, with 5 tokens read after the last compression" in said
    assert f"{receipt.dropped:,} dropped\n" in said and "merge" not in said and "heaviest" not in said
    assert receipt.since == 5


def test_merges_are_said_as_tokens() -> None:
    cache = made("keepkv", 14, key="zip", threshold=0.2)
    generate(zoo.model("llama"), batch(), cache, new=4)
    receipt = cache.report()
    assert f"{receipt.merged:,} merged into others" in str(receipt)
    assert f"counts as {round(receipt.largest_vote)} tokens in attention" in str(receipt)


def test_a_cache_larger_than_a_plain_one_says_so() -> None:
    cache = keepkv.Cache(zoo.model("llama"), "full")
    generate(zoo.model("llama"), batch(), cache, new=2)
    assert cache.report().ratio > 1 and "larger than a plain cache" in str(cache.report())
    small = made(budget=6)
    generate(zoo.model("llama"), batch(), small, new=1)
    assert small.report().ratio < 1 and "larger than a plain" not in str(small.report())


def test_compressions_are_counted_by_layer() -> None:
    cache = made(when=keepkv.When(every=2))
    generate(zoo.model("llama"), batch(), cache, new=9)
    receipt = cache.report()
    layers = len(cache.compressible)
    assert f"{layers} layers, {receipt.compressions // layers} times each, " in str(receipt)


def test_no_state_of_a_cache_breaks_its_repr() -> None:
    model, cache = zoo.model("llama"), made()
    inputs = batch()
    states = [cache, cache.copy(), copy.deepcopy(cache), object.__new__(keepkv.Cache)]
    generate(model, inputs, cache, new=3)
    states += [cache.copy(), cache.copy(observing=True), copy.copy(cache)]
    refused = made()
    with pytest.raises(UnsupportedInput), torch.no_grad():
        right = torch.ones(1, 8, dtype=torch.int64)
        right[:, -2:] = 0
        model(input_ids=torch.ones(1, 8, dtype=torch.int64), attention_mask=right, **{CACHE: refused})
    taken = cache.copy()
    states += [refused, taken.split([0]), taken]
    again = cache.copy()
    again.reset()
    states.append(again)
    for one in states:
        assert repr(one).startswith("keepkv.Cache(") and repr(one).endswith(")")
        if "shared" in one.__dict__:
            assert str(one.report())
    assert repr(object.__new__(keepkv.Cache)) == "keepkv.Cache(not made yet)"
    assert "nothing read yet" in repr(again)


def test_a_name_instead_of_a_model() -> None:
    name, remedy = "Qwen/Qwen3-0.6B", r"is the name of a model.*AutoModelForCausalLM.from_pretrained\('Qwen"
    with pytest.raises(KeepKVError, match=remedy):
        keepkv.Cache(name, "snapkv", 0.1)  # type: ignore[arg-type]
    with pytest.raises(KeepKVError, match=remedy), keepkv.compressed(name, "snapkv", 0.1):  # type: ignore[arg-type]
        pass
