"""Spans through whole models: who keeps how much, whatever the method, the batch, the schedule and the store."""

from __future__ import annotations

from typing import Any

import matrix
import pytest
import torch
import zoo
from matrix import METHODS, compresses, sampled
from running import batch, generate, row
from transformers import CompileConfig

import keepkv
from keepkv import Span, SpanPolicy
from keepkv.engine.versions import CACHE
from keepkv.errors import BudgetError, SpanError

LENGTHS = (61, 50, 41)
X, Y, LAW = Span(3, 15, name="X"), Span(15, 40, name="Y"), Span(5, 9, "protect", name="law")


def kept(cache: keepkv.Cache) -> list[torch.Tensor]:
    """(B,H,S) positions of each layer."""
    return [cache.kept_positions(layer.info.index) for layer in cache.compressible]


def inside(positions: torch.Tensor, span: Span) -> torch.Tensor:
    """(B,H): tokens of a span that are held."""
    return ((positions >= span.start) & (positions < span.end)).sum(-1)


@pytest.mark.parametrize("method", sampled(2, METHODS))
def test_lambda_zero_is_the_method_itself(method: tuple[str, dict[str, Any]]) -> None:
    model, inputs = zoo.model("llama"), batch(LENGTHS)
    plain = matrix.made(model, method[0], 20, **method[1])
    spans = matrix.made(model, method[0], 20, spans=SpanPolicy([X, Y], fair_lambda=0), **method[1])
    outs = [generate(model, inputs, cache).scores_ for cache in (plain, spans)]
    assert torch.equal(*outs) and all(map(torch.equal, kept(plain), kept(spans)))


@pytest.mark.parametrize(
    ("method", "scoring"), sampled(2, [m for m in METHODS if compresses(m.values[0])], ["span", "global"])
)
def test_protected_tokens_stay_and_totals_do_not_change(method: tuple[str, dict[str, Any]], scoring: str) -> None:
    """In every layer and head, and an allocation over layers or heads keeps as many slots as before."""
    model, inputs = zoo.model("llama"), batch(LENGTHS)
    plain = matrix.made(model, method[0], 20, **method[1])
    spans = matrix.made(model, method[0], 20, spans=SpanPolicy([X, Y, LAW], scoring=scoring), **method[1])
    for cache in (plain, spans):
        generate(model, inputs, cache, new=2)
    assert all(bool((inside(x, LAW) == 4).all()) for x in kept(spans))
    totals = [[sum(map(sum, heads)) for heads in cache.report().kept.values()] for cache in (plain, spans)]
    if plain.settings.method.allocate.trims:  # a threshold does not make up for what is protected
        assert all(a <= b for a, b in zip(*totals, strict=True))
        return
    assert sum(totals[0]) == sum(totals[1])
    joint = plain.settings.method.allocate.joint  # what one layer must keep, another may have to give
    if method[0] != "pyramidkv" and not joint:  # what the layers slope over is what is not protected
        assert totals[0] == totals[1]


ROWS = [[X, Y, LAW], [Span(0, 20, name="X"), Span(44, 49, "protect", name="law")], [Y]]
SCORED = [
    m for m in METHODS if m.id in ("snapkv", "tova", "h2o", "keepkv", "adakv", "streaming-llm", "expected-attention")
]


@pytest.mark.parametrize("method", SCORED)
@pytest.mark.parametrize("when", ["immediate", "deferred"])
def test_a_batch_is_its_rows(method: tuple[str, dict[str, Any]], when: str) -> None:
    """Rows of other lengths with other spans, left padding, chunks, steps that compress: each row as it is alone."""
    model, inputs = zoo.model("llama"), batch(LENGTHS)
    options = {**method[1], "when": keepkv.When(prefill=when, every=3)}
    chunks = {"prefill_chunk_size": 16} if when == "deferred" else {}
    cache = matrix.made(model, method[0], 20, spans=ROWS, **options)
    together = generate(model, inputs, cache, new=8, **chunks)
    for i in range(3):
        alone = matrix.made(model, method[0], 20, spans=ROWS[i], **options)
        out = generate(model, row(inputs, i), alone, new=8)
        assert torch.allclose(out.scores_[0], together.scores_[i], atol=1e-5)
        for mine, all_rows in zip(kept(alone), kept(cache), strict=True):
            assert all(torch.equal(mine[0, h][mine[0, h] >= 0], all_rows[i, h][all_rows[i, h] >= 0]) for h in range(2))


