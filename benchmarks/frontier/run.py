"""Bytes against error: eviction alone, codes alone, and both, at equal bytes of a plain cache in bfloat16.

    python -m benchmarks.frontier.run --model embedded=EMBEDDED --model SmolLM2-135M-Instruct=PATH --contexts 4

A context is read, compressed before any question is known, and asked questions, each on a copy. The reference of a
question is the full cache's greedy reply until it has given the answer, where it does, else the answer itself. Its
tokens are fed to the compressed cache: a question is right where each is the likeliest, so where greedy decoding would
give the same. Every arm keeps the same first and last tokens. Models take turns, context by context; a run that is
repeated goes on.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.defaults.run import references
from keepkv import tasks
from keepkv.cli.arguments import variant
from keepkv.core.when import When
from keepkv.embedded import embedded_model
from keepkv.evaluation.fidelity.replay import Call, record, replay
from keepkv.evaluation.setup import FULL, HELD_OUT, Setup, Variant
from keepkv.evaluation.unit import look_again, make_cache
from keepkv.measure.environment import MadeWith
from keepkv.measure.ledger import Ledger
from keepkv.measure.rows import INLINE, Row
from keepkv.methods.base import make_method
from keepkv.metrics import kl, relative_error
from keepkv.tasks.asking import Encoded, Ids, compressed, encode, pad, read, rows_of, step

BUDGETS = (0.1, 0.05, 0.15, 0.25, 0.02)  # of the bytes of a plain cache, the most telling first
EVICTION = ("keepkv2", "auto", "snapkv", "streaming-llm", "random")
CODES = ("hadamard", "int4", "lloyd-max", "kivi,codec.bits=4", "int8", "lloyd-max,codec.bits=2", "kivi", "int2")
BOTH = (
    "keepkv2:codec=hadamard", "auto:codec=hadamard", "auto:codec=lloyd-max", "auto:codec=int8", "auto:codec=int4",
    "auto:codec=lloyd-max,codec.bits=2", "auto:codec=kivi,codec.bits=4", "auto:codec=lloyd-max,codec.value_bits=2",
    "auto:codec=hadamard,codec.key_bits=8", "auto:codec=kivi", "auto:codec=int2", "keepkv2:codec=int8",
    "auto:codec=lloyd-max,codec.key_bits=2",
)  # fmt: skip
CODED = tuple(f"full:codec={codec}" for codec in CODES)
# By order of what they tell, so that a run that is stopped has the most of it.
ARMS = (*EVICTION[:2], *BOTH[:4], *CODED[:1], *EVICTION[2:], *BOTH[4:], *CODED[1:])
NOTES = ("notes",)
SUITE = ("niah-multikey-1", "niah-multikey-2", "niah-multivalue", "variable-tracking", "qa-1", "common-words")


@dataclass(frozen=True, kw_only=True)
class Point(Row):
    """One arm at one budget on one context.

    budget: share of the bytes of a plain cache that was asked for; None where codes alone decide it. ratio: share of
    them that is held, of all layers, measured. slots: share of the tokens of compressed layers that are kept. right,
    known: of each question, whether this cache and the full cache answer it. output_error: ‖o′−o‖/‖o‖ of a layer's
    attention at the full run's queries over questions and replies, mean over them and over layers. kl: KL(full cache
    ‖ this one) of the next token over the replies, in nats, of each question. seconds: what the row took. prefill: when
    the context is compressed: "deferred", when most of it is codes already, or "immediate", before any is.
    """

    task: str
    context: int
    tokens: int
    arm: str
    budget: float | None
    ratio: float
    slots: float
    right: list[bool]
    known: list[bool]
    output_error: float
    kl: list[float]
    seconds: float
    made_with: MadeWith = field(metadata=INLINE)
    prefill: str = "deferred"


@dataclass(frozen=True)
class Asked:
    """The full cache's run over all questions: tokens fed and which are any (Q,T), logits (Q,T,V), attention."""

    replies: list[Ids]
    known: list[bool]
    ids: torch.Tensor
    new: torch.Tensor
    logits: torch.Tensor
    calls: list[Call]

    @classmethod
    def of(cls, model: Any, tokenizer: Any, setup: Setup, item: Encoded) -> Asked:
        """From the questions of ``item``."""
        cache = make_cache(model, setup, FULL, 1.0, 0, When("deferred"))
        mask = read(model, cache, [item.context])
        cache.compressing = False
        said = references(model, cache, mask, item, tokenizer.eos_token_id)
        wanted = [one.question.values or (one.question.answer.strip(),) for one in item.asked]
        cut = [until(tokenizer, ids, values) for ids, values in zip(said, wanted, strict=True)]
        known = [x is not None for x in cut]
        replies = [x or one.answer for x, one in zip(cut, item.asked, strict=True)]
        ids, new = pad([one.prompt + x[:-1] for one, x in zip(item.asked, replies, strict=True)], model.device)
        twin, own = rows_of(cache, mask, [0] * len(replies))
        calls = record(twin)
        logits = step(model, twin, ids, torch.cat((own, new), dim=1), keep=ids.shape[1])
        return cls(replies, known, ids, new.bool(), logits, calls)

    def measured(self, model: Any, cache: Any, mask: torch.Tensor) -> dict[str, Any]:
        """What ``cache``, which compresses no more, makes of it."""
        cache = cache.copy(method=make_method(FULL.method, {}))  # a score that watches would want hidden states too
        twin, own = rows_of(cache, mask, [0] * len(self.replies))
        layers = defaultdict(list)
        for call, output in zip(self.calls, replay(twin, self.calls), strict=True):
            error = relative_error(call.output.flatten(2).float(), output.flatten(2).float())
            layers[call.index].append(float(error[self.new].mean()))
        errors = [sum(x) / len(x) for x in layers.values()]
        new = self.new.to(own.dtype)
        logits = step(model, twin, self.ids, torch.cat((own, new), dim=1), keep=self.ids.shape[1])
        right, apart = [], []
        for row, reply in enumerate(self.replies):
            mine, full = (x[row, -len(reply) :].float() for x in (logits, self.logits))
            right.append(bool((mine.argmax(-1).cpu() == torch.tensor(reply)).all()))
            apart.append(float(kl(full, mine).mean()))
        return {"right": right, "kl": apart, "output_error": sum(errors) / max(1, len(errors))}


