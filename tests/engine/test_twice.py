"""A cache that is given the same text twice: ``generate`` refuses it, with every way of giving the text; forwards read
it again behind itself, as they read anything."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo
from running import batch, generate, row

import keepkv
from keepkv.engine.versions import CACHE
from keepkv.errors import CacheStateError


def made(**options: Any) -> keepkv.Cache:
    return keepkv.Cache(zoo.model("llama"), "snapkv", 10, **{"window": 4, "sinks": 2, **options})


def same(one: keepkv.Cache, other: keepkv.Cache) -> bool:
    """Whether two caches hold the same slots."""
    pairs = zip(one.compressible, other.compressible, strict=True)
    return all(torch.equal(a.store.view().keys, b.store.view().keys) for a, b in pairs)


@pytest.mark.parametrize("rows", [1, 3])
def test_generate_refuses_what_it_has_read(rows: int) -> None:
    model, cache = zoo.model("llama"), made()
    inputs = row(batch(), 0) if rows == 1 else batch()
    generate(model, inputs, cache)
    before, held = cache.report(), cache.copy()
    for _ in range(2):  # a second and a third call
        with pytest.raises(CacheStateError, match=r"has read 66 tokens.*text of 61.*cache\.copy\(\).*cache\.reset\(\)"):
            generate(model, inputs, cache)
    assert cache.report() == before and same(cache, held)


@pytest.mark.parametrize(
    "way", ["positional", "inputs", "without a mask", "embeddings", "chunks", "as long as was read"]
)
def test_every_way_of_giving_the_text_is_refused(way: str) -> None:
    model, cache = zoo.model("llama"), made()
    inputs = row(batch(), 0)
    ids = inputs["input_ids"]
    with torch.no_grad():
        model(input_ids=ids, **{CACHE: cache})
    if way != "as long as was read":
        with torch.no_grad():
            model(input_ids=ids[:, :1], **{CACHE: cache})
    embedded = model.get_input_embeddings()(ids)
    args, kwargs = {
        "positional": ((ids,), {}),
        "inputs": ((), {"inputs": ids}),
        "without a mask": ((), {"input_ids": ids}),
        "embeddings": ((), {"inputs_embeds": embedded, "attention_mask": inputs["attention_mask"]}),
        "chunks": ((), {**inputs, "prefill_chunk_size": 16}),
        "as long as was read": ((), inputs),
    }[way]
    with pytest.raises(CacheStateError, match="nothing new to read"):
        model.generate(*args, **kwargs, **{CACHE: cache}, max_new_tokens=2, pad_token_id=0)  # type: ignore[arg-type]


def test_the_remedies_work() -> None:
    model, inputs, cache = zoo.model("llama"), row(batch(), 0), made()
    first = generate(model, inputs, cache)
    cache.reset()
    assert torch.equal(generate(model, inputs, cache).sequences, first.sequences)
    longer = torch.cat((first.sequences, torch.full((1, 3), 7)), dim=1)
    generate(model, {"input_ids": longer, "attention_mask": torch.ones_like(longer)}, cache)
    assert cache.report().seen == [longer.shape[1] + 5]
    read = made()
    with torch.no_grad():
        model(input_ids=inputs["input_ids"][:, :-1], **{CACHE: read})
    answers = [generate(model, inputs, read.copy()).sequences for _ in range(3)]
    assert torch.equal(answers[0], answers[1]) and torch.equal(answers[1], answers[2])


def test_only_what_is_new_may_be_given_with_the_whole_mask() -> None:
    model, inputs, cache = zoo.model("llama"), row(batch(), 0), made()
    with torch.no_grad():
        model(**inputs, **{CACHE: cache})
    new = {"input_ids": torch.full((1, 4), 7), "attention_mask": torch.ones(1, 65, dtype=torch.long)}
    generate(model, new, cache, new=2)
    assert cache.report().seen == [66]


def test_forwards_read_it_again_behind_itself() -> None:
    model, inputs = zoo.model("llama"), row(batch(), 0)
    ids = inputs["input_ids"]
    twice, once = made(when=keepkv.When("deferred")), made(when=keepkv.When("deferred"))
    with torch.no_grad():
        for _ in range(2):
            model(input_ids=ids, **{CACHE: twice})
        model(input_ids=torch.cat((ids, ids), dim=1), **{CACHE: once})
    assert twice.seen.tolist() == once.seen.tolist() == [122]
    for a, b in zip(twice.compressible, once.compressible, strict=True):
        assert torch.equal(a.store.view().positions, b.store.view().positions)
