"""What cannot be recorded or replayed is refused, with the reason and the remedy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo
from replayed import cache_of, rollout
from running import batch, generate

import keepkv
from keepkv import training
from keepkv.engine.versions import CACHE
from keepkv.errors import CacheStateError, KeepKVError, UnsupportedInput


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"method": "keepkv"}, "merges slots"),
        ({"method": "cam"}, "merges slots"),
        ({"codec": "int4"}, "loses some"),
        ({"method": "snapkv", "select": "exact", "selected": 4}, "chooses among the slots anew"),
    ],
)
def test_what_a_mask_cannot_say(options: dict[str, Any], said: str) -> None:
    made = cache_of(zoo.model("llama"), **options)
    with pytest.raises(KeepKVError, match=said) as refused:
        training.record(made)
    assert "such as 'g-kv'" in str(refused.value) and made.shared.recorder is None


def test_a_cache_that_was_compressed_or_read_nothing() -> None:
    model = zoo.model("llama")
    made = cache_of(model)
    with pytest.raises(CacheStateError, match="read nothing"):
        training.record(made).take()
    made = cache_of(model)
    generate(model, batch(), made, new=2)
    with pytest.raises(CacheStateError, match="before it was recorded"):
        training.record(made)


def test_a_recorded_cache_does_not_join() -> None:
    model, pair = zoo.model("llama"), []
    for _ in range(2):
        pair.append(cache_of(model))
        training.record(pair[-1])
        with torch.no_grad():
            model(**batch(), **{CACHE: pair[-1]})
    with pytest.raises(CacheStateError, match="recorded"):
        pair[0].join(pair[1])


def test_other_texts_and_models() -> None:
    model = zoo.model("llama")
    text, mask, _, record = rollout(model, cache_of(model, when=keepkv.When(every=3)))
    with pytest.raises(UnsupportedInput, match="a batch of 2 rows was given to a replay of 3"):
        training.replay(model, text[:2], mask[:2], record)
    longer = torch.cat((text, text[:, :1]), 1)
    with pytest.raises(UnsupportedInput, match="of a record of 68"):
        training.replay(model, longer, torch.ones_like(longer), record)
    with pytest.raises(UnsupportedInput, match="behind 5 others"), training.replaying(model, record.rows(slice(1))):
        past = model(input_ids=text[:1, :5], use_cache=True)
        model(input_ids=text[:1, 5:8], attention_mask=torch.ones(1, 8), **{CACHE: past[CACHE]})
    with pytest.raises(UnsupportedInput, match=r"no attention in \[9\]"):
        training.replay(model, text, mask, training.Record(record.evict_at, {**record.heads, 9: 0}))
    with pytest.raises(UnsupportedInput, match="nothing were to be joined"):
        training.joined([])
    with pytest.raises(UnsupportedInput, match=r"feed\(read=0\)"):
        training.feed(model, cache_of(model), text, mask, 0)
