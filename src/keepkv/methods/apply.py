"""Compression as a pure function: what a method keeps of the slots in views, and what becomes of the rest.

Three steps, of which the second needs all layers that share a budget:

    scored = score(method, view, budget, spans)          each layer
    counts = share(method, scored, views, budgets)       all of them together
    keep   = choose(method, view, scored, counts, spans)  each layer; then ``reduce``

``compress`` is all three. Nothing here knows a cache, a store or a model: whoever can gather slots into views, a
serving engine say, compresses with it.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from keepkv.allocate.base import DENSITY
from keepkv.allocate.select import keep_mask, tiers
from keepkv.core.slots import EMPTY, LayerView
from keepkv.errors import BudgetError, CacheStateError, KeepKVError
from keepkv.methods.base import Method
from keepkv.methods.returned import checked_counts, checked_reduced, checked_scores
from keepkv.reduce.base import Reduced
from keepkv.spans.rows import RowSpans
from keepkv.spans.select import keep_by_span, needed, trim


@dataclass
class Scored:
    """A layer whose slots have scores (B,H,S) and tiers (B,H,S), see ``allocate.select``. protected, memo and
    calibration of its view are kept too: another view of the same slots could not know the first two, and an allocation
    that all layers share sees no view. density (B,): where the allocation asks for it. positions (B,H,S): where one
    layer leads others."""

    scores: Tensor
    tier: Tensor
    protected: Tensor | None
    memo: dict[str, Tensor]
    calibration: Mapping[str, Tensor] | None = None
    density: Tensor | None = None
    positions: Tensor | None = None

    @property
    def known(self) -> Mapping[str, Tensor]:
        """What a joint allocation may know of the layer beside scores and tiers."""
        return {**(self.calibration or {}), **({} if self.density is None else {DENSITY: self.density})}


def compress(
    method: Method, views: Sequence[LayerView], budgets: Sequence[Tensor], spans: RowSpans | None = None
) -> list[Reduced]:
    """What ``method`` leaves of each of ``views``, given their budgets, (B,) int64 each: slots per KV head.

    Several views are the layers of one model, whose budget a joint allocation shares out; others look at each by
    itself. A row that fits its budget keeps all of its slots. Statistics that the score leaves in ``view.memo`` are
    taken over. Changes ``view.protected``, ``view.budget`` and ``view.memo``, and moves empty slots to the front.
    """
    budgets = [demanded(method, view, budget, spans)[0] for view, budget in zip(views, budgets, strict=True)]
    over = over_budget(method, [view.slots.lengths for view in views], budgets, views[0].seen)
    scored = [score(method, view, budget, spans) for view, budget in zip(views, budgets, strict=True)]
    counts = share(method, scored, views, budgets)
    done = []
    for view, one, wanted in zip(views, scored, counts, strict=True):
        keep, scores = choose(method, view, one, wanted, spans)
        take_stats(view, over)
        done.append(reduce(method, view, keep, scores))
    return done


def over_budget(method: Method, lengths: Sequence[Tensor], budgets: Sequence[Tensor], seen: Tensor) -> Tensor:
    """(B,) bool: rows of which a head of any layer, with ``lengths`` (B,H) slots, holds more than its budget (B,); of
    an allocation that trims, all whose budget does not hold the tokens ``seen`` (B,)."""
    held = zip(lengths, budgets, strict=True)
    over = [(length > budget[:, None]).any(-1) | (method.allocate.trims & (budget < seen)) for length, budget in held]
    return torch.stack(over).any(0)


def score(method: Method, view: LayerView, budget: Tensor, spans: RowSpans | None = None) -> Scored:
    """Score the slots of ``view``, whose rows may keep ``budget`` (B,) slots per KV head."""
    if method.prompt and not (spans is not None and spans.policy.prompt):
        raise KeepKVError(
            f"method {method.name!r} keeps the prompt, and nothing says where it ends: give "
            "spans=RowSpans(SpanPolicy((), prompt=True)), or make the method with prompt=False"
        )
    close_gaps(view)
    check_seen(method, view, budget)
    view.protected, view.budget = protected(method, view, spans), budget
    scores = _shared(method, checked_scores(method.score, view, method.score(view)))
    trims = spans is not None and spans.demanding and spans.policy.on_overflow == "trim"
    if spans is not None and trims and _demand(method, view, spans, budget) is not None:
        view.protected = trim(scores, budget, view, pins(method, view))
    density = method.score.density(view) if method.allocate.needs_density else None
    positions = None if method.led_by is None else view.slots.positions
    return Scored(scores, tiers(view), view.protected, view.memo, view.calibration, density, positions)


def _follow(method: Method, scored: Sequence[Scored]) -> None:
    """Give the layers behind the one that leads, where one does, its scores: token by token, in the mean over its
    heads. A token that it does not hold comes last."""
    if method.led_by is None or method.led_by >= len(scored):
        return
    leader = scored[method.led_by]
    assert leader.positions is not None
    held = leader.positions.long()
    size = 1 + max(int(x.positions.max()) if x.positions is not None and x.positions.numel() else 0 for x in scored)
    total, count = (leader.scores.new_zeros(len(held), size + 1) for _ in range(2))
    at = held.where(held >= 0, size)
    for head in range(held.shape[1]):  # one head at a time: the order of additions is fixed on any device
        total.scatter_add_(1, at[:, head], leader.scores[:, head])
        count.scatter_add_(1, at[:, head], torch.ones_like(leader.scores[:, head]))
    least = torch.finfo(total.dtype).min
    table = torch.where(count > 0, total / count.clamp(min=1), least)
    for one in scored[method.led_by + 1 :]:
        assert one.positions is not None
        where = one.positions.long()
        found = table.gather(1, where.where(where >= 0, size).flatten(1)).view(where.shape)
        one.scores = found.masked_fill(where < 0, least)


def _shared(method: Method, scores: Tensor) -> Tensor:
    """``scores`` (B,H,S), or their mean over heads where these keep the same tokens."""
    return scores.mean(1, keepdim=True).expand_as(scores) if method.together else scores


def check_seen(method: Method, view: LayerView, budget: Tensor) -> None:
    """Raises ``CacheStateError`` where a row over its ``budget`` (B,) has shown no query to a score that needs them."""
    if bool((blind := _blind(method, view, budget)).any()):
        raise CacheStateError(
            f"method {method.name!r}, row {int(blind.int().argmax())}: its score has seen no query of this text, as no "
            "compression was to follow. Make the cache with When('deferred') or When(every=…), feed the text, and then "
            "compress."
        )


def _blind(method: Method, view: LayerView, budget: Tensor) -> Tensor:
    """(B,) bool: rows over their ``budget`` (B,) of which a score that must see queries has seen none."""
    slots = view.slots
    over = over_budget(method, [slots.lengths], [budget], view.seen)
    if not method.score.observes:
        return torch.zeros_like(over)
    seen = [view.query_positions >= 0]
    for name, x in view.state.items():
        if name not in method.reduce.row_starts:
            seen.append(x != (0 if x.is_floating_point() else EMPTY))
    for name, kind in method.score.stats.items():
        if name in slots.stats:
            seen.append((slots.stats[name] != kind.start) & slots.valid)
    blind = over & ~torch.stack([x.reshape(len(over), -1).any(1).to(over.device) for x in seen]).any(0)
    # A row of NaN leaves no trace of its queries: the model is broken there, and the other rows go on.
    return blind & (slots.keys.isfinite() | ~slots.valid[..., None]).flatten(1).all(1) if bool(blind.any()) else blind


def share(
    method: Method, scored: Sequence[Scored], views: Sequence[LayerView], budgets: Sequence[Tensor]
) -> list[Tensor]:
    """Slots to keep (B,H) int64 of each layer. A joint allocation does not look at ``views``. Where one layer leads,
    the scores of later ones become its own first."""
    _follow(method, scored)
    if method.allocate.joint:
        every = [x.scores for x in scored], [x.tier for x in scored], list(budgets)
        known = [x.known for x in scored]
        asks = method.allocate.needs_calibration is not None or method.allocate.needs_density
        shared = method.allocate.across(*every, known) if asks else method.allocate.across(*every)
        return [checked_counts(method.allocate, x.scores, n) for x, n in zip(scored, shared, strict=True)]
    counts = (method.allocate(x.scores, view, b) for x, view, b in zip(scored, views, budgets, strict=True))
    return [checked_counts(method.allocate, x.scores, n) for x, n in zip(scored, counts, strict=True)]


def choose(
    method: Method, view: LayerView, scored: Scored, counts: Tensor, spans: RowSpans | None = None
) -> tuple[Tensor, Tensor]:
    """Which slots (B,H,S) bool are kept, ``counts`` (B,H) of each head, and the scores that chose them."""
    if spans is None:
        return keep_mask(scored.scores, counts, view), scored.scores
    scores = scored.scores
    if view.spans is not None:
        within = method.score.span_scores(view, scores)
        scores = _shared(method, checked_scores(method.score, view, within, "returned within spans"))
    return keep_by_span(scores, counts, view, spans, scored.scores), scores


def reduce(method: Method, view: LayerView, keep: Tensor, scores: Tensor) -> Reduced:
    """What becomes of the slots of ``view`` where those of ``keep`` (B,H,S) bool stay, chosen by ``scores``."""
    return checked_reduced(method.reduce, view.slots, method.reduce(view, keep, scores, method.score))


def take_stats(view: LayerView, rows: Tensor) -> None:
    """Take over the statistics that the score left in ``view.memo``, for ``rows`` (B,) bool: a row that fits its budget
    would not have been scored if it were alone."""
    stats = view.slots.stats
    left = {name: view.memo[name].detach().to(x.dtype) for name, x in stats.items() if name in view.memo}
    if left:
        new = {name: torch.where(rows[:, None, None], x, stats[name]) for name, x in left.items()}
        view.slots = view.slots.with_(stats={**stats, **new})


# --- what must stay ------------------------------------------------------------------------------------------------


def pins(method: Method, view: LayerView) -> Tensor:
    """(B,H,S) bool: sink tokens and recent window of the method."""
    slots, recent = view.slots, (view.seen - method.window)[:, None, None]
    return slots.valid & ((slots.positions < method.sinks) | (slots.positions >= recent))


def protected(method: Method, view: LayerView, spans: RowSpans | None) -> Tensor:
    """(B,H,S) bool: slots that are kept whatever their score: pins, and tokens of protected spans."""
    kept = pins(method, view)
    return kept if spans is None else kept | (view.slots.valid & spans.protects(view.slots.positions))


def demanded(
    method: Method,
    view: LayerView,
    budget: Tensor,
    spans: RowSpans | None,
    name: str = "the layer",
    quiet: bool = False,
) -> tuple[Tensor, bool]:
    """The budget (B,) that holds what spans demand of a layer, and whether ``budget`` (B,) did not.

    As the policy says: raises ``BudgetError``, grows the budget, or warns that tokens are given up. ``name`` is the
    layer's in these messages. quiet: without the warning.
    """
    if spans is None or not spans.demanding:
        return budget, False
    view.protected = protected(method, view, spans)
    over = _demand(method, view, spans, budget)
    if over is None:
        return budget, False
    row = int(over.int().argmax())
    said = (
        f"{name}, row {row}: protected spans, min_keep, sinks and window need {int(over[row])} slots per head, the "
        f"budget holds {int(budget[row])}"
    )
    if spans.policy.on_overflow == "error":
        raise BudgetError(
            f"{said}. Give a larger budget, protect less, or choose SpanPolicy(on_overflow='grow') or 'trim'. Call "
            "cache.reset() before using the cache again."
        )
    if spans.policy.on_overflow == "trim":
        if quiet:
            return budget, True
        warnings.warn(f"{said}; protected tokens were given up", stacklevel=2)
        return budget, True
    return budget.maximum(over), True


def _demand(method: Method, view: LayerView, spans: RowSpans, budget: Tensor) -> Tensor | None:
    """(B,) int64: slots per head that the spans of each row need, 0 where the budget (B,) holds them; None: everywhere.
    Pins alone may exceed a budget, as they may without spans."""
    need, lengths = needed(view, spans), view.slots.lengths.amax(-1)
    over = (need > budget) & (need > pins(method, view).sum(-1).amax(-1)) & (lengths > budget)
    return torch.where(over, need, 0) if bool(over.any()) else None


def close_gaps(view: LayerView) -> None:
    """Move empty slots to the front, and the others into the order of the text, so that neighbours in memory are
    neighbours in it: padding between turns leaves gaps, and slots that stay exact beside codes lie before the rest."""
    if not _falls(view.slots.positions):  # empty ones are below all others
        return
    valid = view.slots.valid
    if bool((valid[..., :-1] & ~valid[..., 1:]).any()):
        view.slots = view.slots.select(valid)
    if _falls(at := view.slots.positions):
        view.slots = view.slots.take(at.sort(dim=-1, stable=True).indices)


def _falls(x: Tensor) -> bool:
    """Whether an entry of x (…,S) is followed by a smaller one."""
    return bool((x[..., 1:] < x[..., :-1]).any())
