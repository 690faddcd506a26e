"""Every score against loops on plain tensors, and what all scores must share."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from score_views import doubled, loop_weights, part_of_queries, row, rows_of, together
from torch import Tensor

from keepkv.allocate import AdaKV, Pyramid
from keepkv.core.rope import Rope
from keepkv.core.slots import LayerView
from keepkv.core.when import When
from keepkv.errors import KeepKVError
from keepkv.methods import METHODS, methods
from keepkv.observe import attention
from keepkv.observe.window import remember, window
from keepkv.score import SCORES, Score
from keepkv.score.content.keydiff import KeyDiff
from keepkv.score.content.knorm import KNorm
from keepkv.score.content.streaming import Streaming
from keepkv.score.queries.decayed import Decayed
from keepkv.score.queries.expected import ExpectedAttention
from keepkv.score.queries.h2o import H2O
from keepkv.score.queries.snapkv import SnapKV
from keepkv.score.queries.tova import TOVA

torch.set_num_threads(1)
MINE = ["streaming", "knorm", "keydiff", "snapkv", "h2o", "tova", "expected-attention", "random"]
MORE = ["lagkv", "curdkv", "leverage-score", "lru", "finch", "cap", "dropkv", "decayed"]
ROPE = Rope(torch.tensor([1.0, 0.3, 0.05]))


def build(name: str) -> Score:
    options = {
        "snapkv": {"window": 4, "kernel": 3}, "expected-attention": {"horizon": 16, "n_sink": 2},
        "lagkv": {"lag": 3, "sinks": 1}, "finch": {"window": 4}, "dropkv": {"window": 4},
        "cap": {"horizon": 16, "n_sink": 2}, "curdkv": {"neighbours": 4}, "leverage-score": {"sketch": 3},
    }  # fmt: skip
    return SCORES.build(name, **options.get(name, {}))


def ready(score: Score, view: LayerView) -> LayerView:
    """The view with fresh statistics and state, after ``observe``."""
    b, h, s = view.slots.shape
    stats = {name: torch.full((b, h, s), x.start) for name, x in score.stats.items()}
    view = replace(view, slots=view.slots.with_(stats=stats), state={}, rope=ROPE)
    if score.observes:
        score.observe(view)
    return view


def scored(score: Score, view: LayerView) -> Tensor:
    return score(ready(score, view))


def close(got: Tensor, wanted: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(got.double(), wanted.double(), rtol=tolerance, atol=tolerance)


# --- each score against loops ------------------------------------------------------------------------------------


def test_streaming_and_knorm() -> None:
    view = row(0)
    assert torch.equal(Streaming()(view)[0, 0], torch.arange(14.0))
    got = KNorm()(view)
    for h in range(2):
        for s in range(14):
            norm = math.sqrt(sum(float(x) ** 2 for x in view.slots.keys[0, h, s]))
            assert math.isclose(got[0, h, s], -norm, rel_tol=1e-5)


def test_keydiff() -> None:
    view = together([row(1), row(2, slots=9)])
    got = KeyDiff()(view)
    for b in range(2):
        for h in range(2):
            live = [s for s in range(14) if view.slots.positions[b, h, s] >= 0]
            votes = [math.exp(view.slots.log_votes[b, h, s]) for s in live]
            unit = [view.slots.keys[b, h, s] / view.slots.keys[b, h, s].norm() for s in live]
            anchor = sum((p * k for p, k in zip(votes, unit, strict=True)), torch.zeros(8, dtype=torch.float64))
            for s, k in zip(live, unit, strict=True):
                assert math.isclose(got[b, h, s], -float(k @ anchor / anchor.norm()), abs_tol=1e-5)


@pytest.mark.parametrize("pooling", ["avg", "max"])
@pytest.mark.parametrize("options", [{}, {"softcap": 1.5}, {"sink_logits": torch.tensor([0.5, -1.0, 2.0, 0.0])}])
def test_snapkv(pooling: str, options: dict[str, object]) -> None:
    view = together([row(3, **options), row(4, slots=11, queries=5), row(5, slots=3, queries=3)])
    got = scored(SnapKV(window=4, kernel=5, pooling=pooling), view)
    a = loop_weights(view)
    for b in range(3):
        real = [t for t in range(6) if view.query_positions[b, t] >= 0][-4:]
        first = min(int(view.query_positions[b, t]) for t in real)
        for h in range(2):
            live = [s for s in range(14) if view.slots.positions[b, h, s] >= 0]
            early = [s for s in live if view.slots.positions[b, h, s] < first]
            total = dict.fromkeys(live, 0.0)
            for head in (2 * h, 2 * h + 1):
                mean = {s: sum(float(a[b, head, t, s]) for t in real) / len(real) for s in live}
                for n, s in enumerate(early):
                    near = [mean[early[m]] if 0 <= m < len(early) else 0.0 for m in range(n - 2, n + 3)]
                    total[s] += (sum(near) / 5 if pooling == "avg" else max(near)) / 2
                for s in set(live) - set(early):
                    total[s] += mean[s] / 2
            close(got[b, h, live], torch.tensor([total[s] for s in live]))


def test_snapkv_equals_kvpress_formula() -> None:
    """Softmax of the window's logits, window columns cut off, mean, avg_pool1d, mean over the group."""
    view = replace(row(6, slots=20, queries=8))
    view = replace(view, slots=view.slots.with_(log_votes=torch.zeros_like(view.slots.log_votes)))
    keys = view.slots.keys.repeat_interleave(2, dim=1)
    logits = view.queries[:, :, -4:] @ keys.transpose(2, 3) * view.scaling
    logits = logits + torch.full_like(logits, -math.inf).triu(20 - 4 + 1)
    weights = logits.softmax(-1)[..., :-4].mean(-2)
    pooled = torch.nn.functional.avg_pool1d(weights, kernel_size=5, padding=2, stride=1)
    close(scored(SnapKV(window=4), view)[..., :-4], pooled.view(1, 2, 2, 16).mean(2))


