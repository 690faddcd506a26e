"""Text that is read and taken back leaves no trace, whatever the score remembers."""

from __future__ import annotations

import pytest
import torch
import zoo
from matrix import SMALL

import keepkv
from keepkv.engine.versions import CACHE


@torch.no_grad()
def feed(cache: keepkv.Cache, count: int, seed: int) -> torch.Tensor:
    ids = torch.randint(3, zoo.VOCAB, (1, count), generator=torch.Generator().manual_seed(seed))
    return zoo.model("llama")(input_ids=ids, **{CACHE: cache}).logits


@pytest.mark.parametrize("method", ["snapkv", "g-kv", "expected-attention", "knorm", "adakv"])
def test_a_question_leaves_no_trace(method: str) -> None:
    small = {k: v for k, v in SMALL.items() if k in next(x.options for x in keepkv.methods() if x.name == method)}
    one, two = (
        keepkv.Cache(zoo.model("llama"), method, 20, when=keepkv.When(prefill=None, cap=48), **small) for _ in range(2)
    )
    for cache in (one, two):
        feed(cache, 28, 0)
    with one.transient():
        first = feed(one, 9, 1), feed(one, 1, 2)
    with pytest.raises(ZeroDivisionError), one.transient():
        again = feed(one, 9, 1), feed(one, 1, 2)
        raise ZeroDivisionError
    assert all(map(torch.equal, first, again))
    assert one.compressing
    for seed in range(3, 9):
        assert torch.equal(feed(one, 8, seed), feed(two, 8, seed))
    assert one.report().kept == two.report().kept and one.report().compressed


def test_a_later_budget_holds_from_then_on() -> None:
    cache = keepkv.Cache(zoo.model("llama"), "knorm", 20, when=keepkv.When(prefill=None, cap=48))
    feed(cache, 40, 0)
    cache.compress(budget=30)
    assert cache.report().kept[0] == [[30, 30]]
    feed(cache, 18, 1)
    feed(cache, 1, 2)
    assert cache.report().kept[0] == [[31, 31]]
    cache.reset()
    assert cache.settings.budget.slots == 20
