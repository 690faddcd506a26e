"""Attention Matching on rehearsed questions: keys, biases and values against loops in float64, rows and refusals."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import zoo
from running import batch, row
from score_views import F64, loop_weights, part_of_queries
from score_views import row as one_row
from test_rehearse import feed
from torch import Tensor
from torch.testing import assert_close

import keepkv
from keepkv.core.slots import LayerView
from keepkv.errors import CacheStateError, KeepKVError
from keepkv.observe.rehearsal import NAMES
from keepkv.reduce.matching import Matching
from keepkv.score.passes.asked import Asked
from keepkv.score.passes.rehearsed import Listen

DEFERRED = keepkv.When("deferred")
QUESTIONS = (torch.tensor([7, 9, 11, 4]), [5, 6])
LENGTHS = (41, 23, 5)


def heard(seed: int, slots: int = 24, asked: int = 6) -> tuple[LayerView, list[Tensor]]:
    """A text that has heard two questions, blank columns in front of the second; and by loops, for each KV head, the
    attention of all their queries to the text alone (N,S)."""
    whole = replace(one_row(seed, slots=slots, queries=asked), state={}, memo={})
    Listen().observe(whole)
    text = part_of_queries(whole, 0, 0)
    text.seen = whole.seen - asked
    state = {}
    for name in NAMES:
        x, dim = whole.state[name], 1 + (name != NAMES[1])
        blank = x.narrow(dim, 0, 2).clone().fill_(-1 if name == NAMES[1] else 0)
        state[name] = torch.cat((x, blank, x.flip(dim).narrow(dim, 0, 3).flip(dim)), dim=dim)
    n = text.slots.shape[2]
    every = loop_weights(whole)[..., :n]  # (B,H*G,T,S)
    alone = every / every.sum(-1, keepdim=True)
    alone = torch.cat((alone, alone[:, :, -3:]), dim=2)
    return replace(text, state=state, memo={}, protected=None), [
        alone[0, 2 * h : 2 * h + 2].flatten(0, 1) for h in (0, 1)
    ]


@pytest.mark.parametrize("pool", ["rms", "max"])
def test_keys_are_those_of_largest_attention_to_the_text_alone(pool: str) -> None:
    text, attention = heard(1)
    got = Asked(pool)(text)
    for h, a in enumerate(attention):
        assert_close(
            got[0, h].double(), a.square().mean(0).sqrt() if pool == "rms" else a.amax(0), rtol=1e-5, atol=1e-7
        )


def test_biases_and_values_match_mass_and_output() -> None:
    text, attention = heard(2)
    s = text.slots
    exact = s.with_(keys=s.keys.double(), values=s.values.double(), log_votes=s.log_votes.double())
    state = {k: x.double() if x.is_floating_point() else x for k, x in text.state.items()}
    view = replace(text, slots=exact, state=state)
    scores = Asked()(view)
    keep = torch.zeros_like(s.valid).scatter(2, scores.topk(6).indices, True)
    reduce = Matching(iterations=50_000, bound=2.0, ridge=0.01, prior="zero", rehearsed=True)
    got, plain = reduce(view, keep, scores, Asked()), exact.select(keep)
    assert torch.equal(got.slots.keys, plain.keys) and torch.equal(got.lost, s.valid & ~keep)
    for h, full in enumerate(attention):
        a = full[:, keep[0, h]].to(F64)  # e^u / Z(q)
        w = (got.slots.log_votes - plain.log_votes)[0, h].exp()
        gradient, beta = a.T @ (a @ w - 1), w.log()
        low, high = beta <= -2 + 1e-6, beta >= 2 - 1e-6
        assert (gradient[~low & ~high].abs() <= 1e-4).all()
        assert (gradient[low] >= -1e-4).all() and (gradient[high] <= 1e-4).all()
        hat = a * w / (a @ w)[:, None]
        penalty = 0.01 * hat.square().sum(1).mean()
        normal = hat.T @ hat + penalty * torch.eye(6, dtype=F64)
        want = normal.inverse() @ hat.T @ (full.to(F64) @ exact.values[0, h])
        assert_close(got.slots.values[0, h], want, rtol=0, atol=1e-5)


def read(name: str, lengths: tuple[int, ...] = LENGTHS, **options: Any) -> tuple[Any, Any]:
    inputs = batch(lengths)
    options = {"when": DEFERRED, "sinks": 2, "window": 2, "rehearsed": True} | options
    cache = keepkv.Cache(zoo.model(name), "attention-matching", 8, **options)
    feed(name, cache, **inputs)
    return cache, inputs


def after(name: str, cache: keepkv.Cache, inputs: dict[str, Tensor]) -> Tensor:
    """Logits of a token fed after compression."""
    with torch.no_grad():
        cache.compress()
    mask = torch.cat((inputs["attention_mask"], inputs["attention_mask"].new_ones(len(inputs["input_ids"]), 1)), dim=1)
    return feed(name, cache, mask.new_full((len(mask), 1), 5), mask)


@pytest.mark.parametrize("allocate", ["uniform", "pooled"])
@pytest.mark.parametrize("name", ["llama", "gpt-oss"])  # plain; sliding layers and sinks
def test_a_row_alone_compresses_as_in_its_batch(name: str, allocate: str) -> None:
    mine, inputs = read(name, allocate=allocate)
    keepkv.rehearse(zoo.model(name), mine, **inputs, questions=QUESTIONS, pieces=3, piece=6)
    out = after(name, mine, inputs)
    assert torch.isfinite(out).all() and mine.report().compressed and mine.report().largest_vote > 1
    for i in range(3):
        alone = row(inputs, i)
        own = read(name, (LENGTHS[i],), allocate=allocate)[0].copy()
        own.reset()
        feed(name, own, **alone)
        keepkv.rehearse(zoo.model(name), own, alone["input_ids"], questions=QUESTIONS, pieces=3, piece=6)
        assert_close(after(name, own, alone)[0], out[i], rtol=1e-3, atol=2e-3)


def test_without_questions_nothing_is_compressed() -> None:
    cache, _ = read("llama")
    with pytest.raises(CacheStateError, match="no question was rehearsed"):
        cache.compress()


def test_questions_that_the_model_asks_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each row goes on by itself with the likeliest tokens, as ``generate`` does, and ends where its text ends."""
    model, inputs = zoo.model("llama"), batch(LENGTHS)
    start, said = torch.tensor([7, 9]), []
    for i in range(3):
        ids = torch.cat((row(inputs, i)["input_ids"], start[None]), dim=1)
        out = model.generate(ids, max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=0)
        said.append(out[0, ids.shape[1] :])
    for end in (-1, int(said[0][3])):
        cache, _ = read("llama")
        monkeypatch.setattr(model.generation_config, "eos_token_id", end)
        keepkv.rehearse(model, cache, **inputs, pieces=0, begun=[start], new=5)
        positions = cache.compressible[0].score_state[NAMES[1]]
        for i, length in enumerate(LENGTHS):
            new = said[i].tolist()
            count = 2 + (new.index(end) if end in new else 5)
            assert positions[i][positions[i] >= 0].tolist() == list(range(length, length + count))
        if end == -1:
            heard_alone, _ = read("llama")
            keepkv.rehearse(model, heard_alone, **inputs, pieces=0, questions=[torch.cat((start, said[0]))])
            mine, other = (c.compressible[0].score_state[NAMES[0]][0] for c in (cache, heard_alone))
            assert_close(mine, other, rtol=1e-4, atol=1e-5)
    with pytest.raises(KeepKVError, match="new=0"):
        keepkv.rehearse(model, cache, **inputs, begun=[start], new=0)
