"""Kind "restore": learned tokens that read a whole text once, trained so that replies survive its compression."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div, pad
from transformers import PreTrainedModel

from keepkv.calibrate.base import Found, Tensors, register_kind
from keepkv.calibrate.questions import Exchange
from keepkv.core.options import shown
from keepkv.core.when import When
from keepkv.engine.cache import Cache
from keepkv.engine.passes.again import look_again
from keepkv.engine.passes.reread import feed
from keepkv.engine.passes.restore_slots import (
    DOWN,
    EMBEDDINGS,
    KIND,
    UP,
    adapted,
    append,
    embeddings,
    linear_maps,
)
from keepkv.errors import CalibrationError
from keepkv.methods import Method
from keepkv.methods.base import make_method
from keepkv.tasks.asking import Ids, step
from keepkv.training import NEVER, Record, record, replay

HELD_OUT = 5  # every fifth text says how well it does
JUDGED = 2  # questions of each of these
CLIP = 1.0  # norm of a gradient


@dataclass(frozen=True, eq=False)
class Lesson:
    """A text (1,T), questions with answers on it, and a cache that has read the text and was not compressed."""

    text: Tensor
    asked: Sequence[Ids]
    reader: Cache


@register_kind(KIND)
def restore(
    model: PreTrainedModel,
    batches: Iterable[Tensor],
    asked: Sequence[Sequence[Ids]],
    method: str = "keepkv2",
    budgets: Sequence[float] = (0.05, 0.1),
    slots: int = 8,
    rank: int = 4,
    steps: int = 400,
    rate: float = 3e-3,
    seed: int = 0,
) -> Found:
    """Embeddings of ``slots`` tokens and adapters of ``rank`` for the linear maps of each layer, trained together.

    RestoreKV (arXiv 2608.01247) with our replay: one forward over text, restore tokens, questions and answers, in which
    questions see the kept slots and the restore slots alone. Minimised: KL(full cache ‖ this) over answers, the model's
    own full cache being the teacher. The model's weights do not change.

    method, budgets: what chooses the kept slots, shares of the tokens; restore slots are part of them. asked: for each
    text the token ids of questions with their answers (``Exchange``), as they would be fed behind it. steps: of AdamW
    at ``rate``, one text, question and budget each, drawn with ``seed``. Every fifth text is held out, and says what is
    gained.

    Raises ``CalibrationError`` for a model in half precision on a CPU, or where the loss is not a number.
    """
    if not (slots >= 1 and rank >= 1 and steps >= 1 and 0 < rate < 1) or not all(0 < x < 1 for x in budgets):
        raise CalibrationError(
            f"restore(slots={slots}, rank={rank}, steps={steps}, rate={rate}, budgets={shown(budgets)}): positive "
            "numbers, a rate below 1, and shares of the tokens between 0 and 1"
        )
    if model.dtype != torch.float32 and model.device.type == "cpu":
        raise CalibrationError(f"the model is in {model.dtype} on a CPU: load it with dtype=torch.float32 to train")
    texts = list(zip(batches, asked, strict=False))
    if len(texts) < HELD_OUT:
        raise CalibrationError(f"restore needs at least {HELD_OUT} texts, {len(texts)} were given: give more tokens")
    lessons = [read(model, *x, method, slots) for x in texts]
    held = lessons[HELD_OUT - 1 :: HELD_OUT]
    generator = torch.Generator().manual_seed(seed)
    learned = _start(model, texts[0][0], slots, rank, generator)
    before = _mean_loss(model, [read(model, *x, method, 0) for x in texts[HELD_OUT - 1 :: HELD_OUT]], budgets, None)
    frozen = {x: x.requires_grad for x in model.parameters()}
    try:
        model.requires_grad_(False)
        _train(model, [x for x in lessons if x not in held], budgets, learned, steps, rate, generator)
    finally:
        for parameter, was in frozen.items():
            parameter.requires_grad_(was)
    after = _mean_loss(model, held, budgets, learned)
    made: Tensors = {index: {name: x.detach().cpu() for name, x in own.items()} for index, own in learned.items()}
    facts = {"kl": {str(b): [x, y] for b, x, y in zip(budgets, before, after, strict=True)}, "method": method}
    says = [
        f"KL from the full cache on {len(held)} texts held out, {method} at {budget:g} of the tokens: {x:.4f} without "
        f"restore slots, {y:.4f} with {slots}"
        for budget, x, y in zip(budgets, before, after, strict=True)
    ]
    return Found(made, facts, says)


def with_window(method: str, window: int) -> Method:
    """``method``, deferred, keeping ``window`` recent tokens at least."""
    made = make_method(method, {})
    return replace(made, window=max(made.window, window), when=When("deferred"))


@torch.no_grad()
def read(model: PreTrainedModel, ids: Tensor, asked: Sequence[Ids], method: str, window: int) -> Lesson:
    """A lesson on ``ids`` (1,T), whose cache always keeps ``window`` recent tokens at least."""
    if len(ids) != 1:
        raise CalibrationError(f"a batch of {len(ids)} texts was given: restore tokens are trained on texts of one row")
    reader = Cache(model, with_window(method, window), 1.0)
    feed(model, reader, ids, ids.new_ones(1, 0))
    look_again(model, reader, ids)
    return Lesson(ids, asked, reader)


@torch.no_grad()
def kept(model: PreTrainedModel, lesson: Lesson, budget: float, learned: Tensors | None, more: int) -> Record:
    """What stays of a lesson's text within ``budget``, with the restore tokens of ``learned`` behind it, if any, and
    ``more`` tokens behind these."""
    cache = lesson.reader.copy(budget=budget)
    recorder = record(cache)
    if learned is not None:
        count = len(embeddings(learned))
        with adapted(model, learned, slice(0, count)):
            append(model, cache, torch.ones_like(lesson.text), count)
    cache.compress()
    found = recorder.take()
    return Record(pad(found.evict_at, (0, more), value=NEVER), found.heads)


def _start(model: PreTrainedModel, text: Tensor, slots: int, rank: int, generator: torch.Generator) -> Any:
    """What is learned, by layer and name: embeddings of tokens of ``text``, and adapters that add nothing yet."""
    drawn = torch.randperm(text.shape[1], generator=generator)[:slots].to(text.device)
    first = model.get_input_embeddings()(text[0, drawn]).detach().clone()
    learned: dict[int, dict[str, Tensor]] = {}
    for index, maps in sorted(linear_maps(model).items()):
        held = learned.setdefault(index, {})
        if len(learned) == 1:
            held[EMBEDDINGS] = first.float()
        for name, module in maps.items():
            down = torch.randn(rank, module.in_features, generator=generator) / math.sqrt(module.in_features)
            held[DOWN + name] = down.to(text.device)
            held[UP + name] = torch.zeros(module.out_features, rank, device=text.device)
    for held in learned.values():
        for name, x in held.items():
            held[name] = nn.Parameter(x)
    return learned


def _train(
    model: PreTrainedModel, lessons: Sequence[Lesson], budgets: Sequence[float], learned: Any, steps: int, rate: float,
    generator: torch.Generator,
) -> None:  # fmt: skip
    parameters = [x for held in learned.values() for x in held.values()]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    for number in range(steps):
        lesson = lessons[int(torch.randint(len(lessons), (), generator=generator))]
        budget = budgets[int(torch.randint(len(budgets), (), generator=generator))]
        asked = lesson.asked[int(torch.randint(len(lesson.asked), (), generator=generator))]
        loss = divergence(model, lesson, asked, budget, learned)
        if not loss.isfinite():
            raise CalibrationError(f"step {number}: the loss is {loss.item()}. Try a smaller rate than {rate:g}")
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        schedule.step()


def divergence(model: PreTrainedModel, lesson: Lesson, asked: Ids, budget: float, learned: Tensors | None) -> Tensor:
    """Mean KL(full cache ‖ compressed) in nats over the tokens of the answer in ``asked``, of all its tokens where it
    does not say which are the answer's. learned: of the restore tokens behind the text; None: there are none."""
    text, behind = lesson.text, torch.tensor([asked], device=lesson.text.device)
    count = asked.answer if isinstance(asked, Exchange) else len(asked) - 1
    with torch.no_grad():
        reader = lesson.reader.copy()
        reader.compressing = False
        told = step(model, reader, behind, torch.ones_like(torch.cat((text, behind), 1)), keep=count + 1)
    stays = kept(model, lesson, budget, learned, len(asked))
    between = stays.evict_at.shape[-1] - text.shape[1] - len(asked)
    ids = torch.cat((text, text.new_zeros(1, between), behind), 1)
    with adapted(model, learned, slice(text.shape[1], text.shape[1] + between)) if learned else nullcontext():
        own = replay(model, ids, None, stays, logits_to_keep=count + 1)
    ours, wanted = (x[:, :count].float().log_softmax(-1) for x in (own[:, -count - 1 :], told))
    return kl_div(ours, wanted, log_target=True, reduction="none").sum(-1).mean()


@torch.no_grad()
def _mean_loss(
    model: PreTrainedModel, lessons: Sequence[Lesson], budgets: Sequence[float], learned: Tensors | None
) -> list[float]:
    """Mean divergence on ``lessons`` at each budget, of ``JUDGED`` questions each."""
    found = [
        [float(divergence(model, one, asked, budget, learned)) for budget in budgets]
        for one in lessons
        for asked in one.asked[:JUDGED]
    ]
    return torch.tensor(found).mean(0).tolist()
