"""Reading a text twice: the statistic of KVzip against a plain model that repeats its context."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch
import zoo
from running import batch, generate, row
from score_views import loop_weights, together
from score_views import row as one_row
from torch import Tensor
from torch.testing import assert_close

import keepkv
from keepkv.engine.passes import again
from keepkv.engine.passes.reread import LEAD
from keepkv.engine.versions import CACHE
from keepkv.errors import CacheStateError, KeepKVError, UnsupportedInput
from keepkv.evaluation import unit as units
from keepkv.observe.attention import received, strongest
from keepkv.score.passes.kvzip import STAT
from keepkv.tasks.base import Item

torch.set_num_threads(1)
DEFERRED = keepkv.When("deferred")
PROMPT = torch.tensor([7, 9, 11])
LENGTHS = (41, 23, 3)


@cache
def eager(name: str) -> Any:
    model = copy.deepcopy(zoo.model(name))
    model.set_attn_implementation("eager")
    return model


def repeated(name: str, ids: Tensor, prompt: Tensor, chunk: int) -> list[Tensor]:
    """Per layer (H,S): max attention from what is read behind the context ``ids`` (S,), chunk by chunk, each after the
    context alone."""
    found: list[Tensor] = []
    size = len(ids)
    for start in range(0, size, chunk):
        said = torch.cat((prompt, ids[max(0, start - LEAD) : start + chunk]))
        with torch.no_grad():
            out = eager(name)(input_ids=torch.cat((ids, said))[None], output_attentions=True, use_cache=False)
        most = [a[0, :, size:, :size].amax(1).view(2, -1, size).amax(1) for a in out.attentions]
        found = [torch.maximum(x, y) for x, y in zip(found, most, strict=True)] if found else most
    return found


def prefilled(name: str = "llama", lengths: tuple[int, ...] = LENGTHS, **options: Any) -> tuple[Any, Any]:
    inputs = batch(lengths)
    cache = keepkv.Cache(zoo.model(name), "kvzip", 14, **{"when": DEFERRED, "sinks": 2, **options})
    feed(zoo.model(name), cache, **inputs)
    return cache, inputs


def feed(model: Any, cache: keepkv.Cache, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Logits of the last of ``input_ids`` (B,T)."""
    positions = (attention_mask.cumsum(-1) - 1)[:, -input_ids.shape[1] :].clamp_min(0)
    with torch.no_grad():
        out = model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=positions, **{CACHE: cache}
        )  # fmt: skip
    logits: Tensor = out.logits[:, -1]
    return logits


def stats(cache: keepkv.Cache) -> list[Tensor]:
    for layer in cache.compressible:
        layer.listen()
    return [layer.store.view().stats[STAT].clone() for layer in cache.compressible]


@pytest.mark.parametrize("name", ["llama", "gpt-oss"])  # plain; sliding layers between, and attention sinks
@pytest.mark.parametrize("chunk", [2048, 16, 20, 22])  # 20 and 22 leave one token of a row
@pytest.mark.parametrize("prompt", [PROMPT, None])
def test_the_statistic_against_a_plain_model(name: str, chunk: int, prompt: Tensor | None) -> None:
    mine, inputs = prefilled(name)
    keepkv.reread(zoo.model(name), mine, **inputs, prompt_ids=prompt, chunk=chunk)
    for i, length in enumerate(LENGTHS):
        alone = repeated(name, row(inputs, i)["input_ids"][0], PROMPT[:0] if prompt is None else PROMPT, chunk)
        for layer, got in zip(mine.compressible, stats(mine), strict=True):
            assert_close(got[i, :, -length:], alone[layer.info.index], rtol=1e-4, atol=1e-6)
            assert (got[i, :, : max(LENGTHS) - length] == 0).all()


@pytest.mark.parametrize("store", ["ragged", "int8", "static"])
def test_nothing_but_the_statistic_changes(store: str) -> None:
    """And what follows is as if the text had been read once, but for the choice of slots."""
    mine, inputs = prefilled(store=store)
    twin = mine.copy()
    keepkv.reread(zoo.model("llama"), mine, **inputs)
    assert mine.get_seq_length() == 41 and torch.equal(mine.shared.positions.seen, torch.tensor(LENGTHS))
    assert mine.settings.method.when == DEFERRED and not mine.report().compressed
    assert torch.equal(mine.shared.positions.positions, twin.shared.positions.positions)
    for one, other in zip(mine.compressible, twin.compressible, strict=True):
        a, b = one.store.tensors(), other.store.tensors()
        assert a.keys() == b.keys() and one.progress.pending and one.progress.seen == other.progress.seen
        assert all(torch.equal(x, b[name]) == (not name.endswith(STAT)) for name, x in a.items() if x.dim() > 1)
    mine.compress()
    twin.compress()
    one, other = (x.kept_positions(0) for x in (mine, twin))
    assert mine.report().compressed and not (one.shape == other.shape and torch.equal(one, other))


def test_a_row_alone_compresses_as_in_its_batch() -> None:
    mine, inputs = prefilled()
    keepkv.reread(zoo.model("llama"), mine, **inputs, prompt_ids=PROMPT.expand(3, -1), chunk=10)
    out = generate_after(mine, inputs)
    for i in range(3):
        own = keepkv.Cache(zoo.model("llama"), "kvzip", 14, when=DEFERRED, sinks=2)
        alone = row(inputs, i)
        feed(zoo.model("llama"), own, **alone)
        keepkv.reread(zoo.model("llama"), own, alone["input_ids"], prompt_ids=PROMPT, chunk=10)
        assert torch.allclose(generate_after(own, alone)[0], out[i], atol=1e-5)