def test_h2o() -> None:
    view = together([row(7), row(8, slots=9, queries=4)])
    wanted = loop_weights(view).view(2, 2, 2, 6, 14).sum(3).mean(2)
    close(scored(H2O(), view), wanted)
    seen_by = (view.seen[:, None, None] - view.slots.positions).clamp(min=1)
    close(scored(H2O("mean"), view), wanted / seen_by)


def test_h2o_continues_over_forwards() -> None:
    """Chunk by chunk and token by token, the masses are those of one forward; merged votes keep their mass."""
    view = ready(H2O(), row(9, slots=12, queries=12))
    once, mass = H2O()(view), torch.zeros(1, 2, 12)
    for start, stop in ((0, 5), (5, 9), (9, 10), (10, 11), (11, 12)):
        step = part_of_queries(view, start, stop)
        step.slots.stats["mass"] = mass[:, :, :stop].clone()
        H2O().observe(step)
        mass[:, :, :stop] = step.slots.stats["mass"]
    close(mass, once)


def test_decayed_forgets_over_forwards_as_in_one() -> None:
    """Chunk by chunk and token by token; in a batch, each row decays by its own tokens."""
    view = together([row(9, slots=12, queries=12), row(8, slots=9, queries=4)])
    once, score = scored(Decayed(0.9), view), Decayed(0.9)
    a = loop_weights(view).view(2, 2, 2, 12, 12).mean(2)
    wanted = torch.zeros(2, 2, 12)
    for b in range(2):
        for t in (t for t in range(12) if view.query_positions[b, t] >= 0):
            wanted[b] += 0.9 ** int(view.seen[b] - 1 - view.query_positions[b, t]) * a[b, :, t]
    close(once, wanted)
    view, held = row(9, slots=12, queries=12), torch.zeros(1, 2, 12)
    for start, stop in ((0, 5), (5, 9), (9, 10), (10, 11), (11, 12)):
        step = part_of_queries(view, start, stop)
        step.seen = torch.tensor([stop])
        step.slots.stats["decayed"] = held[:, :, :stop].clone()
        score.observe(step)
        held[:, :, :stop] = step.slots.stats["decayed"]
    close(held, once[:1])


