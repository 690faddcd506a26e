"""Slots, biases and values chosen by the queries that the error is measured at: tensors alone, for ``oracle.py``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from fidelity import Reference
from torch import Tensor

from keepkv.engine.cache import Cache

FLOOR = 0.02  # relative error below which that of a token counts by its square
STEP, EXCHANGES = 0.04, 40  # share of the slots that leave at once; rounds of exchange
VOTES = (0.02, 50.0)  # a slot is refitted to stand for so many at least and at most


@dataclass(frozen=True)
class Asking:
    """Queries of questions and answers over one context: L layers, H KV heads, G query heads each, Q tokens.

    given (L,H,G,Q,S), mass (L,H,G,Q,1): the full run's attention to slots of the context, and to tokens read since;
    said (L,H,G,Q,D): what the latter say. values (L,H,S,D). output (L,H,G,Q,D): the full run's. size (L,Q): its norm.
    """

    given: Tensor
    mass: Tensor
    said: Tensor
    values: Tensor
    output: Tensor
    size: Tensor

    def to(self, dtype: torch.dtype) -> Asking:
        return Asking(*(getattr(self, field.name).to(dtype) for field in fields(self)))


def asking(cache: Cache, full: Reference) -> Asking:
    """What ``full`` asked of ``cache``, which holds the whole context, in float64."""
    layers: Any = cache.layers
    found = []
    for call in full.calls:
        assert call.new is not None
        slots = layers[call.layer].store.view()
        keys, values = slots.keys[0].double(), slots.values[0].double()
        rows, _, length, width = call.query.shape
        query = call.query.double().view(rows, len(keys), -1, length, width) * call.arguments["scaling"]
        block = call.rule.new_block()
        own = query @ call.new[0].double()[:, :, None].mT
        own = own if block is None else own.masked_fill(~block[:, :, None], float("-inf"))
        given, mine = torch.cat((query @ keys[:, None].mT, own), -1).softmax(-1).split((keys.shape[1], length), -1)
        said, output = mine @ call.new[1].double()[:, :, None], call.output.double().unflatten(2, (len(keys), -1))
        parts = [x.permute(1, 2, 0, 3, 4)[:, :, full.new] for x in (given, mine.sum(-1, keepdim=True), said)]
        output = output.permute(2, 3, 0, 1, 4)[:, :, full.new]
        found.append((*parts, values, output, output.square().sum((0, 1, 3)).sqrt()))
    return Asking(*map(torch.stack, zip(*found, strict=True)))


def answer(ask: Asking, votes: Tensor, values: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Outputs (L,H,G,Q,D) and denominators where slots have ``votes`` (L,H,S), 0 for those that are gone."""
    given = ask.given * votes[:, :, None, None]
    mass = given.sum(-1, keepdim=True) + ask.mass
    return (given @ (ask.values if values is None else values)[:, :, None] + ask.said) / mass, mass


def errors(ask: Asking, output: Tensor) -> Tensor:
    """(L,Q): relative error of the layer's output at each token."""
    return (output - ask.output).square().sum((1, 2, 4)).sqrt() / ask.size


def changes(ask: Asking, kept: Tensor) -> Tensor:
    """(L,H,S): what the error changes by if a slot alone goes, or comes where ``kept`` (L,H,S) bool is false."""
    output, mass = answer(ask, kept.to(ask.given.dtype))
    sign = torch.where(kept, -1.0, 1.0)[:, :, None, None].to(mass.dtype)
    step = -sign * ask.given / (mass + sign * ask.given).clamp_min(1e-9)  # o″ = o′ + step·(o′ − v)
    apart, values = output - ask.output, ask.values[:, :, None]
    along = (apart * output).sum(-1, keepdim=True) - apart @ values.mT
    far = output.square().sum(-1, keepdim=True) - 2 * (output @ values.mT) + values.square().sum(-1)[..., None, :]
    weight = 1 / (ask.size.square() * (errors(ask, output) + FLOOR))
    return torch.einsum("lq,lhgqs->lhs", weight, step * (2 * along + step * far))


def by_mass(ask: Asking) -> Tensor:
    """(L,H,S): mean attention."""
    return ask.given.mean((2, 3))


