"""Which layers and heads a compression starves: each is given its slots back in turn, and what is left is measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from keepkv.core.budget import Budget
from keepkv.core.when import When
from keepkv.engine.cache import Cache
from keepkv.engine.passes import again
from keepkv.errors import KeepKVError
from keepkv.evaluation.fidelity.giving_back import check_heads, held, with_head, with_layers
from keepkv.evaluation.fidelity.passages import Passage
from keepkv.evaluation.fidelity.reading import check_compressed, logits_after
from keepkv.evaluation.fidelity.rows import GivenBack, LayersRow
from keepkv.evaluation.setup import Variant
from keepkv.measure.environment import MadeWith
from keepkv.measure.interval import bootstrap
from keepkv.metrics import kl
from keepkv.tasks.asking import compressed, pad, read
from keepkv.tasks.length import check_tokens

HALF = 0.5  # of the KL: what a layer or head accounts for at least that is said to carry it
Place = tuple[int, int | None]  # a layer, and a KV head of it or None for all


@dataclass
class _Found:
    """What was found of each passage so far. kl, whole: as it is, and with everything given back. back, held: of each
    place, the KL with it given back and the share of its slots that was held."""

    ratio: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    back: dict[Place, list[float]] = field(default_factory=dict)
    held: dict[Place, list[float]] = field(default_factory=dict)


@torch.inference_mode()
def by_layer(
    model: Any,
    passages: Sequence[Passage],
    variant: Variant,
    budget: Budget | float | int | str,
    *,
    heads: Sequence[int] = (),
    seed: int = 0,
    name: str | None = None,
    step: Callable[[str], None] = lambda what: None,
) -> LayersRow:
    """What is left of the KL to the full cache when each compressed layer holds all its slots again, in turn.

    Each context is read with the full cache and with the method's, and compressed once. The KL(full ‖ compressed) of
    the next-token distributions, in nats, is then the mean over the tokens of each pair ``behind``, the mean over the
    pairs, and as an ``Estimate`` the mean over ``passages``: as it is; with each layer given back alone; with each KV
    head of the layers ``heads``; and with all layers, which is 0 but for what a codec or a selection costs. Batch 1.
    One forward of what is behind for each of them.

    A layer given back holds its slots from before the compression, and the others stay as they are. One that half of
    the KL goes away with carries it. It is starved if it also holds no larger share of its slots than the layers do on
    average: others were given what it lacks. Where two layers must both be whole, neither shows it alone.
    seed: of methods that draw, with the number of the passage, and of the bootstrap. ``step`` is told what comes next.
    Raises ``KeepKVError`` where nothing is compressed, a passage is too long or a layer of ``heads`` is not compressed.
    """
    if not passages:
        raise KeepKVError("no passages to measure: give at least one")
    check_tokens(model, max(passage.longest for passage in passages), "a passage")
    asked, found = Budget.of(budget), _Found()
    for i, passage in enumerate(passages):
        _measure(model, passage, variant, asked, heads, seed + i, found, partial(_tell, step, i + 1))
    mean = fmean(share for place, shares in found.held.items() if place[1] is None for share in shares)
    back = [_given_back(found, place, mean, seed) for place in found.back]
    return LayersRow(
        method=variant.method,
        options=variant.options,
        budget=asked.value,
        ratio=fmean(found.ratio),
        passages=len(passages),
        kl=bootstrap(found.kl, seed),
        whole=bootstrap(found.whole, seed),
        layers=[one for one in back if one.head is None],
        heads=[one for one in back if one.head is not None],
        seed=seed,
        made_with=MadeWith.of(model, name),
    )


def steps(model: Any, passages: Sequence[Passage], heads: Sequence[int] = ()) -> int:
    """How often ``by_layer`` calls ``step``."""
    return len(passages) * (3 + len(Cache(model, "full").compressible) + len(set(heads)))


def _tell(step: Callable[[str], None], number: int, what: str) -> None:
    step(f"text {number}: {what}")


def _measure(
    model: Any, passage: Passage, variant: Variant, budget: Budget, heads: Sequence[int], seed: int, found: _Found,
    step: Callable[[str], None],
) -> None:  # fmt: skip
    step("full")
    full = Cache(model, "full")
    mask = read(model, full, [passage.context])
    truth = list(_logits(model, full, mask, passage))
    step(variant.label)
    whole = Cache(model, variant.method, budget, **{"seed": seed, **variant.options}).copy(when=When("deferred"))
    check_heads(whole, heads)
    read(model, whole, [passage.context])
    again.look_again(model, whole, *pad([passage.context], model.device))
    small = compressed(whole, budget)
    whole.compressing = False
    check_compressed(small, variant.label, budget, len(passage.context))

    def left(cache: Cache) -> float:
        logits = _logits(model, cache, mask, passage)
        return fmean(float(kl(a.float(), b.float()).mean()) for a, b in zip(truth, logits, strict=True))

    layers = [layer.info.index for layer in small.compressible]
    shares = {layer: held(small, whole, layer) for layer in layers}
    found.ratio.append(small.report().ratio)
    found.kl.append(left(small))
    step("everything given back")
    found.whole.append(left(with_layers(small, whole, layers)))
    for layer in layers:
        step(f"layer {layer}")
        _enter(found, (layer, None), fmean(shares[layer]), left(with_layers(small, whole, [layer])))
    for layer in dict.fromkeys(heads):
        step(f"heads of layer {layer}")
        for head, share in enumerate(shares[layer]):
            _enter(found, (layer, head), share, left(with_head(small, whole, layer, head)))


def _logits(model: Any, cache: Cache, mask: Tensor, passage: Passage) -> Iterator[Tensor]:
    """For each pair behind a context, logits (T,V) from the last token given to the last one said."""
    for given, said in passage.behind:
        ids = torch.tensor([given + said], device=mask.device)
        yield logits_after(model, cache.copy(), mask, ids)[len(given) - 1 :]


def _enter(found: _Found, place: Place, share: float, left: float) -> None:
    found.held.setdefault(place, []).append(share)
    found.back.setdefault(place, []).append(left)


def _given_back(found: _Found, place: Place, mean: float, seed: int) -> GivenBack:
    """mean: the share of their slots that all layers together hold."""
    share, left, before = fmean(found.held[place]), bootstrap(found.back[place], seed), fmean(found.kl)
    accounts = 1 - left.mean / before if before else 0.0
    carries = accounts >= HALF
    return GivenBack(*place, share, left, accounts, carries, carries and round(share, 6) <= round(mean, 6))
