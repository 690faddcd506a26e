"""LOOK-M, KVMerger, WeightedKV and ZeroMerge against loops in float64, and what they promise."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from merge_views import Kinds, add_stats, combined, keep_every, make_view, padded
from torch import Tensor

from keepkv.core.slots import LayerView, Slots
from keepkv.errors import KeepKVError
from keepkv.methods import METHODS
from keepkv.reduce.base import Reduce, Reduced
from keepkv.reduce.drop import Drop
from keepkv.reduce.kvmerger import KVMerger
from keepkv.reduce.kvslimmer import KVSlimmer
from keepkv.reduce.look_m import LookM
from keepkv.reduce.weightedkv import WeightedKV
from keepkv.reduce.zeromerge import ZeroMerge
from keepkv.score.content.random import Random

torch.set_num_threads(1)
F64 = torch.float64
FEW = settings(max_examples=25, deadline=None)
ALL: list[Reduce] = [
    LookM(), LookM("average"), LookM("weighted"), KVMerger(0.3), KVSlimmer(), WeightedKV(), ZeroMerge(2),
]  # fmt: skip
seeds = st.integers(0, 10_000)


def scores_of(view: LayerView) -> Tensor:
    return Random()(replace(view, seed=99)) / 2.0**24


def run(reduce: Reduce, view: LayerView, keep: Tensor) -> Reduced:
    return reduce(view, keep, scores_of(view), Kinds())


def typical(seed: int, slots: int = 30, **options: object) -> tuple[LayerView, Tensor]:
    """Two heads with other slots kept in each; the first two and the last three are protected."""
    view = make_view(seed, heads=2, groups=2, slots=slots, queries=4, **options)
    view = replace(view, protected=(view.slots.positions < 2) | (view.slots.positions >= slots - 3))
    add_stats(view)
    return view, keep_every(view, 3) | view.protected


def free_of(view: LayerView, keep: Tensor, h: int) -> list[int]:
    protected = view.protected if view.protected is not None else torch.zeros_like(keep)
    return [i for i in range(keep.shape[2]) if keep[0, h, i] and not protected[0, h, i]]


def same(got: Slots, want: Slots, atol: float = 1e-12) -> None:
    assert torch.equal(got.positions, want.positions) and got.stats.keys() == want.stats.keys()
    for name in ("keys", "values", "log_votes"):
        torch.testing.assert_close(getattr(got, name)[got.valid], getattr(want, name)[got.valid], rtol=0, atol=atol)
    for name, x in got.stats.items():
        torch.testing.assert_close(x[got.valid], want.stats[name][got.valid], rtol=0, atol=atol)


@pytest.mark.parametrize("merge", ["pivot", "average", "weighted"])
def test_look_m_equals_a_loop(merge: str) -> None:
    view, keep = typical(1)
    s, changed = view.slots, {"keys": view.slots.keys.clone(), "values": view.slots.values.clone()}
    for h in range(2):
        may, k = free_of(view, keep, h), s.keys[0, h]
        arrivals: dict[int, list[tuple[int, float]]] = {}
        for e in (i for i in range(30) if not keep[0, h, i]):
            cosines = [float(k[e] @ k[c] / (k[e].norm() * k[c].norm())) for c in may]
            arrivals.setdefault(may[cosines.index(max(cosines))], []).append((e, max(cosines)))
        assert max(map(len, arrivals.values())) > 1
        for c, came in arrivals.items():
            for name, x in changed.items():
                old = getattr(s, name)[0, h]
                parts = [old[c]]
                for e, u in came:
                    parts.append(
                        (old[e] + old[c]) / 2 if merge == "pivot" else old[e] * (u if merge == "weighted" else 1)
                    )
                x[0, h, c] = torch.stack(parts).mean(0)
    got = run(LookM(merge), view, keep)
    same(got.slots, s.with_(**changed).select(keep))
    assert torch.equal(got.merged, (~keep).sum(-1)) and not got.lost.any()


@pytest.mark.parametrize("sigma", [None, 0.8])
def test_kvmerger_equals_a_loop(sigma: float | None) -> None:
    view, keep = typical(2, slots=60)
    blocks = torch.randn(1, 2, 10, 16, generator=torch.Generator().manual_seed(2), dtype=F64)
    view.slots.keys += 3 * blocks.repeat_interleave(6, dim=2)  # neighbours alike
    view.slots.keys[0, 1, 20] = 0  # a key without a direction
    s, scores = view.slots, scores_of(view)
    keys, values, entered = s.keys.clone(), s.values.clone(), torch.zeros_like(keep)
    assert view.protected is not None
    runs = singles = 0
    for h in range(2):
        k, sets = s.keys[0, h], [[2]]
        for i in range(3, 57):
            length = k[i].norm() * k[i - 1].norm()
            alike = bool(length > 0) and float(k[i] @ k[i - 1] / length) > 0.75
            sets = [*sets[:-1], [*sets[-1], i]] if alike else [*sets, [i]]
        for members in sets:
            kept = [i for i in members if keep[0, h, i]]
            gone = [i for i in members if not keep[0, h, i]]
            if not kept or not gone:
                singles += 1
                continue
            runs += 1
            p = max(kept, key=lambda i: float(scores[0, h, i]))
            square = [float((k[p] - k[i]).square().sum()) for i in [p, *gone]]
            spread = sum(square) / len(square) if sigma is None else sigma**2
            g = torch.tensor([math.exp(-x / (2 * spread)) for x in square], dtype=F64)
            keys[0, h, p] = (g / g.sum()) @ s.keys[0, h, [p, *gone]]
            values[0, h, p] = (g / g.sum()) @ s.values[0, h, [p, *gone]]
            entered[0, h, gone] = True
    got = run(KVMerger(sigma=sigma), view, keep)
    assert runs > 3 and singles > 3
    same(got.slots, s.with_(keys=keys, values=values).select(keep))
    assert torch.equal(got.lost, ~keep & ~entered) and torch.equal(got.merged, entered.sum(-1))


def test_kvmerger_leaves_identical_keys_where_they_are() -> None:
    view, keep = typical(3)
    view.slots.keys.copy_(view.slots.keys[:, :, :1].expand_as(view.slots.keys))
    got = run(KVMerger(), view, keep)
    torch.testing.assert_close(got.slots.keys, view.slots.select(keep).keys, rtol=0, atol=1e-14)
    assert got.merged.min() > 0 and got.slots.values.isfinite().all()


def test_weightedkv_equals_a_loop() -> None:
    view, keep = typical(4)
    scores = scores_of(view)
    scores[0, 0, 5:9] = 0.0  # a kept slot and what enters it weigh nothing
    s, values, entered = view.slots, view.slots.values.clone(), torch.zeros_like(keep)
    for h in range(2):
        may = free_of(view, keep, h)
        came: dict[int, list[int]] = {}
        for e in (i for i in range(30) if not keep[0, h, i]):
            later = [c for c in may if c > e]
            if later:
                came.setdefault(later[0], []).append(e)
                entered[0, h, e] = True
        for c, gone in came.items():
            w = scores[0, h, [c, *gone]].to(F64)
            if w.sum() > 0:
                values[0, h, c] = (w / w.sum()) @ s.values[0, h, [c, *gone]]
    got = WeightedKV()(view, keep, scores, Kinds())
    same(got.slots, s.with_(values=values).select(keep))
    assert torch.equal(got.lost, ~keep & ~entered) and got.lost.any() and torch.equal(got.merged, entered.sum(-1))


def test_zeromerge_equals_a_loop_over_two_compressions() -> None:
    view, keep = typical(5, slots=40)
    keep[0, 1, 15:] = True  # heads of different lengths
    first, scores = run(ZeroMerge(3), view, keep), scores_of(view)
    for h in range(2):
        weak = sorted(free_of(view, keep, h), key=lambda i: (float(scores[0, h, i]), -i))[:3]
        pool = [i for i in range(40) if not keep[0, h, i] or i in weak]
        sets = [[i for n, i in enumerate(pool) if n * 3 // len(pool) == c] for c in range(3)]
        check(view, first.slots, h, sets, [i for i in range(40) if i not in pool])
        assert first.merged[0, h] == len(pool) - 3 and first.dropped[0, h] == 0
    # More tokens come, and all but the protected ones and the best four of each head leave.
    grown = make_view(6, heads=2, groups=2, slots=12, queries=4).slots
    grown.positions += 40
    grown.stats.update({name: torch.randn(1, 2, 12, dtype=F64) for name in Kinds.stats})
    slots = first.slots.join(grown)
    old = (slots.log_votes > 0.5) & slots.valid
    view = replace(view, slots=slots, protected=(slots.positions >= 49) | ((slots.positions < 2) & slots.valid))
    scores = scores_of(view).masked_fill(~slots.valid, -1.0)
    best = scores.masked_fill(view.protected, -1.0).topk(4).indices
    keep = view.protected | torch.zeros_like(view.protected).scatter(2, best, True)
    again = run(ZeroMerge(3), view, keep)
    assert (old.sum(-1) == 3).all() and not keep[old].all()
    for h in range(2):
        mine = old[0, h].nonzero().flatten().tolist()
        others = sorted((i for i in free_of(view, keep, h) if i not in mine), key=lambda i: -float(scores[0, h, i]))
        stay = [i for i in range(slots.shape[2]) if view.protected[0, h, i]] + others[:1]
        sets = [[r] for r in mine]
        for e in (i for i in range(slots.shape[2]) if slots.valid[0, h, i] and i not in stay and i not in mine):
            dots = [float(slots.keys[0, h, e] @ slots.keys[0, h, r]) for r in mine]
            sets[dots.index(max(dots))].append(e)
        check(view, again.slots, h, sets, stay)
        assert again.slots.lengths[0, h] == keep[0, h].sum() and again.dropped[0, h] == 0
    votes = (again.slots.log_votes.exp() * again.slots.valid).sum(-1)
    torch.testing.assert_close(votes, torch.full_like(votes, 52.0), rtol=1e-12, atol=0)


def check(view: LayerView, got: Slots, h: int, sets: list[list[int]], alone: list[int]) -> None:
    """Head ``h`` of ``got`` holds the count mean of each of ``sets``, at its first member where that is a residual slot
    already, at its last otherwise; and what stands ``alone`` as it was."""
    s, found = view.slots, got.positions[0, h].tolist()
    for members in [*sets, *([i] for i in alone)]:
        votes = s.log_votes[0, h, members].exp()
        anchor = members[0] if float(votes[0]) > 1.5 else members[-1]
        column, w = found.index(int(s.positions[0, h, anchor])), votes / votes.sum()
        for name in ("keys", "values"):
            want = w @ getattr(s, name)[0, h, members]
            torch.testing.assert_close(getattr(got, name)[0, h, column], want, rtol=0, atol=1e-12)
        assert abs(float(got.log_votes[0, h, column]) - math.log(float(votes.sum()))) <= 1e-12
        rest = [i for i in members if i != anchor]
        for kind, x in s.stats.items():
            assert abs(float(got.stats[kind][0, h, column] - combined(kind, x[0, h, [anchor, *rest]]))) <= 1e-12
    assert sum(p >= 0 for p in found) == len(sets) + len(alone)


def test_zeromerge_without_room_drops() -> None:
    view, _ = typical(7)
    assert view.protected is not None
    same(run(ZeroMerge(), view, view.protected).slots, run(Drop(), view, view.protected).slots)


@given(seed=seeds, residual=st.integers(1, 40), votes=st.booleans())
@FEW
def test_zeromerge_meets_the_budget_and_keeps_every_vote(seed: int, residual: int, votes: bool) -> None:
    view, keep = typical(seed, votes=votes)
    keep |= torch.rand(keep.shape, generator=torch.Generator().manual_seed(seed)) < 0.3
    got = run(ZeroMerge(residual), view, keep)
    assert torch.equal(got.slots.lengths, keep.sum(-1))
    assert torch.equal(got.merged + got.dropped, (~keep).sum(-1)) and not got.lost.any()
    total = (got.slots.log_votes.exp() * got.slots.valid).sum(-1)
    torch.testing.assert_close(total, view.slots.log_votes.exp().sum(-1), rtol=1e-12, atol=0)


@given(seed=seeds, empties=st.integers(0, 9), pad=st.integers(0, 5), which=st.integers(0, len(ALL) - 1))
@FEW
def test_a_padded_row_gives_what_it_gives_alone(seed: int, empties: int, pad: int, which: int) -> None:
    view, keep = typical(seed, slots=20, votes=True)
    wide = padded(view, empties, pad)
    wide_keep = torch.cat((keep.new_zeros(1, 2, empties), keep), dim=-1)
    alone, batched = run(ALL[which], view, keep), run(ALL[which], wide, wide_keep)
    assert torch.equal(alone.merged, batched.merged) and torch.equal(alone.dropped, batched.dropped)
    assert torch.equal(alone.lost, batched.lost[..., empties:]) and not batched.lost[..., :empties].any()
    same(batched.slots, alone.slots)


@pytest.mark.parametrize("which", range(len(ALL)))
def test_protected_slots_and_heads_that_give_nothing_up_stay(which: int) -> None:
    view, keep = typical(8, dtype=torch.float32)
    keep[0, 1] = True
    got, want = run(ALL[which], view, keep), view.slots.select(keep)
    assert got.merged[0, 0] > 0 and got.merged[0, 1] == 0
    same(got.slots.map(lambda x: x[:, 1:]), want.map(lambda x: x[:, 1:]), atol=0)
    for position in (0, 1, 27, 28, 29):
        mine, old = (x.positions[0, 0].tolist().index(position) for x in (got.slots, want))
        for name in ("keys", "values", "log_votes"):
            assert torch.equal(getattr(got.slots, name)[0, 0, mine], getattr(want, name)[0, 0, old])


@pytest.mark.parametrize("which", range(len(ALL)))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_caches_are_left_alone_and_stay_finite(which: int, dtype: torch.dtype) -> None:
    view, keep = typical(9, rows=2, slots=60, dtype=dtype)
    view.slots.log_votes = view.slots.log_votes.float()
    view.slots.keys *= 30
    before = view.slots.map(torch.clone)
    first, second = run(ALL[which], view, keep).slots, run(ALL[which], view, keep).slots
    for name in ("keys", "values", "log_votes", "positions"):
        assert torch.equal(getattr(before, name), getattr(view.slots, name))
        assert torch.equal(getattr(first, name), getattr(second, name))
        assert getattr(first, name)[first.valid].isfinite().all()
    assert first.keys.dtype == first.values.dtype == dtype and first.log_votes.dtype == torch.float32


WRONG = [
    ("look-m", {"merge": "mean"}), ("kvmerger", {"sigma": 0.0}), ("zeromerge", {"residual": 0}),
    ("zeromerge", {"decay": 2.0}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "options"), WRONG)
def test_wrong_options_are_refused(name: str, options: dict[str, object]) -> None:
    with pytest.raises(KeepKVError, match=next(iter(options))):
        METHODS.build(name, **options)