def until(tokenizer: Any, reply: Ids, values: tuple[str, ...]) -> Ids | None:
    """``reply`` up to where all ``values`` were said; None where they are not."""
    for end in range(1, len(reply) + 1):
        text = tokenizer.decode(reply[:end], skip_special_tokens=True)
        if all(value in text for value in values):
            return reply[:end]
    return None


def points(
    model: Any,
    tokenizer: Any,
    setup: Setup,
    item: Encoded,
    arms: list[Variant],
    budgets: list[float],
    prefill: str,
    **facts: Any,
) -> Iterator[Row]:
    """A row for each arm and budget; codes alone have one."""
    full = Asked.of(model, tokenizer, setup, item)
    for one in arms:
        cache = make_cache(model, setup, one, 1.0, facts["context"], When("deferred"))
        mask = read(model, cache, [item.context])
        look_again(model, cache, [item.context])
        for budget in budgets if one.method != "full" else (None,):
            began = time.perf_counter()
            share = 1.0 if budget is None else f"{100 * budget:g}%bytes"
            if prefill == "immediate":
                small = make_cache(model, setup, one, share, facts["context"], When(prefill))
                read(model, small, [item.context])
                small.compressing = False
            else:
                small = compressed(cache, share)
            receipt = small.report()
            heads = [slots for layer in receipt.kept.values() for row in layer for slots in row]
            found = full.measured(model, small, mask)
            yield Point(
                tokens=len(item.context), arm=one.label, budget=budget, ratio=receipt.ratio, known=full.known,
                slots=sum(heads) / len(heads) / receipt.seen[0], seconds=time.perf_counter() - began, prefill=prefill,
                **found, **facts,
            )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", required=True, help="NAME=PATH; repeatable")
    parser.add_argument("--arm", action="append", help="repeatable; all of the study if absent")
    parser.add_argument("--budget", action="append", type=float, help="share of the bytes; repeatable; all if absent")
    parser.add_argument("--tokens", type=int, default=1024, help="of a context")
    parser.add_argument("--questions", type=int, default=8, help="of a context at most")
    parser.add_argument("--first", type=int, default=0, help="number of the first context")
    parser.add_argument("--contexts", type=int, default=4)
    parser.add_argument("--prefill", choices=("deferred", "immediate"), default="deferred")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    given = parser.parse_args()
    arms = [variant(text) for text in given.arm or ARMS]
    loaded = {}
    for text in given.model:
        name, _, path = text.partition("=")
        path = embedded_model() if path == "EMBEDDED" else path
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
        loaded[name] = (model, AutoTokenizer.from_pretrained(path))
    given.out.mkdir(parents=True, exist_ok=True)
    ledger = Ledger(given.out / "rows.jsonl", Point)
    done = {(row.made_with.model, row.task, row.context, row.arm, row.prefill) for row in ledger.rows()}
    budgets = given.budget or list(BUDGETS)
    with torch.inference_mode():
        for context in range(given.first, given.first + given.contexts):
            for name, (model, tokenizer) in loaded.items():
                for task in NOTES if tokenizer.chat_template or "Gemma" in name else SUITE:
                    left = [one for one in arms if (name, task, context, one.label, given.prefill) not in done]
                    plain = task in NOTES
                    more = {"alike": 1, "questions": given.questions} if plain else {}
                    made = tasks.get(task).generate(tokenizer, given.tokens, HELD_OUT + context, plain=plain, **more)
                    item = encode(tokenizer, made)
                    item = Encoded(item.item, item.context, tuple(x for x in item.asked if x.prompt)[: given.questions])
                    facts = {"task": task, "context": context, "made_with": MadeWith.of(model, name)}
                    setup = Setup("", (task,), (), (1.0,))
                    if left:
                        for row in points(model, tokenizer, setup, item, left, budgets, given.prefill, **facts):
                            ledger.append([row])
                    print(name, task, context, len(left), "arms", flush=True)


if __name__ == "__main__":
    main()
