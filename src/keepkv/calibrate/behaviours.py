"""Kind "heads": what each KV head looks at while a model answers questions on needles."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from keepkv.allocate.profile import KIND, MEASURED, PREFIX
from keepkv.calibrate.base import Found, Tensors, register_kind
from keepkv.calibrate.needles import Needle
from keepkv.calibrate.patterns import read_pattern
from keepkv.core.options import Seed, Share, Size, one_of
from keepkv.core.slots import LayerView
from keepkv.core.when import When
from keepkv.engine.cache import Cache
from keepkv.engine.passes.reread import feed, watching
from keepkv.errors import CalibrationError
from keepkv.methods import Method
from keepkv.metrics.rank import spearman
from keepkv.observe.attention import weights
from keepkv.score.base import Score
from keepkv.tasks.asking import Ids, probability, reply, rows_of

SINKS = 4  # first tokens, which are like no others: neither needle nor among the most attended
TINY = 1e-9  # of attention: what has less in all has no share
STATE = "heads_behaviours"  # in view.state
SPLITS, RELIABLE = 5, 0.8
GROUPS: dict[str, Callable[[Tensor], Tensor]] = {  # of (…,H,G)
    "max": lambda x: x.amax(-1), "mean": lambda x: x.mean(-1), "sum": lambda x: x.sum(-1),
}  # fmt: skip


def behaviours(rows: Tensor, start: int, needle: Sequence[int], said: Sequence[int], k: int = 10) -> Tensor:
    """(len(MEASURED), N) of N heads: means over T steps of a reply; NaN where no step is of the kind.

    rows (N,T,C): attention of each step to the C tokens of the context. needle: its token ids, from ``start`` on.
    said: the token that each step gives. The first ``SINKS`` tokens are left out. With the ``k`` most attended tokens
    of a step, TP their attention within the needle, FP without, FN what the rest of the needle has:

    precision = TP/(TP+FP), recall = TP/(TP+FN), inf = their harmonic mean, found = TP; where a sum is below ``TINY``,
    0. copy: attention to the tokens of the needle that are the one the step gives, of steps that give one of them.
    compose: attention to the needle, of the other steps. area: how far back attention lies, from 0, the end, to 1.
    """
    size = rows.shape[-1]
    at = torch.arange(size, device=rows.device)
    rows = rows.masked_fill(at < SINKS, 0.0)
    ids = torch.full((size,), -1, device=rows.device)
    ids[start : start + len(needle)] = torch.tensor(needle, device=rows.device)
    inside = (ids >= 0) & (at >= SINKS)
    top = rows.masked_fill(at < SINKS, -1.0).topk(min(k, size), dim=-1).indices
    chosen = torch.zeros_like(rows, dtype=torch.bool).scatter_(-1, top, True)
    whole = (rows * inside).sum(-1)  # (N,T)
    tp, picked = (rows * (chosen & inside)).sum(-1), (rows * chosen).sum(-1)
    precision, recall = _ratio(tp, picked), _ratio(tp, whole)
    inf = _ratio(2 * precision * recall, precision + recall)
    same = ids == torch.tensor(said, device=rows.device)[:, None]  # (T,C)
    copies = same.any(-1)
    copied = (rows * same).sum(-1)
    area = _ratio((rows * (1 - (at + 1) / size)).sum(-1), rows.sum(-1))
    every = {
        "inf": inf, "precision": precision, "recall": recall, "found": tp, "area": area,
        "copy": copied.masked_fill(~copies, float("nan")), "compose": whole.masked_fill(copies, float("nan")),
    }  # fmt: skip
    return torch.stack([every[name].nanmean(-1) for name in MEASURED])


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    return torch.where(b < TINY, 0.0, a / b.clamp_min(TINY))


@dataclass(frozen=True)
class Watch(Score):
    """Looks at how the last tokens that are fed attend to the context, a layer at a time, and scores nothing."""

    context: int = 0
    start: int = 0
    needle: tuple[int, ...] = ()
    said: tuple[int, ...] = ()
    k: int = 10
    observes: ClassVar[bool] = True

    def observe(self, view: LayerView) -> None:
        steps = len(self.said)
        if not steps:  # the context itself is read
            return
        positions = view.slots.positions[0, 0]
        rows = weights(view, view.queries[:, :, -steps:], view.query_positions[:, -steps:])[0].flatten(0, 1)
        rows = rows[..., (positions >= 0) & (positions < self.context)]
        view.state[STATE] = behaviours(rows, self.start, self.needle, self.said, self.k)[None]


@dataclass
class Run:
    """A needle whose question the model has answered. by: "reply", or "likelihood" of the true answer. found:
    ``behaviours`` (len(MEASURED), H*G) by layer."""

    needle: Needle
    by: str
    found: dict[int, Tensor]


@register_kind(KIND)
@torch.no_grad()
def heads(
    model: PreTrainedModel,
    batches: Iterable[Tensor],
    needles: Sequence[Needle] | None = None,
    k: Size = 10,
    group: Annotated[str, one_of(*GROUPS)] = "max",
    likely: Share = 0.3,
    seed: Seed = 0,
    pattern: str | None = None,
) -> Found:
    """Per layer ``heads_NAME`` (H,) of each KV head, NAME of ``MEASURED``, see ``behaviours``: means over answers.

    SurfaceLogicKV (arXiv 2508.15806) tells heads that memorise from heads that construct. Its formulas and numbers were
    not found: this is a reconstruction from its predecessor's code (DiliLazyKV), with the faults of that mended. All
    steps of an answer count, by key; first tokens and the question are out of it. Two labellings are measured at once:
    by confusion with the needle (precision, recall, inf), and by what is said (copy, compose).

    needles: for each text, see ``needles.with_needles``. A run counts where the model's own reply has the answer, up
    to its last token, or where the true answer has at least the mean probability ``likely``, and is then fed; others
    are ignored. k: most attended tokens of a step. group: of the query heads of a KV head. Halves of the runs are drawn
    with ``seed``: where their profiles rank heads alike by less than .8, a warning says so. pattern: a file of
    DuoAttention (.tsv) or LU-KV (.npy) that is read instead: ``patterns.read_pattern``.

    Raises ``CalibrationError`` where no run counts.
    """
    if pattern is not None:
        return read_pattern(model, pattern)
    if not needles:
        raise CalibrationError("heads are measured on needles: give needles=, of keepkv.calibrate.with_needles")
    runs, count, kv = [], 0, {}
    cache = Cache(model, Method(Watch(), when=When("deferred")), 1.0)
    for ids, needle in zip(batches, needles, strict=True):
        count += 1
        cache.reset()
        feed(model, cache, ids, ids.new_ones(1, 0))
        kv = {layer.info.index: layer.store.lengths.shape[1] for layer in cache.compressible}
        said, by = _answer(model, cache, ids, needle, likely)
        if said:
            runs.append(Run(needle, by, _watched(model, cache, ids, needle, said, k)))
    if not runs and kv:
        raise CalibrationError(
            f"the model knew none of {count} answers, so that nothing tells its heads apart: give shorter texts "
            f"(--length), or a smaller likely= than {likely:g}"
        )
    table = {
        i: torch.stack([GROUPS[group](run.found[i].view(len(MEASURED), h, -1)) for run in runs]) for i, h in kv.items()
    }  # (runs, names, H)
    tensors: Tensors = {
        i: {PREFIX + name: x[:, j].nanmean(0).nan_to_num(nan=0.0).float().cpu() for j, name in enumerate(MEASURED)}
        for i, x in table.items()
    }
    facts = {"runs": count, "accepted": len(runs), "by": dict(Counter(run.by for run in runs))}
    facts |= {"sorts": dict(Counter(run.needle.sort for run in runs)), "reliability": _reliability(table, seed)}
    return Found(tensors, facts, _said(facts, tensors))


def _answer(model: PreTrainedModel, cache: Cache, ids: Tensor, needle: Needle, likely: float) -> tuple[Ids, str]:
    """The tokens by which the question is answered, and how that was found out; none where it is not."""
    twin, mask = rows_of(cache, torch.ones_like(ids), [0])
    [tokens] = reply(model, twin, mask, [needle.asked.prompt], needle.asked.limit)[0].tolist()
    ends = getattr(model.generation_config, "eos_token_id", None)
    stop = next((i for i, x in enumerate(tokens) if x in (ends if isinstance(ends, list) else [ends])), len(tokens))
    for answer in needle.answers:
        for i in range(stop - len(answer) + 1):
            if tuple(tokens[i : i + len(answer)]) == answer:
                return tokens[: i + len(answer)], "reply"
    twin, mask = rows_of(cache, torch.ones_like(ids), [0])
    sure = probability(model, twin, mask, [needle.asked])[0] >= likely
    return (needle.asked.answer, "likelihood") if sure else ([], "")


def _watched(model: PreTrainedModel, cache: Cache, ids: Tensor, needle: Needle, said: Ids, k: int) -> dict[int, Tensor]:
    """``behaviours`` by layer while ``said`` is said behind the question."""
    twin = watching(cache, score=Watch(ids.shape[1], needle.start, needle.ids, tuple(said), k))
    feed(model, twin, ids.new_tensor([needle.asked.prompt + said[:-1]]), torch.ones_like(ids))
    return {layer.info.index: layer.score_state[STATE][0] for layer in twin.compressible}


def _reliability(table: dict[int, Tensor], seed: int) -> dict[str, float | None]:
    """Of each name, the rank correlation of heads between halves of the runs, mean over ``SPLITS``; None: no order."""
    runs = torch.cat([*table.values()], dim=-1)  # (runs, names, heads)
    generator, found = torch.Generator().manual_seed(seed), {name: list[float]() for name in MEASURED}
    for _ in range(SPLITS if len(runs) > 1 else 0):
        order = torch.randperm(len(runs), generator=generator).to(runs.device)
        halves = [runs[part].nanmean(0) for part in (order[::2], order[1::2])]
        for j, name in enumerate(MEASURED):
            one, two = (half[j].tolist() for half in halves)
            rho = None if any(x != x for x in one + two) else spearman(one, two)
            if rho is not None:
                found[name].append(rho)
    return {name: sum(x) / len(x) if x else None for name, x in found.items()}


def _said(facts: dict[str, Any], tensors: Tensors) -> list[str]:
    """The facts for a reader; warns of profiles that would be others on other texts."""
    how = ", ".join(f"{n} by {by}" for by, n in facts["by"].items())
    sorts = ", ".join(f"{n} {sort}" for sort, n in facts["sorts"].items())
    lines = [f"{facts['accepted']} of {facts['runs']} answers were known ({how}): {sorts}", ""]
    lines.append("profile    halves agree  largest heads (layer.head)")
    weak = []
    for name in MEASURED:
        every = {f"{i}.{h}": x for i, held in tensors.items() for h, x in enumerate(held[PREFIX + name].tolist())}
        best = sorted(every, key=lambda key: -every[key])[:5]
        rho = facts["reliability"][name]
        weak += [name] if rho is None or rho < RELIABLE else []
        shown = "   –" if rho is None else f"{rho:4.2f}"
        lines.append(f"{name:9}  {shown:12}  " + "  ".join(f"{key} {every[key]:.3f}" for key in best))
    if weak:
        warnings.warn(
            f"profiles of heads that two halves of the runs rank alike by less than {RELIABLE}: {', '.join(weak)}. "
            "Give more --tokens, or choose another profile",
            stacklevel=2,
        )
    return lines
