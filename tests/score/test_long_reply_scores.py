"""Scores of long replies against loops in float64: MorphKV, RPC, RaaS, LazyEviction, VaSE, TriAttention, and draws."""

from __future__ import annotations

import cmath
import math
from dataclasses import replace
from statistics import median_low
from typing import Any

import pytest
import torch
import zoo
from score_views import loop_weights, part_of_queries, together
from score_views import row as one_row
from torch import Tensor

import keepkv
from keepkv.calibrate import calibrate
from keepkv.core.rope import Rope
from keepkv.core.slots import EMPTY, LayerView
from keepkv.engine.rope_probe import rope_of
from keepkv.engine.versions import CACHE
from keepkv.errors import CalibrationError, KeepKVError
from keepkv.observe.draw import uniform
from keepkv.score import SCORES
from keepkv.score.decoding import lazy, raas
from keepkv.score.decoding.lazy import LazyEviction
from keepkv.score.decoding.morphkv import MorphKV
from keepkv.score.decoding.raas import RaaS
from keepkv.score.decoding.rpc import RPC
from keepkv.score.decoding.triattention import LENGTH, MEAN, TriAttention
from keepkv.score.decoding.vase import VaSE
from keepkv.score.queries.snapkv import SnapKV

F64, W = torch.float64, 4


def views() -> list[LayerView]:
    """Rows of different lengths with votes and G = 2, the last shorter than the window."""
    return [one_row(i, slots=slots, queries=min(W, slots), softcap=4.0) for i, slots in enumerate((18, 11, 3))]