@pytest.mark.parametrize(("store", "method"), [("dense", "keepkv"), ("flat", "streaming-llm"), ("int8", "knorm")])
def test_two_hundred_steps_within_a_budget(store: str, method: str) -> None:
    """Protected tokens of the prompt are still there; order is kept; fair spans stay even with each other."""
    model, inputs = zoo.model("llama"), batch((90, 80))
    spans = [Span(4, 14, "protect", name="law"), Span(14, 44, name="X"), Span(44, 74, name="Y")]
    cache = keepkv.Cache(model, method, 64, store=store, spans=spans, when=keepkv.When(every=8))
    generate(model, inputs, cache, new=200)
    for positions in kept(cache):
        assert bool((inside(positions, spans[0]) == 10).all())
        for held in positions.flatten(0, 1):
            assert bool((held[held >= 0].diff() > 0).all())
        assert bool(((inside(positions, spans[1]) - inside(positions, spans[2])).abs() <= 1).all())
        assert bool((inside(positions, spans[1]) >= 3).all())  # a fair share of 290 tokens, not what was left over
    rates = cache.report().keep_rate
    assert rates["law"] == 1 and set(rates) == {"law", "X", "Y", "rest", "generated"}
    assert cache.report().kept[0][0][0] <= 64 + 8


@pytest.mark.parametrize("method", ["snapkv", "h2o", "tova"])
def test_spans_follow_their_rows(method: str) -> None:
    """Copies, files, repeated, selected and reordered rows go on alike."""
    model, inputs, when = zoo.model("llama"), batch(LENGTHS), keepkv.When(every=2)
    options: dict[str, Any] = {"window": 4, "sinks": 2} if method != "tova" else {}

    def feed(cache: keepkv.Cache, rows: list[int]) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1)
        mask, out = inputs["attention_mask"], []
        for _ in range(5):
            token = torch.randint(3, zoo.VOCAB, (3, 1), generator=generator)
            mask = torch.cat((mask, torch.ones(3, 1, dtype=torch.long)), dim=1)
            positions = (mask.sum(-1, keepdim=True) - 1)[rows]
            with torch.no_grad():
                step = dict(input_ids=token[rows], attention_mask=mask[rows], position_ids=positions)
                out.append(model(**step, **{CACHE: cache}).logits[:, -1])
        return torch.stack(out, 1)

    def prefilled(spans: Any = ROWS) -> keepkv.Cache:
        cache = keepkv.Cache(model, method, 20, spans=spans, when=when, **options)
        with torch.no_grad():
            model(**inputs, position_ids=(inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0), **{CACHE: cache})
        return cache

    expected = feed(prefilled(), [0, 1, 2])
    assert torch.allclose(feed(prefilled().copy(), [0, 1, 2]), expected, atol=1e-5)
    moved = prefilled()
    moved.reorder_cache(torch.tensor([2, 0, 1]))
    assert torch.allclose(feed(moved, [2, 0, 1]), expected[[2, 0, 1]], atol=1e-5)
    moved.batch_select_indices(torch.tensor([0]))
    assert moved.report().keep_rate.keys() == {"Y", "rest", "generated"}  # of the row that was the third
    twice = prefilled()
    twice.batch_repeat_interleave(2)
    assert torch.allclose(feed(twice, [0, 0, 1, 1, 2, 2]), expected[[0, 0, 1, 1, 2, 2]], atol=1e-5)


def test_files_keep_spans(tmp_path: Any) -> None:
    model = zoo.model("llama")
    for spans in (ROWS, SpanPolicy([X, Span(20, 30, weight=2.0, min_keep=3)], 0.5, "grow", "global")):
        cache = keepkv.Cache(model, "h2o", 20, spans=spans, window=4, sinks=2, when=keepkv.When(every=2))
        generate(model, batch(LENGTHS), cache, new=3)
        cache.reorder_cache(torch.tensor([1, 1, 0]))
        cache.save(tmp_path / "cache.safetensors")
        loaded = keepkv.Cache.load(tmp_path / "cache.safetensors", model)
        assert loaded.shared.spans is not None and cache.shared.spans is not None
        assert loaded.shared.spans.policy == cache.shared.spans.policy
        assert loaded.report().to_dict() == cache.report().to_dict()
        for one in (cache, loaded):
            one.compress()
        assert all(map(torch.equal, kept(loaded), kept(cache)))


def test_beams_and_reset() -> None:
    model, inputs = zoo.model("llama"), batch(LENGTHS[:2])
    cache = keepkv.Cache(model, "snapkv", 20, spans=[X, LAW], window=4, sinks=2, when=keepkv.When(every=2))
    options = dict(max_new_tokens=6, num_beams=2, do_sample=False, pad_token_id=0)
    first = model.generate(**inputs, **{CACHE: cache}, **options)
    assert all(bool((inside(x, LAW) == 4).all()) for x in kept(cache)) and len(kept(cache)[0]) == 4
    cache.reset()
    assert torch.equal(first, model.generate(**inputs, **{CACHE: cache}, **options))
    cache.reset()
    generate(model, row(inputs, 0), cache)  # another batch size
    per_row = keepkv.Cache(model, "snapkv", 20, spans=[[X], [Y]], window=4, sinks=2)
    with pytest.raises(SpanError, match=r"batch of 4.*beams"):
        model.generate(**inputs, **{CACHE: per_row}, **options)
    model.generate(**inputs, **{CACHE: per_row}, **{**options, "num_beams": 1})  # nothing was broken


