"""The compression of a request that lies in blocks, by keepkv's own pieces. Knows no vLLM."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from keepkv.core.rope import Rope
from keepkv.core.slots import LayerView, Slots
from keepkv.integrations.vllm.pages import Held, Pages
from keepkv.integrations.vllm.plan import Plan
from keepkv.methods import apply
from keepkv.reduce.base import Reduced


@dataclass(frozen=True)
class Site:
    """What is known of a layer. rank: its number among the ``layers`` that are compressed. scaling, softcap, sinks: of
    its attention. query_heads: how many it has here; rope: its rotation, None where it has none. calibration: what was
    measured of it, by name."""

    name: str
    rank: int
    layers: int
    query_heads: int
    scaling: float
    softcap: float | None = None
    sinks: Tensor | None = None
    rope: Rope | None = None
    calibration: Mapping[str, Tensor] | None = None

    def view(
        self, slots: Slots, held: Held, seen: int, plan: Plan, query: Tensor | None = None, begin: int = 0
    ) -> LayerView:
        """What the pieces see of ``slots`` (1,H,S,…) after ``seen`` tokens, with the ``query`` (T,Hq,D) of the tokens
        from ``begin`` on, all of the prompt or all of the reply, None for none."""
        if query is None:
            queries = slots.keys.new_zeros(1, self.query_heads, 0, slots.keys.shape[-1])
            begin = seen
        else:
            queries = query.transpose(0, 1)[None]
        device = queries.device
        return LayerView(
            slots=slots,
            queries=queries,
            query_positions=torch.arange(begin, begin + queries.shape[2], device=device)[None],
            seen=torch.tensor([seen], device=device),
            scaling=self.scaling,
            state=held.state,
            softcap=self.softcap,
            sink_logits=self.sinks,
            rope=self.rope,
            layer=self.rank,
            layers=self.layers,
            seed=plan.wish.settings.seed,
            calibration=self.calibration,
            prompt=begin < plan.prompt,
        )


@dataclass
class Layer:
    """A layer of a request: where it is, what it holds, and its pages."""

    site: Site
    held: Held
    pages: Pages


@dataclass
class Counts:
    """What became of the slots of a request, over all layers and heads of this process."""

    events: int = 0
    kept: int = 0
    dropped: int = 0
    merged: int = 0


def compress(layers: Sequence[Layer], plan: Plan, end: int, counts: Counts) -> None:
    """Bring ``layers``, which hold ``end`` tokens, to what ``plan`` says; ``end`` is one of its events.

    Layers whose pages roam are written when all have been read: each writes where others lay.
    """
    counts.events += 1
    counts.kept = 0
    for together in [list(layers)] if plan.roams else [[layer] for layer in layers]:
        slots = _kept(together, plan, end, counts)
        if slots is not None:
            _write(together, plan, end, slots)
        for layer in together:
            counts.kept += int(layer.held.lengths(end).sum())
            if plan.every is None:
                layer.held.state.clear()


def _kept(layers: list[Layer], plan: Plan, end: int, counts: Counts) -> list[Slots] | None:
    """The slots that stay of each layer; None where nothing has ever been dropped, and nothing is now."""
    budgets = [torch.tensor([_budget(layer, plan, end)], device=layer.pages.table.device) for layer in layers]
    lengths = [layer.held.lengths(end).to(budget.device) for layer, budget in zip(layers, budgets, strict=True)]
    over = apply.over_budget(plan.wish.method, lengths, budgets, budgets[0].new_tensor([end]))
    if not bool(over.any()):
        fresh = all(layer.held.counts is None for layer in layers)
        return None if fresh else [layer.pages.read(layer.held, end) for layer in layers]
    found = []
    for one in _reduced(layers, plan, end, budgets, over):
        counts.dropped += int(one.dropped.sum())
        counts.merged += int(one.merged.sum())
        found.append(one.slots)
    return found


def _budget(layer: Layer, plan: Plan, end: int) -> int:
    if plan.packed:
        return plan.wanted(end, layer.site.rank if plan.roams else 0)
    return plan.held(end)  # with ``fill`` up to a block more than wanted


def _reduced(layers: list[Layer], plan: Plan, end: int, budgets: list[Tensor], over: Tensor) -> list[Reduced]:
    """What is left of each of ``layers``. Where they share one budget each is read twice, so that no two are copied at
    once: the scores of all come first."""
    method = plan.wish.method

    def view(layer: Layer) -> LayerView:
        return layer.site.view(layer.pages.read(layer.held, end), layer.held, end, plan)

    if not method.allocate.joint:
        alone = (apply.compress(method, [view(x)], [budget]) for x, budget in zip(layers, budgets, strict=True))
        return [one for done in alone for one in done]
    scored = [apply.score(method, view(x), budget) for x, budget in zip(layers, budgets, strict=True)]
    shared = apply.share(method, scored, [], budgets)
    return [_chosen(view, x, one, wanted, plan, over) for x, one, wanted in zip(layers, scored, shared, strict=True)]


def _chosen(
    view_of: Callable[[Layer], LayerView], layer: Layer, scored: apply.Scored, wanted: Tensor, plan: Plan, over: Tensor
) -> Reduced:
    view = view_of(layer)
    apply.close_gaps(view)
    view.protected, view.memo = scored.protected, scored.memo
    keep, scores = apply.choose(plan.wish.method, view, scored, wanted)
    apply.take_stats(view, over)
    return apply.reduce(plan.wish.method, view, keep, scores)


def _write(layers: list[Layer], plan: Plan, end: int, slots: list[Slots]) -> None:
    """Store what stays of all ``layers``, whose lanes are numbered through where pages roam."""
    counts = torch.cat([one.lengths[0] for one in slots])
    most = plan.held(end) * len(counts)
    assert int(counts.sum()) <= most, f"{int(counts.sum())} slots stay where the plan has room for {most}"
    for layer, one in zip(layers, slots, strict=True):
        layer.held.event, layer.held.counts, layer.held.most = end, counts, one.shape[2]
        layer.pages.write(layer.held, one)