def logits_of(view: LayerView, head: int, query: int, slot: int) -> float:
    """Biased logit in float64; the newest query is the last."""
    q, k = view.queries[0, head].double(), view.slots.keys[0, head // 2, slot].double()
    u = float(q[query] @ k) * view.scaling
    return view.softcap * math.tanh(u / view.softcap) + float(view.slots.log_votes[0, head // 2, slot])  # type: ignore[operator]


def softmax(x: dict[int, float]) -> dict[int, float]:
    top = max(x.values())
    total = sum(math.exp(v - top) for v in x.values())
    return {s: math.exp(v - top) / total for s, v in x.items()}


# --- attention of a window ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("fuse", ["sum", "max"])
def test_morphkv_fuses_what_each_query_attends_to(fuse: str) -> None:
    got = MorphKV(W, fuse)(together(views()))
    for b, view in enumerate(views()):
        size = view.slots.shape[2]
        before = range(size - view.queries.shape[2])
        for h in range(2):
            rows = [
                softmax({s: logits_of(view, 2 * h, i, s) + logits_of(view, 2 * h + 1, i, s) for s in before})
                for i in range(view.queries.shape[2] if before else 0)
            ]
            for s in before:
                wanted = sum(r[s] for r in rows) if fuse == "sum" else max(r[s] for r in rows)
                assert math.isclose(got[b, h, 18 - size + s], wanted, rel_tol=1e-6)
        assert (got[b, :, 18 - min(W, size) :] == got[b].amax(-1, keepdim=True)).all()


def test_rpc_looks_at_what_competes() -> None:
    """Each softmax is over slots before the window that are not kept anyway; pooled among these."""
    shown = together(views())
    kept = shown.slots.valid & (shown.slots.positions < 2)
    got = RPC(W, kernel=3)(replace(shown, protected=kept))
    for b, view in enumerate(views()):
        size = view.slots.shape[2]
        before = list(range(2, size - view.queries.shape[2]))
        for h in range(2):
            local = dict.fromkeys(range(-1, size + 1), 0.0)
            for head, i in ((2 * h + g, i) for g in range(2) for i in range(W) if before):
                for s, x in softmax({s: logits_of(view, head, i, s) for s in before}).items():
                    local[s] += x / 2
            for s in before:
                wanted = (local[s - 1] + local[s] + local[s + 1]) / 3
                assert math.isclose(got[b, h, 18 - size + s], wanted, rel_tol=1e-6)


# --- when slots were used ----------------------------------------------------------------------------------------


def decoded(score: Any, view: LayerView, first: int) -> LayerView:
    """``view`` after its first tokens were read as a prompt and the others decoded one by one, through ``observe``."""
    stats: dict[str, Tensor] = {}
    shown = view
    for end in (first, *range(first + 1, view.slots.shape[2] + 1)):
        shown = part_of_queries(view, 0 if end == first else end - 1, end)
        new = end - (0 if end == first else end - 1)
        for name, kind in score.stats.items():
            fresh = torch.full((1, 2, new), kind.start, dtype=F64)
            stats[name] = torch.cat((stats[name], fresh), -1) if name in stats else fresh
        shown = replace(shown, slots=shown.slots.with_(stats=stats), state={})
        score.observe(shown)
        assert all(x is shown.slots.stats[name] for name, x in stats.items())
    return shown


@pytest.mark.parametrize("threshold", [None, 0.05])
def test_raas_remembers_who_was_used_last(threshold: float | None) -> None:
    score, first = RaaS(threshold), 6
    view = one_row(3, slots=20, queries=20)
    got, attention = score(decoded(score, view, first))[0], loop_weights(view)[0]
    for h in range(2):
        last = list(range(20))
        for t in range(first, 20):
            a = [float(attention[2 * h : 2 * h + 2, t, s].mean()) for s in range(t + 1)]
            bound = median_low(a) if threshold is None else threshold
            for s in range(t + 1):
                last[s] = t if a[s] > bound else last[s]
        assert got[h].tolist() == last
    assert len(set(got.flatten().tolist())) > 5


def test_lazy_eviction_knows_the_longest_wait() -> None:
    score, first = LazyEviction(0.05), 6
    view = one_row(4, slots=20, queries=20)
    end = decoded(score, view, first)
    got, attention = score(end)[0], loop_weights(view)[0]
    waits = set()
    for h in range(2):
        last, longest = [first - 1] * first, [0] * first
        for t in range(first, 20):
            last, longest = [*last, t - 1], [*longest, 0]
            for s in range(t + 1):
                if float(attention[2 * h : 2 * h + 2, t, s].max()) >= 0.05:
                    longest[s] = max(longest[s], t - last[s])
                    last[s] = t
        for s in range(20):
            m, t = longest[s], 19 - last[s]
            wanted = 0.0 if m == 0 else 2 / (1 + math.exp(1 + t / m)) + 2 / (1 + math.exp(m - 1))
            assert math.isclose(got[h, s], wanted, rel_tol=1e-6, abs_tol=1e-12)
            waits.add(m)
    assert {0, 1} < waits and max(waits) > 3
    assert end.slots.stats[lazy.LONGEST].dtype == F64


@pytest.mark.parametrize(("score", "name"), [(RaaS(), raas.STAT), (LazyEviction(0.05), lazy.LAST)])
def test_a_padded_row_is_used_as_it_is_alone(score: Any, name: str) -> None:
    """And where a row has no token in a step, nothing changes."""
    rows = [one_row(5, slots=12, queries=1), one_row(6, slots=7, queries=1)]
    for view in rows:
        fresh = {n: torch.full(view.slots.shape, k.start, dtype=F64) for n, k in score.stats.items()}
        view.slots.stats.update(fresh)
    both = together(rows)
    score.observe(both)
    idle = replace(both, query_positions=torch.full_like(both.query_positions, EMPTY), weights=None)
    before = score(both).clone()
    score.observe(idle)
    assert torch.equal(score(both)[both.slots.valid], before[both.slots.valid])
    for b, view in enumerate(rows):
        size = view.slots.shape[2]
        score.observe(view)
        assert torch.equal(view.slots.stats[name][0], both.slots.stats[name][b, :, 12 - size :])


# --- draws -------------------------------------------------------------------------------------------------------


def test_draws_are_even_and_do_not_know_each_other() -> None:
    view = one_row(0, slots=4000, queries=1)
    u = uniform(view)
    assert 0 <= float(u.min()) and float(u.max()) < 1 and u.unique().numel() > 0.99 * u.numel()
    counts = torch.histc(u, 20, 0, 1)
    assert ((counts - u.numel() / 20).abs() < 5 * math.sqrt(u.numel() / 20)).all()
    others = [
        uniform(replace(view, seed=1)), uniform(replace(view, layer=1)), uniform(view, salt=6),
        uniform(view, fresh=True), uniform(replace(view, seen=view.seen + 1), fresh=True), u.flip(1), u.roll(1, -1),
    ]  # fmt: skip
    for i, a in enumerate([u, *others]):
        for b in others[i:]:
            assert abs(float(torch.corrcoef(torch.stack((a.flatten(), b.flatten())))[0, 1])) < 0.06
    assert torch.equal(uniform(replace(view, seen=view.seen + 1)), u)


def test_vase_reserves_slots_of_the_widest_values() -> None:
    shown = together([one_row(7, slots=18, queries=W), one_row(8, slots=11, queries=W)])
    kept = shown.slots.valid & (shown.slots.positions >= (shown.seen - 2)[:, None, None])
    budget = torch.tensor([10, 6])
    got = VaSE(0.5, W, 3)(replace(shown, protected=kept, budget=budget))
    spread = shown.slots.values.amax(-1) - shown.slots.values.amin(-1)
    for b, h in ((b, h) for b in range(2) for h in range(2)):
        free = [s for s in range(18) if shown.slots.valid[b, h, s] and not kept[b, h, s]]
        widest = sorted(free, key=lambda s: -float(spread[b, h, s]))[: (int(budget[b]) - 2) // 2]
        assert {s for s in free if got[b, h, s] > 1e5} == set(widest)
    assert got[shown.slots.valid].isfinite().all()


def test_vase_draws_the_rest_in_proportion_to_attention() -> None:
    """The winner of a draw for one place is each slot as often as its share of the attention says."""
    view = replace(one_row(9, slots=12, queries=W), state={})
    shares = SnapKV(W, 3)(view)[..., :-W]
    shares = shares / shares.sum(-1, keepdim=True)
    won = torch.zeros_like(shares)
    rounds = 4000
    for seed in range(rounds):
        drawn = VaSE(0.0, W, 3)(replace(view, seed=seed, budget=torch.tensor([6])))[..., :-W]
        won.scatter_add_(-1, drawn.argmax(-1, keepdim=True), torch.ones(1, 2, 1, dtype=won.dtype))
    error = (won / rounds - shares).abs() / (shares * (1 - shares) / rounds).sqrt()
    assert float(error.max()) < 4.5 and float(shares.max()) > 3 * float(shares.min())


# --- TriAttention ------------------------------------------------------------------------------------------------

ROPES = {
    "halves": Rope(torch.tensor([1.0, 0.3, 0.05, 0.01]), scaling=1.2),
    "interleaved": Rope(torch.tensor([1.0, 0.3, 0.05, 0.01]), interleaved=True),
    "in part": Rope(torch.tensor([1.0, 0.2])),
    "none": None,
}


def pairs(x: Tensor, rope: Rope | None) -> list[complex]:
    """The pairs of x (D,) that rotate, as complex numbers."""
    half = 0 if rope is None else len(rope.inv_freq)
    if rope is not None and rope.interleaved:
        return [complex(float(x[2 * f]), float(x[2 * f + 1])) for f in range(half)]
    return [complex(float(x[f]), float(x[f + half])) for f in range(half)]


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("name", ROPES)
def test_triattention_is_the_sum_over_pairs_and_distances(name: str, normalize: bool) -> None:
    """With keys before RoPE, which the score does not need."""
    rope, rng = ROPES[name], torch.Generator().manual_seed(0)
    plain = [one_row(10, slots=15, queries=1), one_row(11, slots=6, queries=1)]
    mean = torch.randn(4, 8, generator=rng, dtype=F64)
    length = torch.tensor([[abs(q) + 0.3 for q in pairs(x, rope)] for x in mean], dtype=F64)
    scale = 1.0 if rope is None else rope.scaling
    rows = []
    for view in plain:
        keys = view.slots.keys if rope is None else rope.rotate(view.slots.keys, view.slots.positions)
        rows.append(replace(view, slots=view.slots.with_(keys=keys), rope=rope))
    shown = replace(together(rows), calibration={MEAN: mean.float(), LENGTH: length.float()})
    kept = shown.slots.valid & (shown.slots.positions < 3)
    got = TriAttention(64, normalize)(replace(shown, protected=kept))
    for b, view in enumerate(plain):
        size = view.slots.shape[2]
        for h in range(2):
            heads = []
            for head in (2 * h, 2 * h + 1):
                scores = []
                for p in range(size):
                    key = view.slots.keys[0, h, p]
                    turns = 0 if rope is None else rope.dims
                    total = float(mean[head, turns:] @ key[turns:])
                    for f, (q, k) in enumerate(zip(pairs(mean[head], rope), pairs(key, rope), strict=True)):
                        angle = cmath.phase(q * k.conjugate())
                        at = [
                            math.cos(float(rope.inv_freq[f]) * (size - 1 - p + d) + angle)  # type: ignore[union-attr]
                            for d in (1, 2, 4, 8, 16, 32, 64)
                        ]
                        total += scale**2 * abs(q) * abs(k) * sum(at) / 7
                        total += scale**2 * (float(length[head, f]) - abs(q)) * abs(k)
                    scores.append(total)
                free = scores[3:]
                centre = sum(free) / len(free)
                deviation = math.sqrt(sum((x - centre) ** 2 for x in free) / len(free))
                heads.append([(x - centre) / deviation if normalize else x * view.scaling for x in scores])
            wanted = torch.tensor(heads).amax(0)
            torch.testing.assert_close(got[b, h, 15 - size :], wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("arch", ["llama", "gemma3", "gpt-neox"])
def test_what_is_calibrated_are_means_of_queries_before_rope(arch: str) -> None:
    model, rng = zoo.model(arch), torch.Generator().manual_seed(1)
    texts = [torch.randint(3, zoo.VOCAB, (1, n), generator=rng) for n in (30, 12)]
    made = calibrate("triattention", model, texts)
    ropes = rope_of(model)
    for index, held in made.tensors.items():
        rope = ropes[index]
        assert rope is not None
        found = [queries_of(model, ids, index) for ids in texts]
        plain = torch.cat([rope.unrotate(x, torch.arange(x.shape[1])) for x in found], dim=1)
        torch.testing.assert_close(held[MEAN].double(), plain.mean(1), rtol=1e-4, atol=1e-5)
        for head in range(len(plain)):
            sizes = torch.tensor([[abs(q) for q in pairs(x, rope)] for x in plain[head]]).mean(0)
            torch.testing.assert_close(held[LENGTH][head], sizes, rtol=1e-4, atol=1e-5)


def queries_of(model: Any, ids: Tensor, index: int) -> Tensor:
    """Queries (H*G,T,D) of one text after RoPE, as a layer's attention gets them, float64."""
    cache, found = keepkv.Cache(model, "full"), []
    layer: Any = cache.layers[index]
    attend = layer.attend

    def watched(module: Any, query: Tensor, *args: Any, **options: Any) -> Any:
        found.append(query[0].double())
        return attend(module, query, *args, **options)

    layer.attend = watched
    with torch.no_grad():
        model(input_ids=ids, **{CACHE: cache})
    return found[0]


def test_triattention_asks_for_its_calibration() -> None:
    with pytest.raises(CalibrationError, match="keepkv calibrate triattention"):
        keepkv.Cache(zoo.model("llama"), "triattention", 14)
    with pytest.raises(CalibrationError, match="triattention_mean"):
        TriAttention()(one_row(1))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("morphkv", {"fuse": "mean"}), ("rpc", {"kernel": 4}), ("raas", {"threshold": 2.0}), ("vase", {"reserved": -1}),
        ("lazy-eviction", {"threshold": -0.1}), ("triattention", {"horizon": 0}), ("random", {"fresh": 3}),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(KeepKVError):
        SCORES.build(name, **options)