def by_effect(ask: Asking) -> Tensor:
    """(L,H,S): mean squared change of the output if the slot alone goes, over that of the output."""
    values, output = ask.values[:, :, None], ask.output
    far = output.square().sum(-1, keepdim=True) - 2 * (output @ values.mT) + values.square().sum(-1)[..., None, :]
    odds = ask.given / (1 - ask.given).clamp_min(1e-6)
    return torch.einsum("lq,lhgqs->lhs", ask.size.square().reciprocal(), odds.square() * far)


def top(scores: Tensor, held: Tensor, slots: int, pooled: bool) -> Tensor:
    """(L,H,S) bool: the best ``slots`` of each head, or as many on average, those of ``held`` among them."""
    flat = scores.masked_fill(held, float("inf")).reshape(*(() if pooled else scores.shape[:2]), -1)
    count = slots * scores[..., 0].numel() if pooled else slots
    return torch.zeros_like(flat).scatter_(-1, flat.topk(count).indices, 1.0).bool().view(scores.shape)


def search(ask: Asking, held: Tensor, sizes: Sequence[int]) -> dict[int, Tensor]:
    """For each of ``sizes``, slots a head on average, the kept ones (L,H,S) bool."""
    ask, kept, found = ask.to(torch.float32), torch.ones_like(held), {}
    for slots in sorted(sizes, reverse=True):
        total = slots * held[..., 0].numel()
        while (left := int(kept.sum()) - total) > 0:
            cost = changes(ask, kept).masked_fill(held | ~kept, float("inf")).flatten()
            leaving = cost.topk(min(left, max(1, int(STEP * int(kept.sum())))), largest=False).indices
            kept = kept.flatten().index_fill(0, leaving, False).view_as(held)
        kept = found[slots] = exchange(ask, held, kept)
    return found


def exchange(ask: Asking, held: Tensor, kept: Tensor) -> Tensor:
    """``kept`` with some slots exchanged for others, as long as that lowers the error."""
    many, best = int(kept.sum()) // 20, errors(ask, answer(ask, kept.float())[0]).mean()
    for _ in range(EXCHANGES):
        cost = changes(ask, kept).masked_fill(held, float("inf"))
        go, come = (cost.masked_fill(x, float("inf")).flatten().topk(many, largest=False) for x in (~kept, kept))
        trial = kept.flatten().index_fill(0, go.indices, False).index_fill(0, come.indices, True).view_as(kept)
        value = errors(ask, answer(ask, trial.float())[0]).mean()
        kept, best, many = (trial, value, many) if value < best else (kept, best, many // 2)
        if not many:
            break
    return kept


def refit(ask: Asking, kept: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """Votes (L,H,S) and values (L,H,S,D) of ``kept`` that come nearest to what ``ask``, in float64, had; each pulled
    towards what it was."""
    votes, values = kept.double(), ask.values.clone()
    weight = ask.size.reciprocal()[:, None, None, :, None]
    lost = (ask.given * ~kept[:, :, None, None]).sum(-1, keepdim=True)
    for at, column, apart in _heads(kept, ask.given * weight, lost * weight):
        votes[at] = (1 + solve(column, apart, ridge)[:, 0]).clamp(*VOTES)
    output, mass = answer(ask, votes)
    given = ask.given * votes[:, :, None, None] / mass
    for at, column, apart in _heads(kept, given * weight, (ask.output - output) * weight):
        values[at] += solve(column, apart, ridge)
    return votes, values


def _heads(kept: Tensor, given: Tensor, apart: Tensor) -> Iterator[tuple[tuple[int, int, Tensor], Tensor, Tensor]]:
    """For each head: its kept slots, their columns of ``given``, and ``apart``, a row a query."""
    for layer in range(kept.shape[0]):
        for head in range(kept.shape[1]):
            some = kept[layer, head].nonzero()[:, 0]
            yield (layer, head, some), given[layer, head].flatten(0, 1)[:, some], apart[layer, head].flatten(0, 1)


def solve(x: Tensor, y: Tensor, ridge: float) -> Tensor:
    """Ridge regression of ``y`` (M,D) on ``x`` (M,K): (K,D)."""
    square = x.mT @ x
    pull = ridge * square.diagonal().mean().clamp_min(1e-30)
    found: Tensor = torch.linalg.solve(square + pull * torch.eye(len(square), dtype=x.dtype), x.mT @ y)
    return found
