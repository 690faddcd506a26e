"""Reinforcement learning under eviction, with the full cache, and none: each asked with a compressed and a full cache.

    python -m benchmarks.training.rl.run --work /tmp/rl-study     # resumes, within a training too

A row is one held-out question, asked of one trained model with one cache. The questions are the same for all, and no
training saw them; a seed decides which prompts a training meets, in which order, and what is drawn.
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
METHOD = Compress(method="snapkv", budget=24, every=4, options={"window": 4, "sinks": 2})
ARMS: dict[str, Compress | None] = {"none": None, "RL-full": Compress(method="full", budget=1.0), "RL-sparse": METHOD}
TASK, LENGTH, OPTIONS = "niah-multivalue", 64, {"keys": 2, "values": 3}
STEPS, PROMPTS, SAMPLES, RATE = 30, 4, 8, 3e-4
CONTEXTS, DRAWS, REPLY = 64, 2, 9  # of the questions that are asked: two of each context, replies drawn of each


@dataclass(frozen=True, kw_only=True)
class Replied(Row):
    """One question. arm, seed: which training; ``none`` has seed 0 alone. cache: "compressed" or "full", in which it
    was asked. item: which question. greedy: score of the most likely reply; drawn: mean score of ``DRAWS`` replies at
    temperature 1, which is what the training maximises."""

    arm: str
    seed: int
    cache: str
    item: int
    greedy: float
    drawn: float
    steps: int
    trl: str
    made_with: MadeWith = field(metadata=INLINE)


def loaded() -> tuple[Any, Any]:
    """The embedded model and its tokenizer."""
    path = embedded_model()
    return AutoModelForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)


def trained(arm: str, seed: int, work: Path) -> tuple[Any, Any, int]:
    """The model of an arm after its training, its tokenizer, and the steps."""
    model, tokenizer = loaded()
    compress = ARMS[arm]
    if compress is None:
        return model, tokenizer, 0
    items = STEPS * PROMPTS // 2  # two questions each, none met twice
    config = Config(
        out=str(work / f"{arm}-{seed}"), device="cpu", compress=compress, samples=SAMPLES, reply=REPLY,
        data=Data(source=TASK, length=LENGTH, items=items, seed=10_000 * seed, options=OPTIONS),
        optimise=Optimise(
            steps=STEPS, batch=PROMPTS * SAMPLES, learning_rate=RATE, schedule="constant_with_warmup", save_every=10,
            seed=seed,
        ),
    )  # fmt: skip
    done = train(config, model, tokenizer, lambda said: print(f"{arm}, seed {seed}: {said}", flush=True))
    return model.eval(), tokenizer, done.steps


@torch.no_grad()
def asked(model: Any, tokenizer: Any, cache: str) -> list[tuple[float, float]]:
    """Of each held-out question the score of the most likely reply, and the mean of the drawn ones."""
    task = tasks.get(TASK)
    items = [encode(tokenizer, task.generate(tokenizer, LENGTH, HELD_OUT + i, **OPTIONS)) for i in range(CONTEXTS)]
    pairs = [(item.context + one.prompt, one) for item in items for one in item.asked]
    given = {"max_new_tokens": REPLY, "pad_token_id": 0, "eos_token_id": model.generation_config.eos_token_id}
    greedy = GenerationConfig(do_sample=False, temperature=1.0, **given)
    draw = GenerationConfig(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, **given)
    set_seed(0)
    scores = []
    for config in (greedy, *[draw] * DRAWS):
        holds = METHOD.cache(model, trained=True) if cache == "compressed" else Cache(model, "full")
        replies = roll(model, holds, [ids for ids, _ in pairs], config).replies
        assert holds.report().compressed == (cache == "compressed")
        scores.append([
            grade(tokenizer, one.question, one.answer, reply).value
            for (_, one), reply in zip(pairs, replies, strict=True)
        ])  # fmt: skip
    return [(first, sum(rest) / len(rest)) for first, *rest in zip(*scores, strict=True)]


def rows(arm: str, seed: int, work: Path) -> Iterator[Replied]:
    """A row for each held-out question and cache."""
    import trl

    model, tokenizer, steps = trained(arm, seed, work)
    made = MadeWith.of(model, "embedded")
    for cache in ("compressed", "full"):
        for i, (greedy, drawn) in enumerate(asked(model, tokenizer, cache)):
            yield Replied(
                arm=arm, seed=seed, cache=cache, item=i, greedy=greedy, drawn=drawn, steps=steps, trl=trl.__version__,
                made_with=made,
            )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    given = parser.parse_args()
    torch.set_num_threads(1)
    given.out.mkdir(parents=True, exist_ok=True)
    ledger = Ledger(given.out / "rows.jsonl", Replied)
    done = {(row.arm, row.seed) for row in ledger.rows()}
    for arm, seed in [("none", 0), *((arm, seed) for seed in SEEDS for arm in ("RL-sparse", "RL-full"))]:
        if (arm, seed) not in done:
            ledger.append(rows(arm, seed, given.work))
            print(f"{arm}, seed {seed}: done", flush=True)


if __name__ == "__main__":
    main()
