"""What a model gains by being trained for its compressed cache: not at all, distilled, fine-tuned; compressed and full.

    python -m benchmarks.training.run --work /tmp/training-study     # resumes; about 10 minutes of one free core

Two tasks where compression hurts the embedded model: long replies (copying a list) with 48 slots per head, compressed
every 16 decoded tokens; and facts in prose at 5 % of the tokens, asked after compression. Three seeds decide the order
of the texts and which ones they are; the items that are asked are the same for all and no training sees them. A row is
one item with one trained model and one cache; what is done is not done again.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from keepkv import tasks
from keepkv.embedded import embedded_model
from keepkv.engine.cache import Cache
from keepkv.evaluation.answers import ask, separately
from keepkv.evaluation.setup import HELD_OUT
from keepkv.measure.environment import MadeWith
from keepkv.measure.ledger import Ledger
from keepkv.measure.rows import INLINE, Row
from keepkv.metrics import kl
from keepkv.tasks.asking import encode, read
from keepkv.training.config import Compress, Data, Distill, Optimise, Sft
from keepkv.training.feed import feed
from keepkv.training.replay import replay
from keepkv.training.run import distill, sft
from keepkv.training.texts import batch, of_seeds
from keepkv.training.trainer import full_logits

SEEDS = (0, 1, 2)
ARMS = ("untrained", "distilled", "fine-tuned")
CACHES = ("compressed", "full")


@dataclass(frozen=True)
class Study:
    """A task, the cache that hurts it, and how the model is trained for it. held_out: contexts that are asked about."""

    compress: Compress
    data: Data
    optimise: dict[str, Any]
    held_out: int


STUDIES = {
    "copy": Study(
        Compress(method="g-kv", budget=48, every=16, options={"window": 4, "sinks": 2}),
        Data(source="long-decode", length=48, items=1000, options={"kind": "copy"}),
        {"steps": 40, "batch": 8, "learning_rate": 5e-4, "save_every": 20},
        48,
    ),
    "facts": Study(
        Compress(method="keydiff", budget=0.05, options={"window": 4, "sinks": 2}),
        Data(source="niah-multikey-1", length=256, items=1000, together=True),
        {"steps": 40, "batch": 4, "learning_rate": 3e-4, "save_every": 20},
        32,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Answered(Row):
    """One context, asked of one model with one cache. score: mean over its questions. kl: from the full cache of the
    untrained model, in nats, mean over the tokens of the answers, which are fed; said: of these, the share that the
    model finds most likely. steps, first, last: of the training, and its loss at its ends; 0 without one."""

    study: str
    arm: str
    seed: int
    cache: str
    item: int
    score: float
    questions: int
    kl: float
    said: float
    steps: int
    first: float
    last: float
    made_with: MadeWith = field(metadata=INLINE)


def trained(name: str, arm: str, seed: int, work: Path) -> tuple[Any, tuple[int, float, float]]:
    """The model of an arm, and what its training took."""
    study, path = STUDIES[name], work / f"{name}-{arm}-{seed}"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(embedded_model()), tokenizer_of()
    if arm == "untrained":
        return model.eval(), (0, 0.0, 0.0)
    data = Data(**{**vars(study.data), "seed": seed * study.data.items})
    common = dict(
        out=str(path), device="cpu", compress=study.compress, data=data, optimise=Optimise(**study.optimise, seed=seed)
    )
    how = distill(Distill(**common), model, tokenizer) if arm == "distilled" else sft(Sft(**common), model, tokenizer)
    return model.eval(), (how.steps, how.losses[0], how.losses[-1])


def tokenizer_of() -> Any:
    return AutoTokenizer.from_pretrained(embedded_model())


@torch.inference_mode()
def scores(name: str, model: Any, tokenizer: Any, cache: str) -> list[list[float]]:
    """Of each held-out context the score of each question."""
    study = STUDIES[name]
    task = tasks.get(study.data.source)
    made = [
        task.generate(tokenizer, study.data.length, HELD_OUT + i, **study.data.options) for i in range(study.held_out)
    ]
    items = [encode(tokenizer, one) for one in made]
    holds: Cache = study.compress.cache(model) if cache == "compressed" else Cache(model, "full")
    if task.decodes:  # as `keepkv eval` does: the question is read with the list, but for its last token
        parts = [item.in_sight()[0] for item in items]
        mask = read(model, holds, [one.context for one in parts])
        found = [[one] for one in ask(model, tokenizer, holds, mask, [one.asked[0] for one in parts])]
    else:
        mask = read(model, holds, [item.context for item in items])
        holds.compressing = False
        found = separately(model, tokenizer, holds, mask, items, 64)
    assert holds.report().compressed == (cache == "compressed")
    return [[one.value for one in item] for item in found]


@torch.inference_mode()
def apart(name: str, model: Any, teacher: Any, tokenizer: Any, cache: str) -> list[tuple[float, float]]:
    """Of each held-out context, ``kl`` and ``said``; its questions and answers are fed in a row."""
    study, found = STUDIES[name], []
    data = study.data
    seeds = range(HELD_OUT, HELD_OUT + study.held_out)
    texts = of_seeds(tokenizer, data.source, data.length, seeds, data.options, together=True)
    for start in range(0, len(texts), 8):
        one = batch(texts[start : start + 8])
        logits, keep = full_logits(teacher, one), one.graded.shape[1] + 1
        if cache == "full":
            ours = full_logits(model, one)
        else:
            record = feed(model, study.compress.cache(model), one.input_ids, one.attention_mask, one.read)
            ours = replay(model, one.input_ids, one.attention_mask, record, logits_to_keep=keep)[:, :-1]
        divergence, hit = kl(logits, ours), ours.argmax(-1) == one.input_ids[:, -keep + 1 :]
        for x, right, graded in zip(divergence, hit, one.graded, strict=True):
            found.append((float(x[graded].mean()), float(right[graded].float().mean())))
    return found


def rows(name: str, arm: str, seed: int, work: Path) -> Iterator[Answered]:
    """A row for each held-out context and cache."""
    tokenizer = tokenizer_of()
    model, (steps, first, last) = trained(name, arm, seed, work)
    teacher, made_with = trained(name, "untrained", seed, work)[0], MadeWith.of(model, "embedded")
    for cache in CACHES:
        pairs = zip(scores(name, model, tokenizer, cache), apart(name, model, teacher, tokenizer, cache), strict=True)
        for i, (of_item, (divergence, said)) in enumerate(pairs):
            yield Answered(
                study=name, arm=arm, seed=seed, cache=cache, item=i, score=sum(of_item) / len(of_item),
                questions=len(of_item), kl=divergence, said=said, steps=steps, first=first, last=last,
                made_with=made_with,
            )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--study", choices=STUDIES, action="append", help="these alone; repeatable")
    given = parser.parse_args()
    torch.set_num_threads(1)
    given.out.mkdir(parents=True, exist_ok=True)
    ledger = Ledger(given.out / "rows.jsonl", Answered)
    done = {(row.study, row.arm, row.seed) for row in ledger.rows()}
    for seed in SEEDS:
        for name in given.study or STUDIES:
            for arm in ARMS:
                if (name, arm, seed) not in done and not (arm == "untrained" and seed):
                    ledger.append(rows(name, arm, seed, given.work))
                    print(f"{name}, {arm}, seed {seed}", flush=True)


if __name__ == "__main__":
    main()