def generate_after(cache: keepkv.Cache, inputs: dict[str, Tensor]) -> Tensor:
    """Logits of three tokens fed after compression."""
    cache.compress()
    mask, logits = inputs["attention_mask"], []
    for token in (5, 6, 8):
        mask = torch.cat((mask, mask.new_ones(len(mask), 1)), dim=1)
        logits.append(feed(zoo.model("llama"), cache, mask.new_full((len(mask), 1), token), mask))
    return torch.stack(logits, 1)


def test_without_a_second_reading_it_is_the_largest_attention_of_the_first() -> None:
    mine, inputs = prefilled()
    for i, length in enumerate(LENGTHS):
        with torch.no_grad():
            out = eager("llama")(row(inputs, i)["input_ids"], output_attentions=True, use_cache=False)
        for got, a in zip(stats(mine), out.attentions, strict=True):
            assert_close(got[i, :, -length:], a[0].amax(1).view(2, 2, length).amax(1), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("store", ["ragged", "static"])
def test_decoded_tokens_add_what_they_attend_to(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the weights that attention computed, and from the keys."""
    options = dict(sinks=2, when=keepkv.When("deferred", every=4), store=store)
    caches = [keepkv.Cache(zoo.model("llama"), "kvzip", 16, **options) for _ in range(2)]
    first = generate(zoo.model("llama"), batch((30, 17)), caches[0], new=11).scores_
    monkeypatch.setattr(keepkv.engine.layer.Layer, "_follows", lambda layer: False)
    assert_close(generate(zoo.model("llama"), batch((30, 17)), caches[1], new=11).scores_, first, rtol=1e-4, atol=1e-4)
    for one, two in zip(stats(caches[0]), stats(caches[1]), strict=True):
        assert_close(one, two, rtol=1e-4, atol=1e-5)


def test_a_token_without_an_embedding_is_worth_nothing_to_kvzip_plus() -> None:
    """Its hidden state is zero, and a share of attention by the norm of it would be infinite."""
    found = []
    for fed in ((), (0,)):  # the row of the padding token in the embedding is zero
        ids, cache = (
            torch.tensor([[5, 6, 7, 8, *fed]]),
            keepkv.Cache(zoo.model("qwen2"), "kvzip", 0.9, plus=True, when=DEFERRED),
        )
        assert not zoo.model("qwen2").get_input_embeddings().weight[0].any()
        with torch.no_grad():
            zoo.model("qwen2")(input_ids=ids, **{CACHE: cache})
        found.append(stats(cache)[0])
    assert (found[0] > 0).all() and torch.equal(found[0], found[1][..., :4])


def test_strongest_against_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    view = together([one_row(3, slots=14, queries=6), one_row(4, slots=9, queries=5)])
    for tile in (1 << 20, 40):
        monkeypatch.setattr("keepkv.observe.attention.TILE", tile)
        monkeypatch.setattr("keepkv.observe.attention.ROWS", 1)
        a = loop_weights(view).view(2, 2, 2, 6, 14)
        assert_close(strongest(view, view.queries, view.query_positions), a.amax(3), rtol=1e-6, atol=1e-9)
        assert_close(received(view, view.queries, view.query_positions), a.sum(3), rtol=1e-6, atol=1e-9)


def test_what_cannot_be_read_again_is_refused() -> None:
    model, inputs = zoo.model("llama"), batch(LENGTHS)
    with pytest.raises(KeepKVError, match="reads a text once"):
        keepkv.reread(model, keepkv.Cache(model, "snapkv", 40), **inputs)
    with pytest.raises(CacheStateError, match="not read anything"):
        keepkv.reread(model, keepkv.Cache(model, "kvzip", 14), **inputs)
    with pytest.raises(CacheStateError, match="deferred"):
        keepkv.reread(model, prefilled(when=keepkv.When())[0], **inputs)
    mine, _ = prefilled()
    with pytest.raises(UnsupportedInput, match="41 columns"):
        keepkv.reread(model, mine, inputs["input_ids"][:, 1:], inputs["attention_mask"][:, 1:])
    with pytest.raises(UnsupportedInput, match="tokens"):
        keepkv.reread(model, mine, inputs["input_ids"])


@pytest.mark.parametrize("method, times", [("kvzip", 1), ("snapkv", 0)])
def test_an_evaluation_reads_twice_what_is_to_be_read_twice(
    method: str, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    monkeypatch.setattr(again, "reread", lambda model, cache, ids, mask, chunk: read.append(int(mask.sum())))
    monkeypatch.setattr(units, "within", lambda cache, unit, budget: cache.missing)  # goes no further
    setup = units.Setup("zoo", ("secret",), (units.Variant(method),), (0.25,), (64,), batch=2)
    unit = units.Unit("secret", 64, "agnostic", units.Variant(method), (0.25,), (0,), 0, True)
    items = [units.Encoded(Item("", ()), [5, 6, 7], ())]
    with pytest.raises(AttributeError, match="missing"):
        units._prefilled(zoo.model("llama"), None, setup, unit, items, units.Found())
    assert read == [3] * times


def test_a_score_that_is_merged_by_is_reread_too() -> None:
    """``keepkv`` remembers queries beside the score that it is given; the score still sees the second reading."""
    model, ids = zoo.model("llama"), torch.randint(3, zoo.VOCAB, (1, 30))
    found = []
    for method, options in (("kvzip", {}), ("keepkv", {"score": "kvzip", "window": 4})):
        cache = keepkv.Cache(model, method, 14, sinks=2, when=DEFERRED, **options)
        with torch.no_grad():
            model(input_ids=ids, **{CACHE: cache})
        keepkv.reread(model, cache, ids)
        found.append(stats(cache))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