def test_a_second_turn_keeps_what_the_first_protected() -> None:
    """Another prompt in the same conversation: its tokens are "generated" for the spans, which keep their shares."""
    model, first, second = zoo.model("llama"), batch((61,)), batch((40,), seed=2)
    cache = keepkv.Cache(model, "snapkv", 24, spans=[X, Y, LAW], window=4, sinks=2)
    ids = generate(model, first, cache, new=4).sequences
    before = cache.report().keep_rate
    assert any(name.startswith("span_") for name in cache.compressible[0].score_state)
    ids = torch.cat((ids, second["input_ids"]), dim=1)
    generate(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, cache, new=4)
    after = cache.report().keep_rate
    assert after["law"] == before["law"] == 1 and 0 < after["X"] < before["X"] and 0 < after["generated"] < 1
    for positions in kept(cache):
        free = (inside(positions, X) - 4) / 8, inside(positions, Y) / 25
        assert bool(((free[0] - free[1]).abs() <= 1 / 8 + 1 / 25 + 1e-6).all())


def test_overflow() -> None:
    """More protected than the budget holds: an error, a larger cache, or the best of the protected tokens."""
    model, inputs = zoo.model("llama"), batch((61, 50))
    law = Span(10, 40, "protect", name="law")

    def cache(mode: str) -> keepkv.Cache:
        return keepkv.Cache(model, "snapkv", 0.3, spans=SpanPolicy([law], on_overflow=mode), window=4, sinks=2)

    strict = cache("error")
    with pytest.raises(BudgetError, match=r"36 slots.*18.*grow"):
        generate(model, inputs, strict)
    grown = cache("grow")
    generate(model, inputs, grown, new=1)
    report = grown.report()
    assert report.kept[0] == [[36, 36], [36, 36]] and report.keep_rate["law"] == 1 and report.spans is not None
    assert report.spans.overflows == 3 and report.spans.realised > report.spans.requested and "overflows" in str(report)
    with pytest.raises(BudgetError, match=r"20 slots.*32 tokens"):  # 30 and the sinks: known from the start
        keepkv.Cache(model, "snapkv", 20, spans=[law], window=4, sinks=2)
    trimmed = cache("trim")
    with pytest.warns(UserWarning, match="given up"):
        generate(model, inputs, trimmed, new=1)
    assert trimmed.report().kept[0] == [[18, 18], [15, 15]]
    for positions in kept(trimmed):
        assert bool((inside(positions, law)[0] == 12).all() and (inside(positions, Span(0, 2))[0] == 2).all())


def test_spans_beyond_the_prompt_are_refused() -> None:
    """As when characters were given for tokens; before anything is decoded."""
    model, inputs = zoo.model("llama"), batch((61, 33))
    cache = keepkv.Cache(model, "snapkv", 20, spans=[Span(30, 40, name="late")], window=4, sinks=2)
    with pytest.raises(SpanError, match=r"late.*row 1.*33 tokens.*spans_of_text"):
        generate(model, inputs, cache)
    ends = keepkv.Cache(model, "snapkv", 20, spans=[Span(30, 33)], window=4, sinks=2)
    generate(model, row(inputs, 1), ends, prefill_chunk_size=16)  # whose last chunk is one token


def test_spans_go_through_the_context_manager() -> None:
    model, inputs = zoo.model("llama"), row(batch(LENGTHS), 0)
    with keepkv.compressed(model, "snapkv", 20, spans=[X, LAW], window=4, sinks=2) as caches:
        model.generate(**inputs, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert caches[-1].report().keep_rate["law"] == 1


def test_compiled_decode_is_one_graph_with_spans_too() -> None:
    """It goes on remembering, and compresses, as eager decode in another store does."""
    model, inputs = zoo.model("llama"), row(batch((40,)), 0)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    config = CompileConfig(backend="eager", fullgraph=True, dynamic=None)
    config._compile_all_devices = True
    outs = []
    for store, extra in (("static", {"compile_config": config}), ("dense", {})):
        options: dict[str, Any] = {"store_options": {"capacity": 48}} if store == "static" else {}
        when = keepkv.When(every=12)
        cache = keepkv.Cache(model, "h2o", 20, spans=[X, LAW], window=4, sinks=2, when=when, store=store, **options)
        outs.append(generate(model, inputs, cache, new=20, **extra).scores_)
        assert cache.report().keep_rate["law"] == 1
    assert torch.allclose(*outs, atol=1e-4) and torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_lambda_moves_counts_from_the_method_to_fair() -> None:
    model, inputs = zoo.model("llama"), row(batch((61,)), 0)
    counts = []
    for fair in (0.0, 0.5, 1.0):
        policy = SpanPolicy([Span(0, 30), Span(30, 60)], fair_lambda=fair)
        cache = keepkv.Cache(model, "streaming-llm", 20, spans=policy, sinks=0)
        generate(model, inputs, cache, new=1)
        counts.append(inside(kept(cache)[0], Span(0, 30))[0, 0].item())
    assert counts == [0, 5, 10]
