"""The score of keepkv2: leverage of key contents, and the attention of the window, against loops in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import zoo
from hypothesis import given
from hypothesis import strategies as st
from running import batch, generate
from score_views import F64, row, together
from torch import Tensor
from torch.testing import assert_close

import keepkv
from keepkv import kernels
from keepkv.core.rope import Rope
from keepkv.core.slots import LayerView
from keepkv.errors import KeepKVError
from keepkv.kernels.leverage.reference import evenly_spaced
from keepkv.score.content.leverage import Leverage

ROPE = Rope(torch.tensor([1.0, 0.3, 0.05]))


def view_of(seed: int, rope: Rope | None = ROPE, **options: Any) -> LayerView:
    return replace(row(seed, **options), rope=rope, state={}, memo={})


def leverage(view: LayerView, ridge: float, sample: int | None = None) -> Tensor:
    s = view.slots
    return kernels.key_leverage(s.keys, s.positions, s.log_votes, ridge=ridge, rope=view.rope, sample=sample)


def naive_leverage(view: LayerView, b: int, h: int, ridge: float, sample: int | None = None) -> Tensor:
    """Of the valid slots of one head, by an explicit inverse."""
    s, live = view.slots, view.slots.valid[b, h]
    keys = s.keys[b, h].double()
    if view.rope is not None:
        keys = view.rope.unrotate(keys, s.positions[b, h].clamp(min=0))
    keys, votes = keys[live], s.log_votes[b, h, live].double().exp()
    if sample is not None and sample < len(keys):
        drawn = {i * len(keys) // sample for i in range(sample)}
        votes = torch.tensor([v if i in drawn else 0.0 for i, v in enumerate(votes.tolist())], dtype=F64)
    w = votes / votes.sum()
    keys = keys - w @ keys
    sigma = sum(w[i] * torch.outer(keys[i], keys[i]) for i in range(len(keys)))
    inverse = torch.linalg.inv(sigma + ridge * sigma.trace() / len(sigma) * torch.eye(len(sigma), dtype=F64))
    return torch.stack([k @ inverse @ k for k in keys])


@pytest.mark.parametrize("rope", [ROPE, None])
@pytest.mark.parametrize("ridge", [0.1, 1.0])
@pytest.mark.parametrize("sample", [None, 5, 11])  # of 14 and 9 slots
def test_leverage_is_what_an_inverse_gives(rope: Rope | None, ridge: float, sample: int | None) -> None:
    view = together([view_of(1, rope), view_of(2, rope, slots=9)])
    got = leverage(view, ridge, sample)
    for b, h in ((b, h) for b in range(2) for h in range(2)):
        live = view.slots.valid[b, h]
        assert_close(got[b, h, live].double(), naive_leverage(view, b, h, ridge, sample), rtol=1e-4, atol=1e-6)
        assert (got[b, h, ~live] == 0).all()


def test_tiles_of_slots_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    view = together([view_of(3), view_of(4, slots=9)])
    whole = [leverage(view, 1.0, sample) for sample in (None, 4)]
    monkeypatch.setattr("keepkv.kernels.leverage.reference._SLOTS", 3)
    assert_close([leverage(view, 1.0, sample) for sample in (None, 4)], whole)


@given(st.lists(st.booleans(), min_size=1, max_size=40), st.integers(1, 12))
def test_a_sample_is_spread_over_the_valid_slots(held: list[bool], sample: int) -> None:
    """Wherever empty slots are; all are taken where there are no more."""
    at = evenly_spaced(torch.tensor(held)[None, None], sample)
    valid = [i for i, v in enumerate(held) if v]
    if at is None:
        assert len(held) <= sample
        return
    drawn = [i for i in at[0, 0].tolist() if i >= 0]
    expected = [valid[j * len(valid) // sample] for j in range(sample)] if len(valid) > sample else valid
    assert drawn == expected and at.shape == (1, 1, sample)


def test_the_sum_is_the_same_in_every_head_however_its_keys_are_scaled() -> None:
    view = view_of(5, slots=40)
    w = view.slots.log_votes.softmax(-1)
    total = (w * leverage(view, 1e-6)).sum(-1)
    assert_close(total, torch.full_like(total, view.slots.keys.shape[-1]), rtol=1e-3, atol=0)
    scaled = replace(view, slots=view.slots.with_(keys=view.slots.keys * 1e4))
    assert_close(leverage(scaled, 1.0), leverage(view, 1.0), rtol=1e-3, atol=1e-5)


def test_positions_do_not_count() -> None:
    """The same contents elsewhere in the text have the same leverage."""
    view = view_of(6)
    contents = ROPE.unrotate(view.slots.keys, view.slots.positions)
    there = view.slots.positions + 1000
    moved = replace(view, slots=view.slots.with_(keys=ROPE.rotate(contents, there), positions=there))
    assert_close(leverage(moved, 1.0), leverage(view, 1.0), rtol=1e-3, atol=1e-4)


def test_votes_are_duplicates() -> None:
    view = view_of(7, rope=None)
    votes = torch.zeros_like(view.slots.log_votes)
    votes[..., 2] = torch.tensor(3.0).log()
    one = replace(view, slots=view.slots.with_(log_votes=votes))
    plain = view.slots.with_(log_votes=torch.zeros_like(votes))
    extra = plain.map(lambda x: x[:, :, 2:3])
    three = replace(view, slots=plain.join(extra).join(extra))
    assert_close(leverage(one, 1.0), leverage(three, 1.0)[..., :14], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("keys", [torch.zeros(1, 2, 14, 8), torch.ones(1, 2, 14, 8), 1e18 * torch.randn(1, 2, 14, 8)])
def test_keys_that_say_nothing_are_finite(keys: Tensor) -> None:
    view = view_of(8)
    got = leverage(replace(view, slots=view.slots.with_(keys=keys)), 1.0)
    assert torch.isfinite(got).all()


# attention of the window


@pytest.mark.parametrize("options", [{}, {"softcap": 1.5}])
def test_the_score_takes_the_largest_attention_of_the_window_nearby(options: dict[str, Any]) -> None:
    view = replace(view_of(4, slots=14, queries=14), **options)
    score = Leverage(queries=6, kernel=3, floor=2.0)
    score.observe(view)
    got = score(view)
    for h in range(2):
        heads = []
        for g in range(view.query_groups):
            logits = (
                view.queries[0, h * view.query_groups + g, 8:].double()
                @ view.slots.keys[0, h].double().T
                * view.scaling
            )
            if view.softcap is not None:
                logits = torch.tanh(logits / view.softcap) * view.softcap
            logits = logits + view.slots.log_votes[0, h].double()
            later = view.slots.positions[0, h] > view.query_positions[0, 8:, None]
            heads.append(logits.masked_fill(later, float("-inf")).softmax(-1))
        a = torch.stack(heads)
        near = a.amax((0, 1))
        peak = torch.stack([near[max(0, i - 1) : i + 2].max() for i in range(14)])
        expected = naive_leverage(view, 0, h, score.ridge) * (peak + 2 * peak.mean())
        assert_close(got[0, h].double(), expected, rtol=1e-4, atol=1e-8)
        assert_close(score.masses(view)[0, h].double().exp(), a.mean((0, 1)), rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("sample", [1024, 7])
def test_a_padded_row_scores_as_it_does_alone(sample: int) -> None:
    rows = [view_of(2, slots=23, queries=23), view_of(3, slots=9, queries=9)]
    score = Leverage(queries=6, kernel=5, sample=sample)
    both = replace(together(rows), state={})
    score.observe(both)
    got = score(both)
    for b, alone in enumerate(rows):
        score.observe(alone)
        assert_close(got[b][both.slots.valid[b]], score(alone)[0][alone.slots.valid[0]], rtol=1e-4, atol=1e-6)


def test_options_that_mean_nothing_are_refused() -> None:
    for wrong in ({"queries": -1}, {"kernel": 0}, {"kernel": 4}, {"ridge": 0.0}, {"floor": -1.0}, {"sample": 1}):
        with pytest.raises(KeepKVError):
            Leverage(**wrong)


# the method


def test_layers_share_one_budget() -> None:
    """What one layer does not need another gets, and the total is exact."""
    model = zoo.model("llama")
    cache = keepkv.Cache(model, "keepkv2", 14, window=4, sinks=2)
    generate(model, batch((61, 40)), cache, new=1)
    kept = torch.tensor([cache.report().kept[i] for i in range(3)])  # (layers, rows, heads)
    assert kept.sum((0, 2)).tolist() == [14 * 3 * 2] * 2
    assert len(set(kept.sum(2)[:, 0].tolist())) > 1
    assert cache.report().compressions == 3


def test_the_window_costs_what_the_receipt_says() -> None:
    """While the cache goes on compressing they are held, and counted; without them nothing is."""
    model, inputs = zoo.model("llama"), batch((61,))
    sizes = []
    for queries in (8, 0):
        cache = keepkv.Cache(model, "keepkv2", 14, window=4, sinks=2, queries=queries, when=keepkv.When(every=4))
        generate(model, inputs, cache, new=6)
        sizes.append(cache.report().bytes)
    assert sizes[0] > sizes[1]


@pytest.mark.parametrize("options", [{"merge": 0.5}, {"allocate": "adakv"}, {"score": "keydiff"}, {"queries": 0}])
def test_parts_are_exchangeable(options: dict[str, Any]) -> None:
    model = zoo.model("llama")
    cache = keepkv.Cache(model, "keepkv2", 14, window=4, sinks=2, **options)
    out = generate(model, batch((61, 33)), cache, new=3)
    assert torch.isfinite(out.scores_).all() and cache.report().compressed
    assert (cache.report().merged > 0) == ("merge" in options)
