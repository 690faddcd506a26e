"""Expected attention (arXiv 2510.00636) against plain float64 definitions, and the faults it must not have."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from merge_views import make_view
from rotations import matrix, rotations, tiny
from score_views import part_of_queries, row, together
from torch import Tensor

from keepkv.allocate import AdaKV, Uniform, keep_mask
from keepkv.core.rope import Rope
from keepkv.core.slots import LayerView
from keepkv.engine.rope_probe import rope_of
from keepkv.errors import KeepKVError
from keepkv.observe.gaussian import query_gaussian, remember_queries
from keepkv.score.queries.expected import ExpectedAttention

torch.set_num_threads(1)
F64 = torch.float64
ROPE = Rope(torch.tensor([1.0, 0.2, 0.01]), scaling=1.1)  # partial: 6 of 8 dims
PLAIN: dict[str, Any] = {"value_norm": None, "n_sink": 0}


def with_rope(view: LayerView, rope: Rope | None = ROPE) -> LayerView:
    return replace(view, rope=rope, state={})


def statistics(view: LayerView, first: int) -> tuple[Tensor, Tensor]:
    """Mean (H*G,D) and covariance (H*G,D,D) float64 of one row's queries before RoPE, positions ≥ first."""
    keep = [t for t in range(view.queries.shape[2]) if view.query_positions[0, t] >= first]
    queries = view.queries[0, :, keep].double()
    if view.rope is not None:
        for n, t in enumerate(keep):
            turn = matrix(view.rope, int(view.query_positions[0, t]), queries.shape[-1])
            queries[:, n] = torch.linalg.solve(turn, queries[:, n].T).T
    mean = queries.mean(1)
    away = queries - mean[:, None]
    return mean, away.transpose(1, 2) @ away / len(keep)