def test_tova() -> None:
    view = together([row(10), row(11, slots=9, queries=4)])
    got, a = scored(TOVA(), view), loop_weights(view)
    for b in range(2):
        for s in range(14):
            if view.slots.positions[b, 0, s] >= 0:
                close(got[b, :, s], a[b, :, -1, s].mean().expand(2))


def test_tova_matches_heads_by_position() -> None:
    """Heads that hold different tokens: the mean runs over tokens, not over columns."""
    view = ready(TOVA(), row(12))
    keep = torch.ones(1, 2, 14, dtype=torch.bool)
    keep[0, 0, :3], keep[0, 1, 5:8] = False, False
    view = replace(view, slots=view.slots.select(keep))
    got, a = TOVA()(view), loop_weights(view)
    for h in range(2):
        for s in range(11):
            position = int(view.slots.positions[0, h, s])
            total = sum(
                float(a[0, 2 * g : 2 * g + 2, -1, c].mean())
                for g in range(2)
                for c in range(11)
                if view.slots.positions[0, g, c] == position
            )
            assert math.isclose(got[0, h, s], total / 2, rel_tol=1e-5)


def test_attention_is_tiled(monkeypatch: pytest.MonkeyPatch) -> None:
    view = together([row(13), row(14, slots=9)])
    wanted = attention.received(view, view.queries, view.query_positions)
    monkeypatch.setattr(attention, "TILE", 1)
    close(attention.received(view, view.queries, view.query_positions), wanted, 1e-12)


# --- what all scores share ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MINE + MORE)
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 99), sizes=st.lists(st.integers(3, 14), min_size=2, max_size=4))
def test_a_row_scores_as_it_does_alone(name: str, seed: int, sizes: list[int]) -> None:
    """Left padding, empties and padded queries leave no trace; rows do not meet."""
    views = [row(seed + n, slots=size, queries=min(size, 6)) for n, size in enumerate(sizes)]
    score = build(name)
    got = scored(score, together(views))
    for b, view in enumerate(views):
        close(got[b : b + 1, :, got.shape[2] - view.slots.shape[2] :], scored(score, view))
    order = list(reversed(range(len(views))))
    close(scored(score, rows_of(together(views), order)), got[order], 1e-6)


@pytest.mark.parametrize("name", MINE)
def test_two_votes_are_two_slots(name: str) -> None:
    """A slot with twice the votes scores as its duplicates do together (attention) or each (geometry)."""
    score = SnapKV(window=4, kernel=1) if name == "snapkv" else build(name)
    view, slot = row(20), 4
    one, two = scored(score, doubled(view, slot, keep_votes=True)), scored(score, doubled(view, slot))
    pair = two[:, :, slot : slot + 2]
    adds_up = name in ("snapkv", "h2o", "expected-attention")
    close(one[:, :, slot], pair.sum(-1) if adds_up else pair[..., 0])
    close(one[:, :, slot + 1 :], two[:, :, slot + 2 :])
    close(one[:, :, :slot], two[:, :, :slot])


@pytest.mark.parametrize("name", MINE + MORE)
def test_extreme_input_gives_finite_scores(name: str) -> None:
    """Logits to ±200, bfloat16 and half precision, a head that holds nothing, a row of padding."""
    score = build(name)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        view = together([row(21, scale=60.0, dtype=dtype), row(22, slots=5, dtype=dtype)])
        empty = view.slots.positions.clone()
        empty[1, 0] = -1
        view = replace(view, slots=view.slots.with_(positions=empty))
        view.query_positions[1] = -1
        before = [x.clone() for x in (view.slots.keys, view.slots.values, view.slots.log_votes, view.queries)]
        got = scored(score, view)
        assert got.shape == (2, 2, 14) and got.dtype == torch.float32
        assert got[view.slots.valid].isfinite().all()
        after = (view.slots.keys, view.slots.values, view.slots.log_votes, view.queries)
        assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True)), "the view was modified"


