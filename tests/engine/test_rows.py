"""Rows join a batch and leave it, each as if it were alone: continuous batching over slots of different lengths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from matrix import sampled
from running import batch
from torch import Tensor

import keepkv
from keepkv.engine.versions import CACHE
from keepkv.errors import CacheStateError, UnsupportedModel

LENGTHS = (33, 18, 25)
BUDGET = 14
SMALL = {"window": 4, "sinks": 2}
METHODS: list[tuple[str, dict[str, Any]]] = [
    ("snapkv", SMALL), ("keepkv", SMALL), ("adakv", SMALL), ("keepkv2", SMALL), ("h2o", SMALL), ("d2o", SMALL),
    ("g-kv", {"window": 4}), ("random", {"sinks": 2}), ("expected-attention", {"sinks": 2}), ("tova", {}),
]  # fmt: skip


def prompt(i: int) -> Tensor:
    return torch.randint(3, zoo.VOCAB, (1, LENGTHS[i]), generator=torch.Generator().manual_seed(i))


class Rows:
    """Some rows that decode greedily in one cache, and the logits of each so far."""

    def __init__(self, model: Any, cache: keepkv.Cache) -> None:
        self.model, self.cache = model, cache
        self.feed = torch.empty(0, 1, dtype=torch.int64)
        self.logits: list[list[Tensor]] = []

    def read(self, ids: Tensor) -> Rows:
        with torch.no_grad():
            last = self.model(input_ids=ids, **{CACHE: self.cache}).logits[:, -1]
        self.feed, self.logits = last.argmax(-1, keepdim=True), [[last[0]]]
        return self

    def decode(self, steps: int) -> Rows:
        for _ in range(steps):
            mask = self.cache.attention_mask(1)
            places = mask.sum(-1, keepdim=True) - 1
            with torch.no_grad():
                out = self.model(input_ids=self.feed, attention_mask=mask, position_ids=places, **{CACHE: self.cache})
            last = out.logits[:, -1]
            for row, x in zip(self.logits, last, strict=True):
                row.append(x)
            self.feed = last.argmax(-1, keepdim=True)
        return self

    def join(self, other: Rows) -> None:
        self.cache.join(other.cache)
        self.feed, self.logits = torch.cat((self.feed, other.feed)), self.logits + other.logits

    def split(self, which: list[int]) -> Rows:
        twin = Rows(self.model, self.cache.split(which))
        rest = [i for i in range(len(self.feed)) if i not in which]
        twin.feed, twin.logits = self.feed[which], [self.logits[i] for i in which]
        self.feed, self.logits = self.feed[rest], [self.logits[i] for i in rest]
        return twin


def same(one: list[Tensor], two: list[Tensor], atol: float) -> bool:
    return torch.allclose(torch.stack(one), torch.stack(two), atol=atol)


@pytest.mark.parametrize(
    ("arch", "method", "every"),
    sampled(2, ["llama", "gemma3", "gpt-oss", "deepseek-v3"], [pytest.param(x, id=x[0]) for x in METHODS], [None, 3]),
)
def test_rows_decode_as_if_alone(arch: str, method: tuple[str, dict[str, Any]], every: int | None) -> None:
    """The second joins after the first has decoded two tokens, the third two later; then the first leaves."""
    model, (name, options) = zoo.model(arch), method

    def start(i: int) -> Rows:
        cache = keepkv.Cache(model, name, BUDGET, when=keepkv.When(every=every), **options)
        return Rows(model, cache).read(prompt(i))

    try:
        alone = [start(i).decode(11) for i in range(3)]
    except UnsupportedModel:
        pytest.skip("refused as it should be")
    batch = start(0).decode(2)
    batch.join(start(1))
    batch.decode(2)
    late = start(2)
    batch.join(late)
    assert late.cache.seen.tolist() == []
    batch.decode(3)
    first = batch.split([0])
    first.decode(4)
    batch.decode(6)
    for got, want in zip((first.logits[0], *batch.logits), alone, strict=True):
        assert same(got, want.logits[0][: len(got)], 1e-5), [
            float((a - b).abs().max()) for a, b in zip(got, want.logits[0], strict=False)
        ]
    kept = [cache.report().kept for cache in (first.cache, alone[0].cache)]
    assert kept[0] == kept[1] if len(first.logits[0]) == 12 else kept[0].keys() == kept[1].keys()


@pytest.mark.parametrize("options", [{"codec": "int8"}, {"store": "dense"}, {"store": "dense", "codec": "int8"}])
def test_other_stores_join_too(options: dict[str, Any]) -> None:
    model = zoo.model("llama")

    def start(i: int) -> Rows:
        return Rows(model, keepkv.Cache(model, "snapkv", BUDGET, window=4, sinks=2, **options)).read(prompt(i))

    alone = [start(i).decode(6) for i in range(2)]
    batch = start(0).decode(2)
    batch.join(start(1))
    batch.decode(4)
    exact = options.get("codec") is None
    for got, want in zip(batch.logits, alone, strict=True):
        assert same(got, want.logits[0][: len(got)], 1e-5 if exact else 0.1)


def test_ragged_rows_hold_no_padding() -> None:
    """Ten times as many tokens in one row as in the other: the bytes are those of both."""
    model = zoo.model("llama")
    caches = []
    for length in (120, 12):
        caches.append(keepkv.Cache(model, "adakv", 0.5, window=2, sinks=1))
        with torch.no_grad():
            model(input_ids=torch.randint(3, zoo.VOCAB, (1, length)), **{CACHE: caches[-1]})
    apart = sum(layer.store.nbytes for cache in caches for layer in cache.compressible)
    caches[0].join(caches[1])
    assert sum(layer.store.nbytes for layer in caches[0].compressible) <= apart
    assert caches[0].seen.tolist() == [120, 12] and caches[0].attention_mask(0).sum(-1).tolist() == [120, 12]


def test_deferred_prompts_are_compressed_when_they_join() -> None:
    model = zoo.model("llama")

    def start(i: int) -> Rows:
        cache = keepkv.Cache(model, "snapkv", BUDGET, when=keepkv.When("deferred"), **SMALL)
        return Rows(model, cache).read(prompt(i))

    alone = [start(i).decode(3) for i in range(2)]
    batch = start(0)
    batch.join(start(1))
    assert batch.cache.report().compressed
    batch.decode(3)
    assert all(same(got, want.logits[0], 1e-5) for got, want in zip(batch.logits, alone, strict=True))


def test_rows_join_after_a_rollback() -> None:
    """The newest tokens of a row were taken back; it decodes on as one that never had them, and so does who joins."""
    model = zoo.model("llama")

    def start(i: int) -> Rows:
        return Rows(model, keepkv.Cache(model, "snapkv", BUDGET, **SMALL)).read(prompt(i))

    alone = [start(i).decode(6) for i in range(2)]
    batch = start(0).decode(4)
    batch.cache.crop(-2)
    batch.logits[0] = batch.logits[0][:-2]
    batch.feed = batch.logits[0][-1].argmax()[None, None]
    batch.join(start(1))
    batch.decode(4)
    assert all(same(got, want.logits[0][: len(got)], 1e-5) for got, want in zip(batch.logits, alone, strict=True))


def test_spans_follow_their_rows() -> None:
    """Each row keeps its protected tokens, recompressions while decoding included."""
    model = zoo.model("llama")

    def start(i: int) -> Rows:
        spans = [keepkv.Span(3 + i, 8 + i, "protect", name=f"rules {i}")]
        options: dict[str, Any] = {**SMALL, "spans": spans, "when": keepkv.When(every=3)}
        return Rows(model, keepkv.Cache(model, "snapkv", BUDGET, **options)).read(prompt(i))

    alone = [start(i).decode(7) for i in range(2)]
    batch = start(0).decode(1)
    batch.join(start(1))
    batch.decode(6)
    assert all(same(got, want.logits[0][: len(got)], 1e-5) for got, want in zip(batch.logits, alone, strict=True))
    assert batch.cache.report().keep_rate["rules 0"] == batch.cache.report().keep_rate["rules 1"] == 1.0


def test_byte_budgets_are_shared_by_the_rows() -> None:
    model, caches = zoo.model("llama"), []
    for length in (60, 40):
        caches.append(keepkv.Cache(model, "knorm", "20KB"))
        with torch.no_grad():
            model(input_ids=torch.randint(3, zoo.VOCAB, (1, length)), **{CACHE: caches[-1]})
    caches[0].join(caches[1])
    assert caches[0].settings.budget.bytes == 40_000
    assert caches[0].split([1]).settings.budget.bytes == caches[0].settings.budget.bytes == 20_000


def test_an_empty_batch_takes_what_comes_and_a_whole_one_leaves() -> None:
    model = zoo.model("llama")
    batch = keepkv.Cache(model, "snapkv", BUDGET, **SMALL)
    rows = Rows(model, keepkv.Cache(model, "snapkv", BUDGET, **SMALL)).read(prompt(0))
    batch.join(rows.cache)
    assert batch.seen.tolist() == [33] and rows.cache.seen.tolist() == []
    left = batch.split([0])
    assert left.seen.tolist() == [33] and batch.seen.tolist() == []


def test_what_cannot_be_one_batch_is_refused_and_nothing_changes() -> None:
    model = zoo.model("llama")

    def read(method: str = "snapkv", budget: Any = BUDGET, **options: Any) -> keepkv.Cache:
        cache = keepkv.Cache(model, method, budget, **{**SMALL, **options})
        Rows(model, cache).read(prompt(0))
        return cache

    cache = read()
    before = cache.report()
    for other, message in (
        (read("keepkv"), "method"),
        (read(budget=20), "budget"),
        (read(codec="int8"), "store"),
        (read(seed=1), "seed"),
        (keepkv.Cache(model, "snapkv", BUDGET, **SMALL), "read nothing"),
        (read(spans=[keepkv.Span(0, 4)]), "span policy"),
    ):
        with pytest.raises(CacheStateError, match=message):
            cache.join(other)
    for which in ([], [1], [0, 0], [-1]):
        with pytest.raises(CacheStateError, match="give different rows"):
            cache.split(which)
    assert cache.report() == before
    with pytest.raises(CacheStateError, match="read nothing"):
        keepkv.Cache(model, "snapkv", BUDGET, **SMALL).attention_mask()


def test_reset_forgets_what_a_join_made_of_spans_and_bytes(tmp_path: Path) -> None:
    """Without the guard: SpanError "spans for 2 rows were given to a batch of 1"."""
    caches = [keepkv.Cache(zoo.model("llama"), "h2o", "40KB", spans=[keepkv.Span(1, 3, "protect")]) for _ in range(2)]
    for cache in caches:
        with torch.no_grad():
            zoo.model("llama")(**batch((20,)), **{CACHE: cache})
    caches[0].join(caches[1])
    assert caches[0].settings.budget.bytes == 80_000
    caches[0].save(tmp_path / "joined")
    loaded = keepkv.Cache.load(tmp_path / "joined", zoo.model("llama"))
    assert loaded.settings.budget.bytes == 80_000
    loaded.reset()
    assert loaded.settings.budget.bytes == 40_000 and loaded.settings.policy == caches[1].settings.policy
    twin = caches[0].copy()
    twin.reset()
    assert twin.settings.budget.bytes == 40_000
    caches[0].reset()
    assert caches[0].settings.budget.bytes == 40_000
    with torch.no_grad():
        zoo.model("llama")(**batch((20,)), **{CACHE: caches[0]})
    assert caches[0].report().seen == [20]


def test_tokens_taken_back_after_a_row_with_gaps_joined() -> None:
    """Without the guard: the store drops a column of padding for a token, and two slots have position 5."""
    model = zoo.model("llama")
    mine, other = (keepkv.Cache(model, "knorm", 20, window=2, sinks=1) for _ in range(2))
    mask = torch.tensor([[1] * 6 + [0, 1, 1, 1]])
    ids = batch((10,))["input_ids"]
    with torch.no_grad():
        model(ids[:, :6], attention_mask=mask[:, :6], **{CACHE: mine})
        model(ids[:, 6:], attention_mask=mask, position_ids=torch.tensor([[0, 6, 7, 8]]), **{CACHE: mine})
        model(ids[:, :7], **{CACHE: other})
        mine.join(other)
        for _ in range(2):
            model(ids[:, :1].expand(2, 1), attention_mask=mine.attention_mask(1), **{CACHE: mine})
        mine.crop(-2)
    assert mine.seen.tolist() == [9, 7]
    positions = mine.kept_positions(0)
    assert [sorted(set(row[0][row[0] >= 0].tolist())) for row in positions] == [list(range(9)), list(range(7))]
    with pytest.raises(CacheStateError):
        mine.crop(-1)


def test_rows_that_left_a_static_store_write_where_they_are() -> None:
    """Without the guard: decoding what stays moves the cursor of what left."""
    model, options = zoo.model("llama"), {"store": "static", "store_options": {"capacity": 64}}
    found = []
    for decodes in (False, True):
        cache = keepkv.Cache(model, "full", **options)
        with torch.no_grad():
            for length in (12, 1):
                model(batch((12,))["input_ids"][:, :length].expand(2, length), **{CACHE: cache})
            left = cache.split([1])
            if decodes:
                for _ in range(3):
                    model(torch.tensor([[9]]), **{CACHE: cache})
            found.append([model(torch.tensor([[5 + i]]), **{CACHE: left}).logits for i in range(4)])
    assert torch.equal(torch.stack(found[0]), torch.stack(found[1]))


def test_rows_move_before_a_score_that_follows_decoding_has_listened() -> None:
    """Without the guard: weights of 16 columns meet a store of 15, and torch raises."""
    model = zoo.model("llama")
    cache = keepkv.Cache(model, "kvzip", 30, store="ragged", codec="int8", when=keepkv.When(every=3), sinks=2, window=4)
    inputs = batch((60, 30))
    with torch.no_grad():
        model(**inputs, **{CACHE: cache})
        model(torch.tensor([[5], [6]]), attention_mask=cache.attention_mask(1), **{CACHE: cache})
        cache.reorder_cache(torch.tensor([1, 1]))
        out = model(torch.tensor([[7], [7]]), attention_mask=cache.attention_mask(1), **{CACHE: cache}).logits
    torch.testing.assert_close(out[0], out[1])
