"""What is left of a real model's replies when its cache is compressed, on tasks that no method was tuned on.

    python -m benchmarks.real_models.run --model NAME=FOLDER [--calibration FILE …] [--contexts 3] [--zoo]

Facts and codes in prose, in five languages, defaults in code, sentences that are quoted. A context is read, compressed
to a share of the bytes of a plain cache in bfloat16 before any question is known, and asked six questions, each on a
copy. The reference is the full cache's own greedy reply, fed token by token: a row says how far the next tokens are
from the full cache's, and how many replies stay the same. Every arm keeps the same first and last tokens; ``oracle``
knows the questions and their replies. ``--sight`` has each question read behind the text before it is compressed.
``--calibration`` is what ``keepkv calibrate`` wrote for the model; arms that need one are left out without. ``--zoo``
runs the other methods too. A run that is repeated goes on.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.defaults.run import answered, forced, references, unchanged
from keepkv.cli.arguments import variant
from keepkv.core.calibration import Calibration, needed
from keepkv.core.when import When
from keepkv.engine.passes.rehearse import rehearse
from keepkv.evaluation.setup import FULL, Setup, Variant
from keepkv.evaluation.unit import look_again, make_cache
from keepkv.measure.environment import MadeWith
from keepkv.measure.ledger import Ledger
from keepkv.measure.rows import INLINE, Row
from keepkv.methods.base import make_method, own_options
from keepkv.metrics import kl
from keepkv.tasks.asking import Encoded, Ids, compressed, encode, pad, read

from .float32 import multiply_in_float32
from .items import TASKS, TEXTS, make
from .oracle import ORACLE

BUDGETS = (0.1, 0.25, 0.5)
LENGTH = 800
CODED = ":codec=hadamard"
ARMS = (
    "auto", "keepkv3", "kvzip", "auto" + CODED, "keepkv3" + CODED, "keydiff", "keepkv2", "snapkv", "random",
    "kvzip" + CODED, "compactor", "streaming-llm", ORACLE, ORACLE + CODED,
)  # fmt: skip
QUICK = ("auto", "keepkv3", "kvzip", "auto" + CODED, "keydiff", "snapkv", "random")
# The other methods that read a text once or twice, as they come; those made for long replies have a study of their own.
ZOO = (
    "kvzip:allocate=pooled", "kvzip:plus=true,allocate=pooled", "kvgrad", "kvcompose", "kvzap", "fast-kvzip",
    "fast-kvzip" + CODED, "adakv", "dropkv",
    "critical-adakv", "criticalkv", "rest-kv", "cap", "expected-attention", "h2o", "tova", "protected-lru", "finch",
    "chunkkv", "pyramidkv", "simlayerkv", "lagkv", "curdkv", "leverage-score", "non-causal-attention", "q-filter",
    "knorm", "headkv", "surface-logic-kv", "duo-attention:profile=found", "keepkv", "zeromerge", "weightedkv",
    "kvmerger", "look-m", "d2o", "cam", "grkv", "reskv", "attention-matching",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Kept(Row):
    """What one arm at one budget keeps of the full cache's replies about one context.

    budget: share of the bytes of a plain cache in bfloat16, in the layers that are compressed. ratio: of the bytes of
    all layers that is held. kl: of each question, the mean over the tokens of the full cache's reply of KL(full cache ‖
    this one), in nats. same: whether this cache gives the same reply. known: whether the full cache's has the answer.
    sight: whether each question was read, all but its last token, before its context was compressed.
    """

    task: str
    context: int
    tokens: int
    arm: str
    budget: float
    ratio: float
    kl: list[float]
    same: list[bool]
    known: list[bool]
    sight: bool = False
    made_with: MadeWith = field(metadata=INLINE)


def measure(
    model: Any, tokenizer: Any, item: Encoded, arms: dict[str, Variant], budgets: tuple[float, ...], *,
    sight: bool = False, **facts: Any,
) -> Iterator[Kept]:  # fmt: skip
    """A row for each arm and budget."""
    setup = Setup("", ("notes",), (), (1.0,))
    reader = make_cache(model, setup, FULL, 1.0, 0, When("deferred"))
    mask = read(model, reader, [item.context])
    reader.compressing = False
    said: list[Ids] = references(model, reader, mask, item, tokenizer.eos_token_id)
    truth = forced(model, reader, mask, item, said)
    known = answered(tokenizer, item, said)
    seen = item.in_sight() if sight else [item]
    texts, asked = [one.context for one in seen], replace(item, asked=tuple(one for x in seen for one in x.asked))
    for name, one in arms.items():
        cache = make_cache(model, setup, one, 1.0, 0, When("deferred"))
        mask = read(model, cache, texts)
        if one.method == ORACLE:
            questions = [question.prompt + reply[:-1] for question, reply in zip(item.asked, said, strict=True)]
            rehearse(model, cache, *pad(texts, model.device), questions=questions, pieces=0)
        else:
            look_again(model, cache, texts)
        for budget in budgets:
            small = compressed(cache, f"{100 * budget:g}%bytes")
            found = forced(model, small, mask, asked, said)
            same = unchanged(found, said)
            far = [float(kl(a.float(), b.float()).mean()) for a, b in zip(truth, found, strict=True)]
            yield Kept(
                tokens=len(item.context), arm=name, budget=budget, ratio=small.report().ratio, kl=far, same=same,
                known=known, sight=sight, **facts,
            )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="NAME=FOLDER")
    parser.add_argument("--calibration", action="append", default=[], help="a file of keepkv calibrate; repeatable")
    parser.add_argument("--sight", action="store_true", help="questions are read before the text is compressed")
    parser.add_argument("--questions", type=int, default=6, help="of a context")
    parser.add_argument("--zoo", action="store_true", help="every method that reads a text once or twice")
    parser.add_argument("--quick", action="store_true", help="a few arms, one context a task, a quarter of the bytes")
    parser.add_argument("--arm", action="append", help="repeatable; all of the study if absent")
    parser.add_argument("--task", action="append", choices=TASKS, help="repeatable; all if absent")
    parser.add_argument("--budget", action="append", type=float, help="share of the bytes; repeatable")
    parser.add_argument("--first", type=int, default=0, help="number of the first context")
    parser.add_argument("--contexts", type=int, default=3)
    parser.add_argument("--length", type=int, default=LENGTH, help="tokens of a context")
    parser.add_argument("--texts", type=Path, default=TEXTS, help="folder of texts in other languages")
    parser.add_argument("--float32-products", action="store_true", help="for a processor that is slow in bfloat16")
    parser.add_argument("--out", type=Path, help="results/, or results/sight/ beside this file if absent")
    given = parser.parse_args()
    if given.quick:
        given.contexts, given.arm, given.budget = 1, given.arm or QUICK, given.budget or [0.25]
    out = given.out or Path(__file__).parent / "results" / ("sight" if given.sight else "")
    name, _, path = given.model.partition("=")
    files = {Calibration.load(file).kind: file for file in given.calibration}
    arms = {}
    for arm in given.arm or (*ARMS, *(ZOO if given.zoo else ())):
        one = variant(arm)
        if one.method == ORACLE and given.sight:
            continue  # every arm may know the questions
        method = make_method(one.method, own_options(one.options))
        kinds = needed(method.score, method.allocate)
        if kinds.keys() <= files.keys():
            own = {"calibration": [files[kind] for kind in kinds]} if kinds else {}
            arms[arm] = replace(one, options={**one.options, **own})
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
    if given.float32_products:
        multiply_in_float32(model)
    tokenizer = AutoTokenizer.from_pretrained(path)
    out.mkdir(parents=True, exist_ok=True)
    ledger, made_with = Ledger(out / f"{name}.jsonl", Kept), MadeWith.of(model, name)
    done = {(row.task, row.context, row.arm) for row in ledger.rows()}
    with torch.inference_mode():
        for context, task in product(range(given.first, given.first + given.contexts), given.task or TASKS):
            left = {arm: one for arm, one in arms.items() if (task, context, arm) not in done}
            if left:
                item = encode(tokenizer, make(task, tokenizer, context, given.length, given.texts))
                budgets = tuple(given.budget or BUDGETS)
                item = replace(item, asked=item.asked[: given.questions])
                facts = {"task": task, "context": context, "made_with": made_with}
                ledger.append(measure(model, tokenizer, item, left, budgets, sight=given.sight, **facts))
            print(name, context, task, len(left), "arms", flush=True)


if __name__ == "__main__":
    main()