@pytest.mark.parametrize(
    "name", ["snapkv", "tova", "h2o", "expected-attention", "lru", "finch", "cap", "dropkv", "decayed"]
)
def test_deferred_scores_are_the_same(name: str) -> None:
    """With the queries gone, what was observed is enough."""
    score = build(name)
    view = ready(score, together([row(23), row(24, slots=8)]))
    later = replace(view, queries=view.queries[:, :, :0], query_positions=view.query_positions[:, :0])
    assert torch.equal(score(later), score(view))


@pytest.mark.parametrize("options", [{"window": 0}, {"kernel": 4}, {"pooling": "sum"}])
def test_snapkv_refuses(options: dict[str, object]) -> None:
    with pytest.raises(KeepKVError):
        SnapKV(**options)  # type: ignore[arg-type]
    with pytest.raises(KeepKVError):
        H2O(normalize="median")


# --- named methods -----------------------------------------------------------------------------------------------


def test_methods_put_the_pieces_together() -> None:
    """Names, papers, and options that reach score and allocation."""
    for info in methods():
        method = METHODS.build(info.name)
        assert method.name == info.name and info.doc
        assert info.paper or info.name in ("full", "random", "keepkv2", "keepkv3", "per-layer")
    when = When(prefill="deferred", every=64)
    pyramid = METHODS.build("pyramidkv", window=8, sinks=2, beta=10.0, when=when)
    assert pyramid.allocate == Pyramid(beta=10.0, reserved=10) and pyramid.when == when
    assert isinstance(pyramid.score, SnapKV) and pyramid.score.window == pyramid.window == 8
    assert METHODS.build("adakv", window=8).score == SnapKV(window=8)
    assert METHODS.build("adakv", score="knorm", alpha=0.5).allocate == AdaKV(0.5)
    assert METHODS.build("adakv", score=H2O("mean")).score == H2O("mean")
    expected = METHODS.build("expected-attention", sinks=2, epsilon=0.02, epsilon_mode="relative").score
    assert expected == ExpectedAttention(n_sink=2, epsilon=0.02, epsilon_mode="relative")


# --- the window --------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=3),
    chunk=st.integers(1, 13),
    size=st.integers(1, 7),
    turns=st.lists(st.integers(1, 4), max_size=2),
)
def test_window_of_chunks_is_the_window_of_one_shot(
    lengths: list[int], chunk: int, size: int, turns: list[int]
) -> None:
    """Rows of any length, chunks of any size, left padding in every turn: the last queries of each row."""
    view, seen = row(30), [0] * len(lengths)
    state: dict[str, Tensor] = {}
    rng = torch.Generator().manual_seed(0)
    past: list[list[Tensor]] = [[] for _ in lengths]
    for turn in [lengths, *([[n + b for b in range(len(lengths))] for n in turns])]:
        longest = max(turn)
        queries = torch.randn(len(turn), 4, longest, 8, generator=rng)
        positions = torch.full((len(turn), longest), -1)
        for b, length in enumerate(turn):
            positions[b, longest - length :] = torch.arange(seen[b], seen[b] + length)
            past[b] += list(queries[b, :, longest - length :].unbind(1))
            seen[b] += length
        for start in range(0, longest, chunk):
            part = slice(start, start + chunk)
            step = replace(view, queries=queries[:, :, part], query_positions=positions[:, part], state=state)
            held = state.get("window")
            remember(step, size)
            assert held is None or state["window"].data_ptr() == held.data_ptr(), "not updated in place"
    got, places = window(replace(view, queries=queries[:, :, :0], query_positions=positions[:, :0], state=state), size)
    for b in range(len(lengths)):
        count = min(size, seen[b])
        assert places[b].tolist() == [-1] * (size - count) + list(range(seen[b] - count, seen[b]))
        assert torch.equal(got[b, :, size - count :], torch.stack(past[b][-count:], dim=1))


def test_window_without_memory_and_narrower_than_it() -> None:
    view = row(31)
    queries, positions = window(view, 3)
    assert torch.equal(queries, view.queries[:, :, -3:]) and positions.tolist() == [[11, 12, 13]]
    remember(view, 5)
    queries, positions = window(view, 3)
    assert torch.equal(queries, view.queries[:, :, -3:]) and positions.tolist() == [[11, 12, 13]]
