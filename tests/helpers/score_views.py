"""What the tests of scores and allocations share: batches of views, and attention as plain loops."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from merge_views import make_view, padded
from torch import Tensor

from keepkv.core.slots import LayerView, Slots

F64 = torch.float64


def row(seed: int, slots: int = 14, queries: int = 6, **options: object) -> LayerView:
    """One row with G = 2, votes and no padding; ``options`` as of ``make_view``."""
    return make_view(seed, rows=1, groups=2, slots=slots, queries=queries, dim=8, votes=True, **options)


def together(views: list[LayerView]) -> LayerView:
    """One-row views as one left-padded batch; ``rope`` and the attention's settings are those of the first."""
    slots = max(v.slots.shape[2] for v in views)
    queries = max(v.queries.shape[2] for v in views)
    wide = [padded(v, slots - v.slots.shape[2], queries - v.queries.shape[2]) for v in views]
    parts = [v.slots for v in wide]
    names = parts[0].stats
    return replace(
        wide[0],
        slots=Slots(
            torch.cat([p.keys for p in parts]),
            torch.cat([p.values for p in parts]),
            torch.cat([p.log_votes for p in parts]),
            torch.cat([p.positions for p in parts]),
            {n: torch.cat([p.stats[n] for p in parts]) for n in names},
        ),
        queries=torch.cat([v.queries for v in wide]),
        query_positions=torch.cat([v.query_positions for v in wide]),
        seen=torch.cat([v.seen for v in wide]),
        protected=torch.cat([v.protected for v in wide]) if wide[0].protected is not None else None,  # type: ignore[misc]
        rope=views[0].rope,
        sink_logits=views[0].sink_logits,
    )


def rows_of(view: LayerView, order: list[int]) -> LayerView:
    """The rows of a view in another order."""
    s = view.slots
    return replace(
        view,
        slots=Slots(
            s.keys[order],
            s.values[order],
            s.log_votes[order],
            s.positions[order],
            {name: x[order] for name, x in s.stats.items()},
        ),
        queries=view.queries[order],
        query_positions=view.query_positions[order],
        seen=view.seen[order],
        state={name: x[order] for name, x in view.state.items()},
        protected=None if view.protected is None else view.protected[order],
    )


def part_of_queries(view: LayerView, start: int, stop: int | None = None) -> LayerView:
    """The view as it was after the forward that held queries start … stop, later slots not stored yet."""
    last = view.queries.shape[2] if stop is None else stop
    later = view.queries.shape[2] - last
    s = view.slots
    size = s.shape[2] - later
    return replace(
        view,
        slots=Slots(
            s.keys[:, :, :size],
            s.values[:, :, :size],
            s.log_votes[:, :, :size],
            s.positions[:, :, :size],
            {name: x[:, :, :size] for name, x in s.stats.items()},
        ),
        queries=view.queries[:, :, start:last],
        query_positions=view.query_positions[:, start:last],
        seen=view.seen - (view.query_positions[:, last:] >= 0).sum(-1),
        protected=None,
    )


def doubled(view: LayerView, slot: int, keep_votes: bool = False) -> LayerView:
    """``slot`` stored twice, or once with twice the votes (``keep_votes``)."""
    s = view.slots
    if keep_votes:
        votes = s.log_votes.clone()
        votes[:, :, slot] += math.log(2)
        return replace(view, slots=s.with_(log_votes=votes))
    index = torch.tensor([*range(slot + 1), *range(slot, s.shape[2])])
    pick = [x[:, :, index] for x in (s.keys, s.values, s.log_votes, s.positions)]
    return replace(view, slots=Slots(*pick, {name: x[:, :, index] for name, x in s.stats.items()}))


def loop_weights(view: LayerView) -> Tensor:
    """Attention (B,H*G,T,S) float64 of the view's queries, by loops over everything."""
    s, q = view.slots, view.queries.double()
    b, heads, t, _ = q.shape
    groups = heads // s.shape[1]
    out = torch.zeros(b, heads, t, s.shape[2], dtype=F64)
    for row_, head, query in ((i, j, k) for i in range(b) for j in range(heads) for k in range(t)):
        h, now = head // groups, int(view.query_positions[row_, query])
        terms = {}
        for slot in range(s.shape[2]):
            position = int(s.positions[row_, h, slot])
            if 0 <= position <= now:
                u = float(q[row_, head, query] @ s.keys[row_, h, slot].double()) * view.scaling
                if view.softcap is not None:
                    u = view.softcap * math.tanh(u / view.softcap)
                terms[slot] = math.exp(u + float(s.log_votes[row_, h, slot]))
        total = sum(terms.values()) + (math.exp(float(view.sink_logits[head])) if view.sink_logits is not None else 0.0)
        for slot, term in terms.items():
            out[row_, head, query, slot] = term / total
    return out
