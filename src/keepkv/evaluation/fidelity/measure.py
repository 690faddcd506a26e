"""Fidelity: what compression changes, without labels, against the full cache on the same input."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from keepkv.core.budget import Budget
from keepkv.engine.cache import Cache
from keepkv.errors import KeepKVError
from keepkv.evaluation.fidelity.reading import check_compressed, grown, logits_after
from keepkv.evaluation.fidelity.replay import Call, record, replay
from keepkv.evaluation.fidelity.rows import FidelityRow
from keepkv.evaluation.setup import BASELINES, Variant
from keepkv.measure.environment import MadeWith
from keepkv.measure.interval import bootstrap, share
from keepkv.metrics import common_prefix, kl, relative_error, top1_agreement
from keepkv.tasks import asking
from keepkv.tasks.length import positions_of

Chosen = str | tuple[str, Mapping[str, Any]]  # a method by name, or with options
SHARES = ("first_token", "loyalty")  # metrics that are a yes or no of each segment


@dataclass
class _Case:
    """A method at a budget, and what was found on each segment so far."""

    variant: Variant
    budget: Budget
    receipts: list[Any] = field(default_factory=list)
    found: dict[str, list[float]] = field(default_factory=dict)
    layers: dict[int, list[float]] = field(default_factory=dict)

    def cache(self, model: Any, seed: int) -> Cache:
        return Cache(model, self.variant.method, self.budget, **{"seed": seed, **self.variant.options})


@dataclass(frozen=True)
class _Reference:
    """The full cache on one segment. logits (T,V) after each token of the continuation; calls: its attention."""

    logits: Tensor
    calls: list[Call]
    reply: list[int]


@torch.inference_mode()
def fidelity(
    model: Any,
    segments: Tensor,
    methods: Sequence[Chosen] = (),
    budgets: Sequence[Budget | float | int | str] = (0.1,),
    *,
    context: int,
    greedy: int = 32,
    seed: int = 0,
    name: str | None = None,
    step: Callable[[str], None] = lambda what: None,
) -> list[FidelityRow]:
    """One row for the full cache, then for each budget one for ``random``, ``snapkv`` and each of ``methods``.

    segments (N,L) token ids: of each, the first ``context`` are read and compressed once, the others are then
    teacher-forced on a copy of the cache, with no further compression. Batch 1. Metrics, each an ``Estimate`` over
    the N segments with its 95 % interval (bootstrap; Wilson where it is a share of segments):

        kl, reverse_kl   mean over positions of KL(full ‖ compressed) and KL(compressed ‖ full), nats
        top1             share of positions with the same most likely next token
        output_error     ‖o′−o‖ / ‖o‖ of attention outputs at the full run's queries, mean over layers, heads and
                         positions; over all that is held, whatever decoded tokens select of it
        prefix           tokens of the greedy reply, ``greedy`` at most, before the first difference
        prefix_share     the same by the length of the full cache's reply
        first_token      share of segments whose replies begin with the same token
        loyalty          share of segments whose replies are the same: EffiVLM-Bench's OL / 100, token by token

    The reply continues the first token after the context, which is given, so that every token of it is predicted from
    the compressed cache. ``step`` is told what comes next. Raises ``KeepKVError`` where a method compressed nothing.
    """
    n, length = segments.shape
    if n < 1 or not 0 < context < length:
        raise KeepKVError(f"{n} segments of {length} tokens, {context} of context: give at least 1 segment and token")
    if greedy < 1:
        raise KeepKVError(f"greedy={greedy}: a reply has at least one token")
    limit = positions_of(model)
    if limit is not None and max(length, context + 1 + greedy) > limit:
        raise KeepKVError(
            f"a segment of {length} tokens, with {context} of context and a reply of {greedy} after them, is longer "
            f"than the {limit} tokens that the model reads"
        )
    cases = _cases(methods, budgets)
    for case in cases:
        case.cache(model, seed)  # a wrong name, option or budget fails here, before anything is measured
    for i, segment in enumerate(segments.to(model.device)):
        step(f"segment {i + 1}: full")
        given, forced = segment[:context].tolist(), segment[None, context:]
        full, mask = _read(model, given, cases[0], seed + i)
        reference = _reference(model, full, mask, forced, greedy)
        for case in cases:
            step(f"segment {i + 1}: {case.variant.label}")
            cache = full if case is cases[0] else _read(model, given, case, seed + i)[0]
            case.receipts.append(cache.report())
            _measure(model, cache, mask, forced, reference, case)
    about = {"context": context, "continuation": length - context, "greedy": greedy, "segments": n, "seed": seed}
    made_with = MadeWith.of(model, name)
    return [_row(case, about, made_with) for case in cases]


def _cases(methods: Sequence[Chosen], budgets: Sequence[Budget | float | int | str]) -> list[_Case]:
    """The full cache first; what is asked for twice is measured once."""
    chosen = [Variant(one) if isinstance(one, str) else Variant(one[0], dict(one[1])) for one in (*BASELINES, *methods)]
    whole = Budget.of(1.0)
    cases: dict[tuple[str, Budget], _Case] = {}
    for budget in map(Budget.of, budgets):
        for variant in chosen:
            case = _Case(variant, whole if variant.method == "full" else budget)
            cases.setdefault((variant.label, case.budget), case)
    if not cases:
        raise KeepKVError("give at least one budget")
    return sorted(cases.values(), key=lambda case: case.variant.method != "full")


def _read(model: Any, context: list[int], case: _Case, seed: int) -> tuple[Cache, Tensor]:
    """The cache of ``context``, compressed once and closed to further compression, and its mask (1,T)."""
    cache = case.cache(model, seed)
    mask = asking.read(model, cache, [context])
    if any(layer.progress.pending for layer in cache.compressible):
        cache.compress()  # deferred to the next forward, which is ours to measure
    cache.compressing = False
    check_compressed(cache, case.variant.label, case.budget, len(context))
    return cache, mask


def _reference(model: Any, full: Cache, mask: Tensor, forced: Tensor, greedy: int) -> _Reference:
    twin = full.copy()
    calls = record(twin)
    logits = logits_after(model, twin, mask, forced)
    stops = model.generation_config.eos_token_id if model.generation_config else None
    ends = set(stops if isinstance(stops, list) else [stops])
    reply: list[int] = []
    for token in _decode(model, full, mask, forced[:, :1]):
        reply.append(token)
        if len(reply) == greedy or token in ends:
            break
    return _Reference(logits, calls, reply)


def _measure(model: Any, cache: Cache, mask: Tensor, forced: Tensor, reference: _Reference, case: _Case) -> None:
    logits = logits_after(model, cache.copy(), mask, forced)
    errors: dict[int, float] = {}
    for call, output in zip(reference.calls, replay(cache, reference.calls), strict=True):
        errors[call.index] = float(relative_error(call.output, output).mean())
    reply: list[int] = []
    for expected, token in zip(reference.reply, _decode(model, cache, mask, forced[:, :1]), strict=False):
        reply.append(token)
        if token != expected:  # what follows a difference decides nothing
            break
    prefix = common_prefix(reference.reply, reply)
    found = {
        "kl": float(kl(reference.logits, logits).mean()),
        "reverse_kl": float(kl(logits, reference.logits).mean()),
        "top1": float(top1_agreement(reference.logits, logits).double().mean()),
        "output_error": sum(errors.values()) / max(1, len(errors)),
        "prefix": float(prefix),
        "prefix_share": prefix / len(reference.reply),
        "first_token": float(prefix > 0),
        "loyalty": float(prefix == len(reference.reply)),
    }
    for key, value in found.items():
        case.found.setdefault(key, []).append(value)
    for layer, value in errors.items():
        case.layers.setdefault(layer, []).append(value)


def _decode(model: Any, cache: Cache, mask: Tensor, first: Tensor) -> Iterator[int]:
    """Greedy continuation of ``first`` (1,1) on a copy of ``cache``, token by token, without end."""
    return map(int, asking.greedy(model, cache.copy(), grown(mask, first), first))


def _row(case: _Case, about: dict[str, int], made_with: MadeWith) -> FidelityRow:
    n, seed, receipts = about["segments"], about["seed"], case.receipts
    kept = [head for receipt in receipts for rows in receipt.kept.values() for row in rows for head in row]
    return FidelityRow(
        method=case.variant.method,
        options=case.variant.options,
        budget=case.budget.value,
        slots=sum(kept) / max(1, len(kept)),
        bytes=sum(receipt.bytes for receipt in receipts) / n,
        full_bytes=sum(receipt.full_bytes for receipt in receipts) / n,
        ratio=sum(receipt.ratio for receipt in receipts) / n,
        metrics={
            key: share([value == 1.0 for value in values]) if key in SHARES else bootstrap(values, seed)
            for key, values in case.found.items()
        },
        layers={layer: bootstrap(values, seed) for layer, values in sorted(case.layers.items())},
        made_with=made_with,
        **about,
    )
