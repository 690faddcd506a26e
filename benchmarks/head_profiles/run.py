"""Does it matter which heads a budget goes to? The measured profile, against the same numbers shuffled, and none.

    python -m benchmarks.head_profiles.run --model NAME=FOLDER --heads HEADS [--contexts 6]

A context is read, behind it a question or none, and compressed to the same number of slots by the same score, attention
of the last 16 queries. The arms share the slots over layers and heads by what ``keepkv calibrate heads`` found, by the
same numbers given to heads at random, evenly, or by the scores themselves (AdaKV), all in the same store. The reference
is the full cache's own greedy reply, fed token by token. A run that is repeated goes on.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.defaults.run import answered, forced, references, unchanged
from benchmarks.real_models.items import make
from keepkv import Calibration, tasks
from keepkv.allocate import AdaKV, Allocate, HeadBudget, Pooled
from keepkv.core.when import When
from keepkv.engine.cache import Cache
from keepkv.evaluation.setup import HELD_OUT
from keepkv.measure.environment import MadeWith
from keepkv.measure.ledger import Ledger
from keepkv.measure.rows import INLINE, Row
from keepkv.methods import Method
from keepkv.metrics import kl
from keepkv.score import SnapKV
from keepkv.tasks.asking import Encoded, compressed, encode, read, rows_of

SHUFFLES, QUESTIONS = 4, 6
BUDGETS = (64, 128)  # slots of a head, on average
LENGTH = 800
TASKS = {"embedded": ("niah-multikey-1", "variable-tracking"), "real": ("notes", "niah-multikey-1")}


@dataclass(frozen=True, kw_only=True)
class Shared(Row):
    """What one way to share a budget keeps of the full cache's replies about one context.

    asked: whether the question was read before the compression. arm: a profile, behind a slash the number of its
    shuffle; "uniform"; "adakv" and "pooled", by the scores. budget: slots of a head, on average. held: of all heads
    together, per row, mean. ratio: of the bytes of a plain cache that is held. kl: of each question, the mean over the
    tokens of the full cache's reply of KL(full cache ‖ this one), in nats. same: whether this cache gives the same
    reply. known: whether the full cache's has the answer.
    """

    task: str
    context: int
    asked: bool
    tokens: int
    arm: str
    budget: int
    held: float
    ratio: float
    kl: list[float]
    same: list[bool]
    known: list[bool]
    made_with: MadeWith = field(metadata=INLINE)


def shuffled(profile: Calibration, seed: int) -> Calibration:
    """The same numbers, each head's all together, given to heads of all layers at random."""
    sizes = [next(iter(held.values())).shape[-1] for held in profile.tensors.values()]
    order = torch.randperm(sum(sizes), generator=torch.Generator().manual_seed(seed))
    made: dict[int, dict[str, torch.Tensor]] = {i: {} for i in profile.tensors}
    for name in next(iter(profile.tensors.values())):
        every = torch.cat([held[name] for held in profile.tensors.values()])[order]
        for i, part in zip(profile.tensors, every.split(sizes), strict=True):
            made[i][name] = part
    return Calibration(profile.kind, made, profile.fingerprint, profile.made_with)


def arms(profile: Calibration) -> Iterator[tuple[str, Allocate, Calibration]]:
    """Name, allocation and profile of each arm. "found" is HeadKV's, "found-1.351" the same numbers by the rule of
    "inf", "uniform" a profile that weighs nothing."""
    shares: dict[str, Allocate] = {
        "inf": HeadBudget("inf"), "copy+compose": HeadBudget("copy+compose"), "uniform": HeadBudget(beta=1e9),
        "found": HeadBudget("found", beta=1.2, eps_layer=0.0, eps_head=0.0), "adakv": AdaKV(), "pooled": Pooled(),
        "found-1.351": HeadBudget("found"),
    }  # fmt: skip
    for arm, share in shares.items():
        yield arm, share, profile
    for seed, arm in product(range(SHUFFLES), ("inf", "found")):
        yield f"{arm}/{seed}", shares[arm], shuffled(profile, seed)


def measure(
    model: Any, tokenizer: Any, item: Encoded, profile: Calibration, asked: bool, done: set[str], **facts: Any
) -> Iterator[Shared]:
    """A row for each budget and each arm that is not ``done``."""
    method = Method(SnapKV(16, 7, "max"), HeadBudget(), when=When("deferred"), window=16)
    cache = Cache(model, method, 1.0, calibration=profile)
    mask = read(model, cache, [item.context])
    full, _ = rows_of(cache, mask, [0])
    said = references(model, full, mask, item, tokenizer.eos_token_id)
    truth = forced(model, full, mask, item, said)
    known, rest = answered(tokenizer, item, said), item
    if asked:
        parts = item.in_sight()
        mask = read(model, cache := Cache(model, method, 1.0, calibration=profile), [one.context for one in parts])
        rest = replace(item, asked=tuple(one.asked[0] for one in parts))
    for arm, share, own in arms(profile):
        if arm in done:
            continue
        twin = cache.copy(method=replace(method, allocate=share))
        twin.shared.settings = replace(twin.shared.settings, calibrations={own.kind: own})  # same text, another profile
        for budget in BUDGETS:
            small = compressed(twin, budget)
            found, receipt = forced(model, small, mask, rest, said), small.report()
            held = sum(n for rows in receipt.kept.values() for heads in rows for n in heads) / len(mask)
            far = [float(kl(a.float(), b.float()).mean()) for a, b in zip(truth, found, strict=True)]
            yield Shared(
                asked=asked, tokens=len(item.context), arm=arm, budget=budget, held=held, ratio=receipt.ratio, kl=far,
                same=unchanged(found, said), known=known, **facts,
            )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="NAME=FOLDER; the model in the package is named embedded")
    parser.add_argument("--heads", required=True, help="the file of keepkv calibrate heads")
    parser.add_argument("--first", type=int, default=0, help="number of the first context")
    parser.add_argument("--contexts", type=int, default=6)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    given = parser.parse_args()
    name, _, path = given.model.partition("=")
    model = AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval()
    tokenizer, profile = AutoTokenizer.from_pretrained(path), Calibration.load(given.heads)
    ledger, made_with = Ledger(given.out / f"{name}.jsonl", Shared), MadeWith.of(model, name)
    done = defaultdict(set)
    for row in ledger.rows():
        done[row.task, row.context, row.asked].add(row.arm)
    own = TASKS.get(name, TASKS["real"])
    with torch.inference_mode():
        for asked, context, task in product((True, False), range(given.first, given.first + given.contexts), own):
            if not {arm for arm, *_ in arms(profile)} - done[task, context, asked]:
                continue
            plain = name != "embedded"
            item = encode(tokenizer, make(task, tokenizer, context, LENGTH) if plain else tasks.get(task).generate(
                tokenizer, LENGTH, HELD_OUT + context
            ))  # fmt: skip
            item = replace(item, asked=item.asked[:QUESTIONS])
            facts = {"task": task, "context": context, "made_with": made_with}
            had = done[task, context, asked]
            ledger.append(list(measure(model, tokenizer, item, profile, asked, had, **facts)))
            print(name, context, task, "asked" if asked else "not asked", flush=True)


if __name__ == "__main__":
    main()
