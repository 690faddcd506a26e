"""Reinforcement learning under eviction, with the full cache, and none: each asked with a compressed and a full cache.

    python -m benchmarks.training.rl.run --work /tmp/rl-study [--study facts]     # resumes, within a training too

Three studies: codes in a little prose with 24 slots; facts in 640 tokens, of which 5 % are kept; a list of some 48
tokens that is repeated with 48 slots, long replies. A row is one held-out question, asked of one trained model with one
cache. The questions are the same for all, and no training saw them; a seed decides which prompts a training meets, in
which order, and what is drawn.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, set_seed

from keepkv import tasks
from keepkv.embedded import embedded_model
from keepkv.engine.cache import Cache
from keepkv.evaluation.setup import HELD_OUT
from keepkv.measure.environment import MadeWith
from keepkv.measure.ledger import Ledger
from keepkv.measure.rows import INLINE, Row
from keepkv.tasks import grade
from keepkv.tasks.asking import encode
from keepkv.training.config import Compress, Data, Optimise
from keepkv.training.rl import Config, train
from keepkv.training.rl.rollout import roll

SEEDS = (0, 1, 2)
ARMS = ("none", "RL-full", "RL-sparse")
STEPS, PROMPTS, SAMPLES, RATE = 30, 4, 8, 3e-4
DRAWS = 2  # replies drawn of each question that is asked


@dataclass(frozen=True, kw_only=True)
class Study:
    """A task and the cache that hurts it. options: of the task; asks: questions of each context; contexts: that are
    asked about; reply: tokens of a reply at most."""

    compress: Compress
    task: str
    length: int
    options: dict[str, Any]
    asks: int
    contexts: int
    reply: int

    def config(self, arm: str, seed: int, out: Path) -> Config:
        """Of the training of ``arm``; it meets no prompt twice."""
        return Config(
            out=str(out), device="cpu", samples=SAMPLES, reply=self.reply,
            compress=self.compress if arm == "RL-sparse" else Compress(method="full", budget=1.0),
            data=Data(
                source=self.task, length=self.length, items=STEPS * PROMPTS // self.asks, seed=10_000 * seed,
                options=self.options,
            ),
            optimise=Optimise(
                steps=STEPS, batch=PROMPTS * SAMPLES, learning_rate=RATE, schedule="constant_with_warmup",
                save_every=10, seed=seed,
            ),
        )  # fmt: skip


def snapkv(budget: float) -> Compress:
    return Compress(method="snapkv", budget=budget, every=4, options={"window": 4, "sinks": 2})


STUDIES = {
    "codes": Study(
        compress=snapkv(24), task="niah-multivalue", length=64, options={"keys": 2, "values": 3}, asks=2, contexts=64,
        reply=9,
    ),
    "facts": Study(
        compress=snapkv(32), task="niah-multivalue", length=640, options={"keys": 4, "values": 2}, asks=4, contexts=24,
        reply=8,
    ),
    "copy": Study(
        compress=Compress(method="g-kv", budget=48, every=16, options={"window": 4, "sinks": 2}), task="long-decode",
        length=48, options={"kind": "copy"}, asks=1, contexts=48, reply=56,
    ),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Replied(Row):
    """One question. study: which task and cache. arm, seed: which training; ``none`` has seed 0 alone. cache:
    "compressed" or "full", in which it was asked. item: which question. greedy: score of the most likely reply; drawn:
    mean score of ``DRAWS`` replies at temperature 1, which is what the training maximises."""

    arm: str
    seed: int
    cache: str
    item: int
    greedy: float
    drawn: float
    steps: int
    trl: str
    study: str = "codes"
    made_with: MadeWith = field(metadata=INLINE)


def loaded() -> tuple[Any, Any]:
    """The embedded model and its tokenizer."""
    path = embedded_model()
    return AutoModelForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)


def trained(study: Study, arm: str, seed: int, work: Path) -> tuple[Any, Any, int]:
    """The model of an arm after its training, its tokenizer, and the steps."""
    model, tokenizer = loaded()
    if arm == "none":
        return model, tokenizer, 0
    say = lambda said: print(f"{arm}, seed {seed}: {said}", flush=True)  # noqa: E731
    done = train(study.config(arm, seed, work / f"{arm}-{seed}"), model, tokenizer, say)
    return model.eval(), tokenizer, done.steps


@torch.no_grad()
def asked(study: Study, model: Any, tokenizer: Any, cache: str) -> list[tuple[float, float]]:
    """Of each held-out question the score of the most likely reply, and the mean of the drawn ones."""
    task, numbers = tasks.get(study.task), range(HELD_OUT, HELD_OUT + study.contexts)
    items = [encode(tokenizer, task.generate(tokenizer, study.length, i, **study.options)) for i in numbers]
    pairs = [(item.context + one.prompt, one) for item in items for one in item.asked]
    given = {"max_new_tokens": study.reply, "pad_token_id": 0, "eos_token_id": model.generation_config.eos_token_id}
    greedy = GenerationConfig(do_sample=False, temperature=1.0, **given)
    draw = GenerationConfig(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, **given)
    set_seed(0)
    scores = []
    for config in (greedy, *[draw] * DRAWS):
        holds = study.compress.cache(model, trained=True) if cache == "compressed" else Cache(model, "full")
        replies = roll(model, holds, [ids for ids, _ in pairs], config).replies
        assert holds.report().compressed == (cache == "compressed")
        scores.append([
            grade(tokenizer, one.question, one.answer, reply).value
            for (_, one), reply in zip(pairs, replies, strict=True)
        ])  # fmt: skip
    return [(first, sum(rest) / len(rest)) for first, *rest in zip(*scores, strict=True)]


def rows(study: str, arm: str, seed: int, work: Path) -> Iterator[Replied]:
    """A row for each held-out question and cache."""
    import trl

    model, tokenizer, steps = trained(STUDIES[study], arm, seed, work)
    made = MadeWith.of(model, "embedded")
    for cache in ("compressed", "full"):
        for i, (greedy, drawn) in enumerate(asked(STUDIES[study], model, tokenizer, cache)):
            yield Replied(
                study=study, arm=arm, seed=seed, cache=cache, item=i, greedy=greedy, drawn=drawn, steps=steps,
                trl=trl.__version__, made_with=made,
            )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints")
    parser.add_argument("--study", action="append", choices=STUDIES, help="repeatable; all if absent")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    given = parser.parse_args()
    torch.set_num_threads(1)
    given.out.mkdir(parents=True, exist_ok=True)
    ledger = Ledger(given.out / "rows.jsonl", Replied)
    done = {(row.study, row.arm, row.seed) for row in ledger.rows()}
    for study in given.study or STUDIES:
        for arm, seed in [("none", 0), *((arm, seed) for seed in SEEDS for arm in ("RL-sparse", "RL-full"))]:
            if (study, arm, seed) not in done:
                ledger.append(rows(study, arm, seed, given.work / study))
                print(f"{study}, {arm}, seed {seed}: done", flush=True)


if __name__ == "__main__":
    main()