def oracle(view: LayerView, score: ExpectedAttention) -> Tensor:
    """The score of a one-row view (H,S) float64, by its definition: every position of the horizon, one by one."""
    slots = view.slots
    h, s, d = slots.keys.shape[1:]
    mean, sigma = statistics(view, score.n_sink)
    groups = mean.shape[0] // h
    positions = range(int(view.seen[0]), int(view.seen[0]) + score.horizon)
    eye = torch.eye(d, dtype=F64)
    turns = torch.stack([matrix(view.rope, p, d) if view.rope is not None else eye for p in positions])
    out = torch.zeros(h, s, dtype=F64)
    for head in range(mean.shape[0]):
        keys, mu, cov = slots.keys[0, head // groups].double(), mean[head], sigma[head]
        cov = cov if score.use_covariance else torch.zeros_like(cov)

        def logit(m: Tensor, c: Tensor, keys: Tensor = keys) -> Tensor:
            return keys @ m * view.scaling + ((keys @ c) * keys).sum(-1) * view.scaling**2 / 2

        if score.position_average == "rotation":
            u = logit(turns.mean(0) @ mu, turns.mean(0) @ cov @ turns.mean(0).T)
        elif score.position_average == "moments":
            centre = turns.mean(0) @ mu
            moment = (turns @ (cov + mu[:, None] * mu) @ turns.transpose(1, 2)).mean(0)
            u = logit(centre, moment - centre[:, None] * centre)
        else:
            u = torch.stack([logit(r @ mu, r @ cov @ r.T) for r in turns]).logsumexp(0) - math.log(len(turns))
        u = u + slots.log_votes[0, head // groups].double()
        live = slots.positions[0, head // groups] >= score.n_sink
        out[head // groups] += (u - u[live].logsumexp(0)).clamp(max=0).exp() / groups
    votes = slots.log_votes[0].double().exp()
    count = (votes * (slots.positions[0] >= score.n_sink)).sum(-1, keepdim=True)
    out += votes * (score.epsilon / count if score.epsilon_mode == "relative" else score.epsilon)
    return out if score.value_norm is None else out * slots.values[0].double().norm(dim=-1)


def close(got: Tensor, wanted: Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(
        got.double(), wanted.double(), rtol=tolerance, atol=tolerance * float(wanted.abs().max())
    )


OPTIONS: list[dict[str, Any]] = [
    {},
    {"position_average": "moments"},
    {"position_average": "mixture"},
    {"use_covariance": False},
    {"use_covariance": False, "position_average": "moments"},
    {"epsilon": 0.02},
    {"epsilon": 0.5, "epsilon_mode": "relative", "value_norm": None},
    {"n_sink": 0, "value_norm": None},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("rope", [ROPE, Rope(torch.tensor([0.5, 0.1, 0.3, 0.02]), interleaved=True), None], ids=str)
def test_against_the_definition(options: dict[str, Any], rope: Rope | None) -> None:
    """Every option, with votes, partial and interleaved rotation, models without one."""
    score = ExpectedAttention(**{"horizon": 9, "n_sink": 3, **options})
    view = with_rope(row(0, slots=12, queries=12), rope)
    close(score(view), oracle(view, score)[None])


def test_1_closed_form_is_the_expectation() -> None:
    """2e6 draws of q ~ N(R̄μ, R̄ΣR̄ᵀ), d = 16: E[exp(logit)] to 1 %."""
    rope = Rope(torch.logspace(0, -2, 8))
    view = replace(make_view(1, heads=1, slots=30, queries=30, dim=16, scale=0.7), rope=rope)
    score = ExpectedAttention(horizon=20, **PLAIN)
    turn = torch.stack([matrix(rope, p, 16) for p in range(30, 50)]).mean(0)
    mean, sigma = statistics(view, 0)
    factor = torch.linalg.cholesky(turn @ sigma[0] @ turn.T + 1e-12 * torch.eye(16, dtype=F64)).float()
    keys, total = view.slots.keys[0, 0].float() * view.scaling, torch.zeros(30, dtype=F64)
    rng = torch.Generator().manual_seed(0)
    for _ in range(20):
        q = torch.randn(100_000, 16, generator=rng) @ factor.T + (turn @ mean[0]).float()
        total += (q @ keys.T).exp().mean(0).double() / 20
    close(score(view)[0, 0], total / total.sum(), 0.01)


def test_3_one_position_makes_all_averages_the_same() -> None:
    view = with_rope(row(2, slots=12, queries=12))
    scores = [ExpectedAttention(horizon=1, position_average=how)(view) for how in ("rotation", "moments", "mixture")]
    close(scores[1], scores[0])
    close(scores[2], scores[0])


@pytest.mark.parametrize("how", ["rotation", "moments", "mixture"])
def test_4_scores_do_not_depend_on_where_the_text_stands(how: str) -> None:
    """Keys and queries turned on by Δ, p₀ + Δ: the same scores. Fails where the horizon starts at a buffer's length."""
    view, shift = with_rope(row(3, slots=12, queries=12)), 700
    score = ExpectedAttention(horizon=16, position_average=how, **PLAIN)
    slots = view.slots
    rope = replace(ROPE, scaling=1.0)  # turn only
    far = replace(
        view,
        slots=slots.with_(
            keys=rope.rotate(slots.keys.float(), torch.full((12,), shift)), positions=slots.positions + shift
        ),
        queries=rope.rotate(view.queries.float(), torch.full((12,), shift)),
        query_positions=view.query_positions + shift,
        seen=view.seen + shift,
    )
    close(score(far), score(view), 2e-3)
    wrong = score(replace(far, seen=view.seen))
    assert (wrong - score(view)).abs().max() > 0.01


def test_5_without_spread_it_is_the_attention_of_the_mean_query() -> None:
    view = row(4, slots=12, queries=12)
    view = with_rope(replace(view, queries=view.queries[:, :, :1].expand(-1, -1, 12, -1)), None)
    score = ExpectedAttention(**PLAIN)
    wanted = (view.queries[:, :, 0].view(1, 2, 2, 8) @ view.slots.keys.transpose(2, 3)) * view.scaling
    wanted = (wanted + view.slots.log_votes[:, :, None]).softmax(-1).mean(2)
    close(score(view), wanted)
    close(replace(score, use_covariance=False)(view), wanted)
    varied = with_rope(row(4, slots=12, queries=12))
    close(score(varied).sum(-1), torch.ones(1, 2))


def test_6_groups_chunks_and_precision() -> None:
    view = with_rope(row(5, slots=40, queries=40))
    score = ExpectedAttention(horizon=32)
    s = view.slots
    repeated = replace(
        view,
        slots=s.with_(
            keys=s.keys.repeat_interleave(2, 1),
            values=s.values.repeat_interleave(2, 1),
            log_votes=s.log_votes.repeat_interleave(2, 1),
            positions=s.positions.repeat_interleave(2, 1),
        ),
    )
    close(score(view), score(repeated).view(1, 2, 2, 40).mean(2))
    close(replace(score, chunk=7)(view), score(view), 1e-5)
    long = with_rope(make_view(6, heads=4, groups=2, slots=500, queries=500, dim=8, dtype=torch.float32))
    half = replace(
        long,
        slots=long.slots.with_(keys=long.slots.keys.bfloat16(), values=long.slots.values.bfloat16()),
        queries=long.queries.bfloat16(),
    )
    kept, kept_half = score(long).topk(100).indices, score(half).topk(100).indices
    shared = sum(len(set(a.tolist()) & set(b.tolist())) for a, b in zip(kept[0], kept_half[0], strict=True))
    assert shared >= 0.99 * 400


def test_7_statistics_are_those_of_the_normed_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Qwen3 norms its queries before it turns them: the statistics are of what stands between the two."""
    model = tiny("Qwen3", head_dim=16)
    before, after = rotations(model, monkeypatch, torch.arange(1, 41)[None])[0]
    view = make_view(0, heads=2, groups=2, slots=40, queries=40, dtype=torch.float32)
    rope = rope_of(model)[0]
    assert isinstance(rope, Rope)
    mean, sigma = query_gaussian(replace(view, queries=after, rope=rope), 4, True, 0.0)
    wanted = before[0, :, 4:]
    close(mean[0], wanted.mean(1))
    assert sigma is not None
    close(sigma[0], torch.stack([torch.cov(x.T, correction=0) for x in wanted]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 200.0])
def test_8_sinks_are_kept_and_counts_are_exact(dtype: torch.dtype, scale: float) -> None:
    for n, budget in ((30, 5), (30, 29), (30, 30), (9, 4), (5, 4), (3, 4)):
        view = with_rope(make_view(7, heads=2, groups=2, slots=n, queries=n, dim=8, dtype=dtype, scale=scale))
        view = replace(view, protected=view.slots.positions < 4)
        scores = ExpectedAttention()(view)
        assert scores.isfinite().all()
        keep = keep_mask(scores, Uniform()(scores, view, torch.tensor([budget])), view)
        assert (keep.sum(-1) == min(n, budget)).all() and keep[..., :4].all()


def test_9_a_padded_row_has_the_statistics_it_has_alone() -> None:
    views = [
        with_rope(row(8, slots=14, queries=14)),
        with_rope(row(9, slots=6, queries=6)),
        with_rope(row(10, slots=3)),
    ]
    score = ExpectedAttention(horizon=16, n_sink=2)
    batch = together(views)
    score.observe(batch)
    for b, view in enumerate(views):
        score.observe(view)
        for name, x in batch.state.items():
            close(x[b], view.state[name][0], 1e-5)
        close(score(batch)[b, :, 14 - view.slots.shape[2] :], score(view)[0])


def test_11_heads_share_the_budget_exactly() -> None:
    view = with_rope(make_view(11, heads=4, groups=2, slots=60, queries=60, dim=8, dtype=torch.float32))
    view = replace(view, protected=view.slots.positions < 4)
    scores, budget = ExpectedAttention(epsilon=0.01)(view), torch.tensor([15])
    counts = AdaKV(0.4)(scores, view, budget)
    assert counts.sum() == 60 and (counts >= 6).all() and counts.unique().numel() > 1
    assert torch.equal(keep_mask(scores, counts, view).sum(-1), counts)


# --- what the reference code gets wrong --------------------------------------------------------------------------


@pytest.mark.parametrize("covariance", [True, False])
def test_statistics_run_over_forwards(covariance: bool) -> None:
    """Prefill in chunks, then token by token in place: those of one forward. Sinks are left out once, by position."""
    view = together([with_rope(row(12, slots=20, queries=20)), with_rope(row(13, slots=11, queries=11))])
    view = replace(view, queries=view.queries + 30.0)  # a large mean must not swallow the spread
    remember_queries(view, 4, covariance)
    state: dict[str, Tensor] = {}
    for start, stop in ((0, 7), (7, 14), (14, 17), (17, 18), (18, 19), (19, 20)):
        held = {name: x.data_ptr() for name, x in state.items()}
        remember_queries(replace(part_of_queries(view, start, stop), state=state), 4, covariance)
        assert not held or held == {name: x.data_ptr() for name, x in state.items()}
    assert len(state) == (3 if covariance else 2)
    for name, x in view.state.items():
        assert x.shape[0] == 2 and x.dtype == torch.float32
        torch.testing.assert_close(state[name], x, rtol=1e-4, atol=1e-3)
    assert view.state["queries_count"].tolist() == [16, 7]


def test_shrinkage_pulls_towards_the_diagonal() -> None:
    view = with_rope(row(14, slots=12, queries=12))
    _, full = query_gaussian(view, 4, True, 0.0)
    assert full is not None
    diagonal = torch.diag_embed(full.diagonal(dim1=-2, dim2=-1))
    for shrink, amount in ((0.25, 0.25), (1.0, 1.0), ("auto", 8 / (8 + 8))):
        _, got = query_gaussian(view, 4, True, shrink)
        assert got is not None
        close(got, (1 - amount) * full + amount * diagonal)


def test_relative_epsilon_means_the_same_at_every_length() -> None:
    for n in (10, 40):
        view = with_rope(make_view(15, heads=1, slots=n, queries=n, dim=8))
        with_epsilon = ExpectedAttention(epsilon=2.0, epsilon_mode="relative", **PLAIN)
        close(with_epsilon(view) - ExpectedAttention(**PLAIN)(view), torch.full((1, 1, n), 2.0 / n))


def test_softcap_and_attention_sinks_enter() -> None:
    """A sink takes its share of every head's weight; a soft cap bends the mean logit and its spread."""
    view = with_rope(row(16, slots=12, queries=12), None)
    score = ExpectedAttention(**PLAIN)
    plain, sinks = score(view), torch.tensor([0.0, 1.0, 2.0, -1.0])
    assert (score(replace(view, sink_logits=sinks)) < plain).all()
    close(score(replace(view, sink_logits=torch.full((4,), -1e4))), plain)
    close(score(replace(view, softcap=1e4)), plain, 1e-3)
    assert score(replace(view, softcap=0.1)).std() < plain.std()


@pytest.mark.parametrize(
    "options",
    [
        {"epsilon_mode": "share"},
        {"value_norm": "wo_v"},
        {"position_average": "median"},
        {"horizon": 0},
        {"shrinkage": 2.0},
        {"shrinkage": "none"},
        {"n_sink": -1},
    ],
)
def test_unknown_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(KeepKVError):
        ExpectedAttention(**options)
