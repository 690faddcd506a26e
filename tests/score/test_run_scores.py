"""Scores of runs of tokens against loops in float64: LagKV, CurDKV, chunks, ChunkKV, blocks; FINCH, LRU, filters."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from statistics import median_low

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from score_views import loop_weights, part_of_queries, row, together
from torch import Tensor

from keepkv.allocate.select import keep_mask
from keepkv.core.slots import LayerView
from keepkv.errors import CalibrationError, KeepKVError
from keepkv.score import LRU, Block, Chunk, ChunkKV, CurDKV, Finch, KeyDiff, KNorm, LagKV, QFilter, Score, SnapKV
from keepkv.score.queries.lru import NEVER, STAT

F64 = torch.float64


def ready(score: Score, view: LayerView) -> LayerView:
    stats = {name: torch.full(view.slots.shape, x.start) for name, x in score.stats.items()}
    view = replace(view, slots=view.slots.with_(stats=stats), state={})
    score.observe(view)
    return view


def scored(score: Score, view: LayerView) -> Tensor:
    return score(ready(score, view))


def batch(**options: object) -> LayerView:
    return together([row(3, slots=23, **options), row(4, slots=17, queries=5), row(5, slots=6)])


def live(view: LayerView, b: int) -> list[int]:
    return [s for s in range(view.slots.shape[2]) if view.slots.positions[b, 0, s] >= 0]


def heads_of(view: LayerView) -> list[tuple[int, int]]:
    return [(b, h) for b in range(view.slots.shape[0]) for h in range(view.slots.shape[1])]


# --- LagKV, CurDKV -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cross", [False, True])
def test_lagkv(cross: bool) -> None:
    view, lag, sinks = batch(), 5, 2
    got = LagKV(lag, sinks, cross)(view)
    for b, h in heads_of(view):
        slots = live(view, b)
        runs = [slots[n : n + lag] for n in range(sinks, len(slots) - lag + 1, lag)]
        wanted = {s: 2.0 if n < sinks else 1 + n / len(slots) for n, s in enumerate(slots)}
        for run, following in pairwise(runs):
            total = torch.zeros(lag, dtype=F64)
            for x in (view.slots.keys[b, h].double(), view.slots.values[b, h].double()):
                low, high = x[following].min(0).values, x[following].max(0).values
                total += ((x[run] - low) / (high - low)).std(-1).softmax(-1) / 2
            for s, value in zip(run, total.tolist(), strict=True):
                wanted[s] = value if cross else sum(value > other for other in total.tolist()) / lag
        for s in slots:
            assert math.isclose(got[b, h, s], wanted[s], rel_tol=1e-5), (b, h, s)


def test_lagkv_of_a_compressed_run_ranks_from_the_best() -> None:
    """Slots that stayed in an earlier compression are not the worst of their run now."""
    view = row(6, slots=23)
    got = LagKV(5, 2)(view)
    first = got[0, 0, 2:7]
    keep = torch.ones(1, 2, 23, dtype=torch.bool)
    keep[0, :, 2:7] = False
    keep[0, 0, 2 + int(first.argmax())] = keep[0, 1, 2] = True
    again = LagKV(5, 2)(replace(view, slots=view.slots.select(keep)))
    assert torch.allclose(first.max(), torch.tensor(0.8)) and torch.allclose(again[0, :, 2], torch.tensor([0.8, 0.8]))


def test_channels_that_do_not_vary_say_nothing() -> None:
    view = row(7, slots=12)
    view.slots.keys[:, :, 6:10] = 1.0
    assert LagKV(4, 2, True)(view).isfinite().all()


@pytest.mark.parametrize("of", ["product", "mean", "key", "value"])
@pytest.mark.parametrize("size", [0, 4])
def test_curdkv(of: str, size: int) -> None:
    view = batch()
    got = CurDKV(of, size)(view)
    for b, h in heads_of(view):
        slots = live(view, b)
        shares = []
        for x in (view.slots.keys, view.slots.values):
            length = [float(x[b, h, s].double().square().sum() * view.slots.log_votes[b, h, s].exp()) for s in slots]
            runs = [sum(length[n // size * size : n // size * size + size]) if size else sum(length)
                    for n in range(len(slots))]  # fmt: skip
            shares.append([a / t for a, t in zip(length, runs, strict=True)])
        key, value = shares
        both = {
            "product": [a * b for a, b in zip(key, value, strict=True)],
            "mean": [(a + b) / 2 for a, b in zip(key, value, strict=True)],
            "key": key,
            "value": value,
        }[of]
        for s, x in zip(slots, both, strict=True):
            assert math.isclose(got[b, h, s], x / sum(both), rel_tol=1e-4)


# --- chunks ------------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 99), size=st.integers(2, 9), sizes=st.lists(st.integers(3, 20), min_size=1, max_size=3))
def test_every_chunk_keeps_its_share(seed: int, size: int, sizes: list[int]) -> None:
    """At any budget a chunk keeps its best, and no chunk more than one slot beyond its share."""
    view = together([row(seed + n, slots=x, queries=min(x, 6)) for n, x in enumerate(sizes)])
    score, own = Chunk(KNorm(), size), KNorm()(view)
    got = scored(score, view)
    budget = torch.tensor([[max(1, x // 2)] * 2 for x in sizes])
    kept = keep_mask(got, budget, view)
    for b, h in heads_of(view):
        slots = live(view, b)
        for start in range(0, len(slots), size):
            chunk = slots[start : start + size]
            count = int(kept[b, h, chunk].sum())
            assert abs(count - len(chunk) * int(budget[b, h]) / len(slots)) <= 1
            best = sorted(chunk, key=lambda s: -float(own[b, h, s]))[:count]
            assert {s for s in chunk if kept[b, h, s]} == set(best)


def test_a_chunk_that_was_compressed_keeps_what_it_has() -> None:
    """Half of the first chunk stayed; at the same share all of it stays, and half of the second."""
    view = row(8, slots=16)
    first = keep_mask(scored(Chunk(KNorm(), 8), part(view, 8)), torch.tensor([[4, 4]]), part(view, 8))
    keep = torch.cat((first, torch.ones(1, 2, 8, dtype=torch.bool)), dim=2)
    later = replace(view, slots=view.slots.select(keep))
    kept = keep_mask(scored(Chunk(KNorm(), 8), later), torch.tensor([[8, 8]]), later)
    assert kept[..., :4].all() and (kept[..., 4:].sum(-1) == 4).all()


def part(view: LayerView, slots: int) -> LayerView:
    return replace(view, slots=view.slots.map(lambda x: x[:, :, :slots]), seen=torch.tensor([slots]))


def loop_chunkkv(own: Tensor, size: int, spiky: int) -> list[int]:
    """Tokens in the order in which they are kept; own (S,): scores summed over heads."""
    runs = [list(range(n, min(n + size, len(own)))) for n in range(0, len(own), size)]
    mean = [float(own[run].mean()) for run in runs]
    entropy = []
    for run in runs:
        x = own[run] - min(0.0, float(own[run].min()))
        p = x / (x.sum() + 1e-8)
        h = float(-(p * (p + 1e-8).log()).sum())
        entropy.append(min(1.0, max(0.0, h / math.log(len(run)))) if len(run) > 1 else 0.0)
    order, rest = [], []
    for n in sorted(range(len(runs)), key=lambda n: (-mean[n], n)):
        best = sorted(runs[n], key=lambda s: (-float(own[s]), s))
        gated = spiky and mean[n] >= median_low(mean) and entropy[n] < median_low(entropy)
        order += best[:spiky] if gated else best
        rest += best[spiky:] if gated else []
    return order + sorted(rest, key=lambda s: (-float(own[s]), s))


@pytest.mark.parametrize("spiky", [0, 2])
@pytest.mark.parametrize("inner", [CurDKV(neighbours=0), KNorm()])
def test_chunkkv(inner: Score, spiky: int) -> None:
    view = together([row(n, slots=size, queries=min(size, 6)) for n, size in ((1, 31), (2, 20), (3, 4))])
    got, own = scored(ChunkKV(inner, 5, spiky), view), inner(view)
    assert torch.equal(got[:, 0][view.slots.valid[:, 0]], got[:, 1][view.slots.valid[:, 0]])
    for b in range(3):
        slots = live(view, b)
        wanted = loop_chunkkv(own[b, :, slots].sum(0).double(), 5, spiky)
        found = sorted(range(len(slots)), key=lambda n: -float(got[b, 0, slots[n]]))
        assert found == wanted


# --- blocks ------------------------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 99), budget=st.integers(2, 9), size=st.integers(1, 8))
def test_block(seed: int, budget: int, size: int) -> None:
    view = together([row(seed, slots=20), row(seed + 1, slots=11), row(seed + 2, slots=3, queries=3)])
    view = replace(view, budget=torch.tensor([budget] * 3))
    got = Block(KeyDiff(), size)(view)
    kept = keep_mask(got, torch.tensor([[min(budget, n)] * 2 for n in (20, 11, 3)]), view)
    for b, h in heads_of(view):
        slots = live(view, b)
        held = slots[:budget]
        for start in range(budget, len(slots), size):
            held = held + slots[start : start + size]
            keys = view.slots.keys[b, h, held].double()
            votes = view.slots.log_votes[b, h, held].double().exp()
            anchor = (votes[:, None] * torch.nn.functional.normalize(keys, dim=-1)).sum(0)
            away = -torch.nn.functional.cosine_similarity(keys, anchor[None], dim=-1)
            held = sorted(held[i] for i in away.topk(budget).indices.tolist())
        assert [s for s in slots if kept[b, h, s]] == held


def test_block_refuses_scores_of_queries() -> None:
    with pytest.raises(KeepKVError, match=r"SnapKV looks at queries.*'keydiff'"):
        Block(SnapKV())


def test_what_wrappers_pass_on() -> None:
    for make in (Chunk, ChunkKV):
        assert not make(KNorm()).observes and make(SnapKV(4)).observes
        assert make(SnapKV(4)).remembers == SnapKV(4).remembers and make(LRU()).follows_decode
        assert make(LRU()).stats == LRU.stats and not make(LRU()).needs_rope


# --- questions, touches, filters ---------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", [False, True])
def test_finch(normalize: bool) -> None:
    view = batch()
    got, a = scored(Finch(4, normalize), view), loop_weights(view)
    for b, h in heads_of(view):
        asked = [t for t in range(view.queries.shape[2]) if view.query_positions[b, t] >= 0][-4:]
        for s in live(view, b):
            total = sum(
                float(a[b, head, t, s]) * (int(view.query_positions[b, t]) if normalize else 1)
                for head in (2 * h, 2 * h + 1)
                for t in asked
            )
            assert math.isclose(got[b, h, s], total / 2 / len(asked), rel_tol=1e-4, abs_tol=1e-9)


@pytest.mark.parametrize("factor", [0.5, 1.0, 3.0])
def test_lru(factor: float) -> None:
    view = batch()
    got, a = scored(LRU(factor), view), loop_weights(view)
    for b, h in heads_of(view):
        for s in live(view, b):
            last = int(view.slots.positions[b, h, s])
            for t in range(view.queries.shape[2]):
                at = int(view.query_positions[b, t])
                share = max(float(a[b, head, t, s]) for head in (2 * h, 2 * h + 1))
                if 0 <= at >= view.slots.positions[b, h, s] and share >= factor / (at + 1):
                    last = max(last, at)
            assert got[b, h, s] == last


def test_lru_of_chunks_and_steps_is_that_of_one_forward() -> None:
    once = ready(LRU(), row(9, slots=12, queries=12)).slots.stats[STAT]
    stat = torch.full((1, 2, 12), NEVER)
    for start, stop in ((0, 5), (5, 9), (9, 10), (10, 11), (11, 12)):
        step = part_of_queries(row(9, slots=12, queries=12), start, stop)
        step.slots.stats[STAT] = stat[:, :, :stop].clone()
        if stop - start == 1:  # as the engine hands over what attention computed
            step.weights = loop_weights(step).view(1, 2, 2, stop).float()
        LRU().observe(step)
        stat[:, :, :stop] = step.slots.stats[STAT]
    assert torch.equal(stat, once) and (once > torch.arange(12)).any()


def test_q_filter() -> None:
    view, found = batch(), torch.randn(2, 8)
    got = QFilter()(replace(view, calibration={"qfilter": found}))
    for b, h in heads_of(view):
        for s in live(view, b):
            assert math.isclose(got[b, h, s], -float(found[h] @ view.slots.keys[b, h, s].float()), abs_tol=1e-4)
    with pytest.raises(CalibrationError, match="make them for this model"):
        QFilter()(replace(view, calibration={"qfilter": found[:, :4]}))
