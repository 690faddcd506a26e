"""The score ``future``: what it samples, where it sends queries, and what dropping a slot really changes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

import keepkv
import zoo
from keepkv.errors import KeepKVError
from keepkv.reduce.merge import KeepKV, heaviest
from keepkv.rope import Rope
from keepkv.score.future import Future, moments
from keepkv.score.sample import remember_sample, sample
from keepkv.slots import LayerView
from keepkv.spread import spread
from running import batch, generate
from score_views import row, rows_of, together

ROPE = Rope(torch.tensor([1.0, 0.3, 0.05]))


def observed(score: Future, view: LayerView) -> LayerView:
    view = replace(view, state={}, memo={}, rope=ROPE)
    score.observe(view)
    return view


def dropped(view: LayerView, queries: Tensor, slot: int, b: int, head: int) -> tuple[Tensor, Tensor]:
    """Output (R,Dv) of one query head with all slots, and without one, in float64."""
    s, h = view.slots, head // view.groups
    valid = s.valid[b, h].clone()
    outs = []
    for _ in range(2):
        logits = queries[b, head].double() @ s.keys[b, h].double().T * view.scaling
        if view.softcap is not None:
            logits = torch.tanh(logits / view.softcap) * view.softcap
        logits = (logits + s.log_votes[b, h].double()).masked_fill(~valid, float("-inf"))
        if view.sinks is not None:
            logits = torch.cat((logits, view.sinks[head].double().expand(len(logits), 1)), dim=-1)
        outs.append(logits.softmax(-1)[:, : len(valid)] @ s.values[b, h].double())
        valid[slot] = False
    return outs[0], outs[1]


@pytest.mark.parametrize("moment", [1, 2])
@pytest.mark.parametrize("options", [{}, {"softcap": 1.5}, {"sinks": torch.tensor([0.5, -1.0, 2.0, 0.0])}])
def test_the_score_is_what_dropping_a_slot_changes(options: dict[str, Any], moment: int) -> None:
    view = together([row(1, **options), row(2, slots=9, **options)])
    queries = torch.randn(2, 4, 5, 8, dtype=torch.float64)
    positions = torch.tensor([[20, 21, 30, 22, 25], [-1, -1, 15, 14, 20]])
    got, mass = moments(view, queries, positions, moment)
    for b, h, slot in ((b, h, s) for b in range(2) for h in range(2) for s in range(14)):
        if view.slots.positions[b, h, slot] < 0:
            assert mass[b, h, slot] == 0
            continue
        changes = []
        for head in (2 * h, 2 * h + 1):
            full, without = dropped(view, queries, slot, b, head)
            changes.append((full - without)[positions[b] >= 0].norm(dim=-1) ** moment)
        assert_close(got[b, h, slot].double(), torch.cat(changes).mean(), rtol=1e-4, atol=1e-8)


def test_tiles_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    view = together([row(3), row(4, slots=9)])
    positions = torch.tensor([[20, 21, 30], [-1, 15, 14]])
    for moment in (1, 2):
        whole = moments(view, view.queries[:, :, :3], positions, moment)
        with monkeypatch.context() as patch:
            patch.setattr("keepkv.score.future.TILE", 1)
            assert_close(moments(view, view.queries[:, :, :3], positions, moment), whole)


def test_queries_are_sent_behind_the_text() -> None:
    """Turned back by its own position and on to the new one, which differs from query to query."""
    score, view = Future(queries=5, span=7, skip=0.25), row(5, slots=14, queries=14)
    view = observed(score, view)
    held, positions = sample(view, 5)
    queries, there = score.ahead(view)
    used = there[0] >= 0
    assert torch.equal(used, positions[0] >= 14 // 4)
    assert ((there[0, used] > 13) & (there[0, used] <= 14 + 7 - 1 + 1)).all()
    at = positions[:, None].clamp(min=0)
    expected = ROPE.rotate(ROPE.unrotate(held, at), there[:, None].clamp(min=0))
    assert_close(queries[:, :, used], expected[:, :, used])
    steps = 1 + (spread(spread(torch.arange(10_000))) * 128 >> 32)
    assert steps.min() == 1 and steps.max() == 128 and steps.double().mean().sub(64.5).abs() < 0.5


@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=3), chunk=st.integers(1, 31), size=st.integers(1, 12))
def test_a_sample_does_not_know_of_chunks_or_padding(lengths: list[int], chunk: int, size: int) -> None:
    longest, state = max(lengths), {}
    queries, positions = torch.randn(len(lengths), 4, longest, 8), torch.full((len(lengths), longest), -1)
    for b, length in enumerate(lengths):
        positions[b, longest - length :] = torch.arange(length)
    view = replace(row(6), state=state)
    for start in range(0, longest, chunk):
        part = slice(start, start + chunk)
        remember_sample(replace(view, queries=queries[:, :, part], query_positions=positions[:, part]), size)
    for b, length in enumerate(lengths):
        chosen = spread(torch.arange(length)).argsort()[:size].sort().values
        assert torch.equal(state["sample_positions"][b, -len(chosen) :], chosen)
        assert (state["sample_positions"][b, : -len(chosen)] == -1).all()
        at = longest - length + chosen
        assert torch.equal(state["sample"][b, :, -len(chosen) :], queries[b, :, at])


def test_a_sample_lies_evenly() -> None:
    gaps = spread(torch.arange(4096)).argsort()[:64].sort().values.diff()
    assert gaps.max() <= 3 * gaps.min()


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 99), sizes=st.lists(st.integers(3, 14), min_size=2, max_size=4))
def test_a_row_scores_as_it_does_alone(seed: int, sizes: list[int]) -> None:
    score = Future(queries=4, span=16)
    views = [row(seed + n, slots=size, queries=size) for n, size in enumerate(sizes)]
    got = score(observed(score, together(views)))
    for b, view in enumerate(views):
        assert_close(got[b : b + 1, :, got.shape[2] - view.slots.shape[2] :], score(observed(score, view)))
    order = list(reversed(range(len(views))))
    assert_close(score(observed(score, rows_of(together(views), order))), got[order])


def test_extreme_input_gives_finite_scores() -> None:
    score = Future(queries=4)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        view = together([row(21, scale=60.0, dtype=dtype), row(22, slots=5, dtype=dtype)])
        view.query_positions[1] = -1
        view = observed(score, view)
        got = score(view)
        assert got.dtype == torch.float32 and got[view.slots.valid].isfinite().all()
        assert not score.masses(view).isnan().any()


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 999), share=st.floats(0.01, 1.0))
def test_the_fewest_slots_that_hold_a_share(seed: int, share: float) -> None:
    torch.manual_seed(seed)
    u, among = 3 * torch.randn(2, 2, 20, dtype=torch.float64), torch.rand(2, 2, 20) < 0.7
    chosen = heaviest(u, among, share)
    assert (chosen <= among).all()
    for mass, some, all_ in zip(u.exp().flatten(0, 1), chosen.flatten(0, 1), among.flatten(0, 1), strict=True):
        if all_.any():
            total = mass[all_].sum()
            assert mass[some].sum() >= share * total * (1 - 1e-9)
            assert mass[some].sum() - mass[some].min() < share * total * (1 + 1e-9)
            assert mass[some].min() >= mass[all_ & ~some].max() if (all_ & ~some).any() else True


def test_merges_take_the_masses_that_the_score_predicts() -> None:
    """Bias: ln of the mass of the group over that of the anchor, means over the queries to come."""
    score = Future(queries=6, span=8)
    view = observed(score, row(7, slots=20, queries=20))
    keep = torch.zeros(1, 2, 20, dtype=torch.bool)
    keep[..., ::4] = True
    scores = score(view)
    reduced = KeepKV(threshold=None)(view, keep, scores, score)
    mass = score.masses(view).exp()
    for h in range(2):
        unit = torch.nn.functional.normalize(view.slots.keys[0, h].double(), dim=-1)
        near = (unit @ unit[::4].T).argmax(-1)
        for anchor in range(5):
            mine = [s for s in range(20) if s == 4 * anchor or (s % 4 and near[s] == anchor)]
            ratio = mass[0, h, mine].sum() / mass[0, h, 4 * anchor]
            value = (mass[0, h, mine, None] * view.slots.values[0, h, mine]).sum(0) / mass[0, h, mine].sum()
            was = view.slots.log_votes[0, h, 4 * anchor]
            assert_close(reduced.slots.log_votes[0, h, anchor].double(), (was + ratio.log()).double())
            assert_close(reduced.slots.values[0, h, anchor].double(), value.double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("arch", ["llama", "gpt-oss", "phi3"])
def test_compressing_while_decoding(arch: str) -> None:
    model, method = zoo.model(arch), keepkv.Method(score=Future(queries=8), window=4, when=keepkv.When(every=5))
    cache = keepkv.Cache(model, method, 20)
    out = generate(model, batch((40, 23)), cache, new=14)
    assert out.scores_.isfinite().all()
    assert all(int(layer.store.view().lengths.max()) <= 20 + 5 for layer in cache._ours)


@pytest.mark.parametrize("options", [{"queries": 0}, {"span": 0}, {"skip": 1.0}, {"moment": 3}])
def test_what_cannot_be_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(KeepKVError):
        Future(**options)
    with pytest.raises(KeepKVError):
        KeepKV(coverage=0.0)
