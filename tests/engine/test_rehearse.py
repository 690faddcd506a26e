"""Questions rehearsed before a compression: what is remembered, scored and fitted, against loops in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import zoo
from running import batch, row
from score_views import F64, loop_weights, part_of_queries, rows_of, together
from score_views import row as one_row
from torch import Tensor
from torch.testing import assert_close

import keepkv
from keepkv.core.slots import LayerView
from keepkv.embedded import embedded_model
from keepkv.engine.passes.reread import feed as read_behind
from keepkv.engine.versions import CACHE
from keepkv.errors import CacheStateError, KeepKVError, UnsupportedInput
from keepkv.evaluation.setup import Setup, Variant
from keepkv.evaluation.unit import build, run
from keepkv.observe.rehearsal import NAMES
from keepkv.reduce.fit import ridge
from keepkv.reduce.refit import Refit, relative
from keepkv.score.content.knorm import KNorm
from keepkv.score.passes.rehearsed import Listen, Rehearsed, effects
from keepkv.tasks.asking import likely

DEFERRED = keepkv.When("deferred")
QUESTIONS = (torch.tensor([7, 9, 11, 4]), [5, 6])
LENGTHS = (41, 23, 5)


def heard(seed: int, slots: int = 14, asked: int = 4, **options: Any) -> tuple[LayerView, LayerView]:
    """A row that holds a text and the question read behind it; and the text alone, which has heard the question."""
    whole = replace(one_row(seed, slots=slots, queries=asked, **options), state={}, memo={})
    Listen().observe(whole)
    text = part_of_queries(whole, 0, 0)
    text.seen = whole.seen - asked
    return whole, replace(text, state=dict(whole.state), memo={}, protected=None)


def outputs(view: LayerView, weights: Tensor) -> Tensor:
    """(B,H*G,T,Dv) of attention (B,H*G,T,S)."""
    return weights @ view.slots.values.double().repeat_interleave(view.query_groups, dim=1)


@pytest.mark.parametrize("options", [{}, {"softcap": 1.5}, {"sink_logits": torch.tensor([0.3, -1.0, 0.5, 0.1])}])
def test_what_a_question_is_to_itself(options: dict[str, Any]) -> None:
    """Mass and words of its own tokens, from the attention of all slots by loops."""
    whole, text = heard(1, **options)
    every, n = loop_weights(whole), text.slots.shape[2]
    queries, positions, mass, said = (text.state[name] for name in NAMES)
    assert torch.equal(queries, whole.queries) and torch.equal(positions, whole.query_positions)
    own = every[..., n:].sum(-1) + (1 - every.sum(-1))  # and the sink
    z = every[..., :n].sum(-1) / own  # mass of the text over that of the question
    at = replace(text, queries=whole.queries, query_positions=whole.query_positions, sink_logits=None)
    u = [(at.queries[0, h] @ at.slots.keys[0, h // 2].T * at.scaling).double() for h in range(4)]
    if text.softcap is not None:
        u = [torch.tanh(x / text.softcap) * text.softcap for x in u]
    told = torch.stack([(x + at.slots.log_votes[0, h // 2]).logsumexp(-1) for h, x in enumerate(u)])[None]
    assert_close(told - z.log(), mass.double(), rtol=1e-5, atol=1e-6)
    words = every[..., n:] @ whole.slots.values[:, :, n:].double().repeat_interleave(2, dim=1)
    assert_close(said.double(), words / own[..., None], rtol=1e-5, atol=1e-6)


def test_the_effect_is_what_the_output_changes_by() -> None:
    whole, text = heard(2)
    full = outputs(whole, loop_weights(whole))
    size = full.square().sum((1, 3))  # (B,T): of the layer
    got = effects(text)
    for h in range(2):
        for i in range(text.slots.shape[2]):
            gone = whole.slots.positions.clone()
            gone[0, h, i] = -1
            left = replace(whole, slots=whole.slots.with_(positions=gone))
            change = (outputs(left, loop_weights(left)) - full).square().sum((1, 3)) / size
            assert_close(got[0, h, i].double(), change.mean(), rtol=1e-4, atol=1e-9)


def test_a_slot_that_has_all_attention_has_no_more_effect_than_it_can() -> None:
    """‖v − o‖² is then rounding, and (a/(1−a))² is 10¹²: in float32 their product would be anything."""
    _, text = heard(2)
    keys, state = text.slots.keys.float(), {k: x.float() if x.is_floating_point() else x for k, x in text.state.items()}
    state["asked"] = 60 * state["asked"].new_ones(()).expand_as(state["asked"])
    keys[:, :, 3] = 1.0
    state["asked_mass"] = torch.full_like(state["asked_mass"], -1e4)
    slots = text.slots.with_(keys=keys, values=text.slots.values.float(), log_votes=text.slots.log_votes.float())
    single = replace(text, slots=slots, state=state)
    wide = slots.with_(keys=keys.double(), values=slots.values.double(), log_votes=slots.log_votes.double())
    double = replace(text, slots=wide, state={k: x.double() if x.is_floating_point() else x for k, x in state.items()})
    size = slots.values.square().sum(-1).amax() / slots.values[:, :, 3].square().sum(-1).amin()
    for view in (single, double):
        got = effects(replace(view, memo={}))
        assert (got >= 0).all() and got.amax() <= 4 * text.query_groups * size, got.amax()


def test_padding_and_other_rows_make_no_difference() -> None:
    pairs = [heard(3), heard(4, slots=9)]
    view = together([replace(text, state={}) for _, text in pairs])
    view.seen = torch.cat([text.seen for _, text in pairs])
    view.state = {name: torch.cat([text.state[name] for _, text in pairs]) for name in NAMES}
    both = effects(view)
    kept = torch.zeros_like(view.slots.valid)
    kept[..., -3:] = True
    fitted = Refit()(view, kept, both, KNorm())
    for i, (_, text) in enumerate(pairs):
        n = text.slots.shape[2]
        assert_close(both[i, :, -n:], effects(text)[0], rtol=1e-5, atol=1e-9)
        assert (both[i, :, :-n] == 0).all()
        alone = Refit()(text, kept[i : i + 1, :, -n:], both[i : i + 1, :, -n:], KNorm())
        mine = rows_of(replace(view, slots=fitted.slots, state={}), [i]).slots
        assert_close(alone.slots.values, mine.values, rtol=1e-5, atol=1e-6)
        assert_close(alone.slots.log_votes, mine.log_votes, rtol=1e-5, atol=1e-6)


def test_a_question_in_front_of_which_nothing_stands_counts_for_nothing() -> None:
    _, text = heard(5)
    longer = dict(text.state)
    for name in NAMES:
        x, dim = longer[name], 1 + (name != NAMES[1])
        blank = x.new_full((*x.shape[:dim], 3, *x.shape[dim + 1 :]), -1 if name == NAMES[1] else 0)
        longer[name] = torch.cat((blank, x), dim=dim)
    other = replace(text, state=longer, memo={})
    assert_close(effects(other), effects(text))
    kept = text.slots.positions < 4
    one, two = (Refit()(v, kept, effects(v), KNorm()).slots for v in (text, other))
    assert_close(one.values, two.values)
    assert_close(one.log_votes, two.log_votes)


def error(whole: LayerView, text: LayerView, slots: Any) -> Tensor:
    """Squared error over that of the layer's output, of slots that take the text's place."""
    n = text.slots.shape[2]
    new = whole.slots.map(lambda x: x[:, :, n:])
    stand = replace(whole, slots=slots.with_(stats={}).join(new))
    full = outputs(whole, loop_weights(whole))
    return ((outputs(stand, loop_weights(stand)) - full).square().sum((1, 3)) / full.square().sum((1, 3))).mean()


def test_the_fit_brings_outputs_back() -> None:
    """Better than dropping; all but exact where there are more numbers to fit than to answer, and nothing pulls."""
    whole, text = heard(6, slots=20, asked=3)
    kept = text.slots.positions % 2 == 0
    plain = text.slots.select(kept)
    soft, hard = (Refit(ridge=r)(text, kept, effects(text), KNorm()) for r in (0.3, 1e-9))
    errors = [float(error(whole, text, s)) for s in (plain, soft.slots, hard.slots)]
    assert errors[1] < 0.5 * errors[0] and errors[2] < 1e-6
    assert torch.equal(soft.slots.keys, plain.keys) and int(soft.merged.sum()) == 0
    assert torch.equal(soft.lost, ~kept & text.slots.valid)


def test_heads_that_give_nothing_up_stay_as_they_are() -> None:
    _, text = heard(7)
    kept = text.slots.positions < 5
    kept[:, 1] = True
    found = Refit()(text, kept, effects(text), KNorm()).slots
    assert torch.equal(found.values[:, 1], text.slots.values[:, 1])
    assert torch.equal(found.log_votes[:, 1], text.slots.log_votes[:, 1])
    assert not torch.equal(found.values[:, 0, -5:], text.slots.values[:, 0, :5])


@pytest.mark.parametrize("n, k", [(6, 9), (9, 6)])
def test_ridge_regression(n: int, k: int) -> None:
    torch.manual_seed(n)
    x, y, valid = torch.randn(2, n, k, dtype=F64), torch.randn(2, n, 3, dtype=F64), torch.ones(2, k, dtype=torch.bool)
    x[1, :, 0], valid[1, 0] = 0.0, False
    got = ridge(x, y, relative(0.3, x, valid))
    for i in range(2):
        pull = 0.3 * x[i].square().sum() / valid[i].sum()
        stacked = torch.cat((x[i], pull.sqrt() * torch.eye(k, dtype=F64)))
        expected = torch.linalg.lstsq(stacked, torch.cat((y[i], torch.zeros(k, 3, dtype=F64)))).solution
        assert_close(got[i], expected)


# keepkv.rehearse


def read(name: str, lengths: tuple[int, ...] = LENGTHS, **options: Any) -> tuple[Any, Any]:
    inputs = batch(lengths)
    options = {"when": DEFERRED, "sinks": 2, "window": 2, "rehearsed": True} | options
    cache = keepkv.Cache(zoo.model(name), "keepkv2", 8, **options)
    feed(name, cache, **inputs)
    return cache, inputs


def feed(name: str, cache: keepkv.Cache, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    positions = (attention_mask.cumsum(-1) - 1)[:, -input_ids.shape[1] :].clamp_min(0)
    with torch.no_grad():
        logits: Tensor = zoo.model(name)(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=positions, **{CACHE: cache}
        ).logits[:, -1]
    return logits


def after(name: str, cache: keepkv.Cache, inputs: dict[str, Tensor]) -> Tensor:
    """Logits of two tokens fed after compression."""
    cache.compress()
    mask, found = inputs["attention_mask"], []
    for token in (5, 8):
        mask = torch.cat((mask, mask.new_ones(len(mask), 1)), dim=1)
        found.append(feed(name, cache, mask.new_full((len(mask), 1), token), mask))
    return torch.stack(found, 1)


@pytest.mark.parametrize("name", ["llama", "gpt-oss"])  # plain; sliding layers and sinks
@pytest.mark.parametrize("store", ["flat", "int8"])
def test_a_row_alone_compresses_as_in_its_batch(name: str, store: str) -> None:
    mine, inputs = read(name, store=store)
    before = mine.copy()
    keepkv.rehearse(zoo.model(name), mine, **inputs, questions=QUESTIONS, pieces=3, piece=6)
    assert mine.get_seq_length() == 41 and not mine.report().compressed
    for one, other in zip(mine.compressible, before.compressible, strict=True):  # only what is remembered changed
        a, b = one.store.tensors(), other.store.tensors()
        assert a.keys() == b.keys() and all(torch.equal(x, b[key]) for key, x in a.items())
        asked = one.score_state[NAMES[1]]
        assert asked.shape == (3, 4 + 2 + 3 * 6) and (asked >= 0).sum(-1).tolist() == [24, 24, 21]
        assert (asked[:, :4] == torch.tensor(LENGTHS)[:, None] + torch.arange(4)).all()
    out = after(name, mine, inputs)
    assert torch.isfinite(out).all() and mine.report().compressed
    for i in range(3):
        alone = row(inputs, i)
        own = read(name, (LENGTHS[i],), store=store)[0].copy()
        own.reset()
        feed(name, own, **alone)
        keepkv.rehearse(zoo.model(name), own, alone["input_ids"], questions=QUESTIONS, pieces=3, piece=6)
        # In 8 bits, numbers that differ in the last place may fall on either side of a step.
        assert_close(after(name, own, alone)[0], out[i], rtol=1e-3, atol=2e-2 if store == "int8" else 1e-3)


def test_what_was_remembered_is_let_go() -> None:
    cache, inputs = read("llama")
    keepkv.rehearse(zoo.model("llama"), cache, **inputs, questions=QUESTIONS)
    held = cache.report().bytes
    cache.compress()
    assert cache.report().bytes < held / 2
    assert not any(layer.score_state for layer in cache.compressible)


def test_pieces_begin_and_end_with_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    cache, inputs = read("llama")
    fed = []

    def watch(model: Any, twin: keepkv.Cache, ids: Tensor, mask: Tensor) -> None:
        fed.append(ids)
        read_behind(model, twin, ids, mask)

    monkeypatch.setattr("keepkv.engine.passes.rehearse.feed", watch)
    keepkv.rehearse(zoo.model("llama"), cache, **inputs, pieces=3, piece=10)
    first, middle, last = (fed[i] for i in (0, 2, 4))  # the two longer rows; the shortest is read alone between
    rows = [inputs["input_ids"][i, -n:] for i, n in enumerate(LENGTHS)]
    for i in range(2):
        assert torch.equal(first[i], rows[i][:10]) and torch.equal(last[i], rows[i][-10:])
        start = (LENGTHS[i] - 10) // 2
        assert torch.equal(middle[i], rows[i][start : start + 10])
    assert all(torch.equal(fed[i][0], rows[2]) for i in (1, 3, 5))


def test_misuse_is_refused() -> None:
    model, (cache, inputs) = zoo.model("llama"), read("llama")
    with pytest.raises(CacheStateError, match="no question was rehearsed"):
        cache.copy().compress()
    with pytest.raises(KeepKVError, match="give questions"):
        keepkv.rehearse(model, cache, **inputs, pieces=0)
    with pytest.raises(KeepKVError, match="at least 2 tokens"):
        keepkv.rehearse(model, cache, **inputs, piece=1)
    for wrong in (torch.zeros(2, 3), torch.tensor([0.5]), []):
        with pytest.raises(UnsupportedInput, match="token ids"):
            keepkv.rehearse(model, cache, **inputs, questions=[wrong])
    with pytest.raises(UnsupportedInput, match="not what the cache has read"):
        keepkv.rehearse(model, cache, inputs["input_ids"][:, 1:], inputs["attention_mask"][:, 1:])
    keepkv.rehearse(model, cache, **inputs)
    cache.compress()
    with pytest.raises(CacheStateError, match="compressed before"):
        keepkv.rehearse(model, cache, **inputs)
    plain, _ = read("llama", rehearsed=False)
    with pytest.raises(KeepKVError, match="rehearsed=True"):
        keepkv.rehearse(model, plain, **inputs)
    with pytest.raises(KeepKVError, match="give one of them"):
        keepkv.Cache(model, "keepkv2", 0.2, merge=0.8, rehearsed=True)
    for options in ({"floor": -1.0}, {"power": -0.1}):
        with pytest.raises(KeepKVError):
            Rehearsed(KNorm(), **options)
    with pytest.raises(KeepKVError):
        Refit(ridge=0.0)


def test_evaluations_rehearse_what_the_setup_says() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = embedded_model()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    said = likely(tokenizer, [("\nWhat is panda?", " panda is")])
    assert tokenizer.decode(said[0]) == "\nWhat is panda? panda is"
    setup = Setup(
        model="embedded", tasks=("niah-multikey-1",), variants=(Variant("keepkv2", {"rehearsed": True}),),
        budgets=("20%bytes",), lengths=(512,), items=2, questions=(("\nWhat is panda?", " panda is"),),
    )  # fmt: skip
    unit = next(unit for unit in setup.units() if unit.variant.method == "keepkv2")
    found = run(model, tokenizer, setup, unit, build(tokenizer, setup, unit))
    scores = [record.score for record in found.items]
    assert len(scores) == 2 and sum(scores) > 1.0 and all(record.ratio <= 0.2 for record in found.items)
