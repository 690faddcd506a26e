"""Which method to take when none is named: what each keeps of the full cache's replies, on models nobody tuned it on.

    python -m benchmarks.defaults.run --model NAME=PATH [--model …] --contexts 8 --out benchmarks/defaults/results

Everyday facts stand in real prose (task ``notes``). A context is read, compressed to a share of the bytes of a plain
cache before any question is known, and asked ten questions, each on a copy; with ``--aware`` three questions are each
read with the context before it is compressed, but for their last token. The reference is the full cache's own
greedy reply: a row says how much of it is kept. Every method keeps the same first and last tokens. Models take turns,
context by context, so that a run that is stopped is balanced; a run that is repeated goes on.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from keepkv import tasks
from keepkv.cli.arguments import variant
from keepkv.core.when import When
from keepkv.evaluation.setup import FULL, HELD_OUT, Setup, Variant
from keepkv.evaluation.unit import look_again, make_cache
from keepkv.measure.environment import MadeWith
from keepkv.measure.ledger import Ledger
from keepkv.measure.rows import INLINE, Row
from keepkv.metrics import kl
from keepkv.tasks.asking import Encoded, Ids, compressed, encode, pad, read, reply, rows_of, step

METHODS = (
    "random", "streaming-llm", "snapkv", "expected-attention", "adakv", "keydiff", "adakv:score=keydiff", "compactor",
    "compactor:allocate=adakv", "keepkv", "keepkv2", "keepkv2:allocate=uniform", "kvzip",
)  # fmt: skip
BUDGETS = (0.1, 0.2, 0.4)
LENGTH, WORDS = 800, 12  # tokens of a context, and of a reply


@dataclass(frozen=True, kw_only=True)
class Kept(Row):
    """What one method at one budget keeps of the full cache's replies about one context.

    aware: whether the question was read before the compression. budget: share of the bytes of a plain cache, in the
    layers that are compressed. ratio: of the bytes of all layers that is held. kl: of each question, the mean over the
    tokens of the full cache's reply of KL(full cache ‖ this one), in nats. same: whether this cache gives the same
    reply. known: whether the full cache's reply has the answer.
    """

    context: int
    aware: bool = False
    tokens: int
    method: str
    budget: float
    ratio: float
    kl: list[float]
    same: list[bool]
    known: list[bool]
    made_with: MadeWith = field(metadata=INLINE)


def references(model: Any, cache: Any, mask: torch.Tensor, item: Encoded, end: int | None) -> list[Ids]:
    """The full cache's reply to each question of ``item``: ``WORDS`` tokens at most, its end included."""
    twin, own = rows_of(cache, mask, [0] * len(item.asked))
    said = reply(model, twin, own, [one.prompt for one in item.asked], WORDS, end)[0].tolist()
    return [tokens[: tokens.index(end) + 1] if end in tokens else tokens for tokens in said]


def forced(model: Any, cache: Any, mask: torch.Tensor, item: Encoded, replies: list[Ids]) -> list[torch.Tensor]:
    """Logits (tokens,V) of each reply's tokens, given those before."""
    twin, own = rows_of(cache, mask, range(len(replies)) if len(mask) > 1 else [0] * len(replies))
    ids, new = pad([one.prompt + said[:-1] for one, said in zip(item.asked, replies, strict=True)], model.device)
    logits = step(model, twin, ids, torch.cat((own, new), dim=1), keep=max(map(len, replies)))
    return [row[len(row) - len(said) :] for row, said in zip(logits, replies, strict=True)]


def answered(tokenizer: Any, item: Encoded, said: list[Ids]) -> list[bool]:
    """Of each question, whether the reply ``said`` has one of its values, or the answer where it has none."""
    text = [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in said]
    wanted = [one.question.values or (one.question.answer.strip(),) for one in item.asked]
    return [any(value in words for value in values) for values, words in zip(wanted, text, strict=True)]


def unchanged(logits: list[torch.Tensor], said: list[Ids]) -> list[bool]:
    """Of each reply ``said``, whether greedy decoding would give it: ``logits`` (tokens,V) are those of its tokens."""
    return [bool((x.argmax(-1).cpu() == torch.tensor(words)).all()) for x, words in zip(logits, said, strict=True)]


def measure(
    model: Any, tokenizer: Any, item: Encoded, methods: list[Variant], aware: bool, **facts: Any
) -> Iterator[Kept]:
    """A row for each method and budget."""
    setup = Setup("", ("notes",), (), (1.0,))
    reader = make_cache(model, setup, FULL, 1.0, 0, When("deferred"))
    mask = read(model, reader, [item.context])
    reader.compressing = False
    said = references(model, reader, mask, item, tokenizer.eos_token_id)
    truth = forced(model, reader, mask, item, said)
    known = answered(tokenizer, item, said)
    rows, rest = [item.context], item
    if aware:
        rows = [item.context + one.prompt[:-1] for one in item.asked]
        rest = replace(item, asked=tuple(replace(one, prompt=one.prompt[-1:]) for one in item.asked))
    for one in methods:
        cache = make_cache(model, setup, one, 1.0, 0, When("deferred"))
        mask = read(model, cache, rows)
        look_again(model, cache, rows)
        for budget in BUDGETS:
            small = compressed(cache, f"{100 * budget:g}%bytes")
            found = forced(model, small, mask, rest, said)
            same = unchanged(found, said)
            yield Kept(
                aware=aware, tokens=len(item.context), method=one.label, budget=budget, ratio=small.report().ratio,
                kl=[float(kl(a, b).mean()) for a, b in zip(truth, found, strict=True)], same=same, known=known, **facts,
            )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", required=True, help="NAME=PATH; repeatable")
    parser.add_argument("--method", action="append", help="repeatable; all of the study if absent")
    parser.add_argument("--first", type=int, default=0, help="number of the first context")
    parser.add_argument("--contexts", type=int, default=8)
    parser.add_argument("--aware", action="store_true", help="read each question before compressing")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    given = parser.parse_args()
    methods = [variant(text) for text in given.method or METHODS]
    loaded = {}
    for text in given.model:
        name, _, path = text.partition("=")
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        loaded[name] = (model, AutoTokenizer.from_pretrained(path))
    given.out.mkdir(parents=True, exist_ok=True)
    ledger = Ledger(given.out / "rows.jsonl", Kept)
    done = {(row.made_with.model, row.context, row.method) for row in ledger.rows() if row.aware == given.aware}
    with torch.inference_mode():
        for context in range(given.first, given.first + given.contexts):
            for name, (model, tokenizer) in loaded.items():
                left = [one for one in methods if (name, context, one.label) not in done]
                made = tasks.get("notes").generate(
                    tokenizer, LENGTH, HELD_OUT + context, plain=True, alike=1, questions=3 if given.aware else 10
                )
                item, with_ = encode(tokenizer, made), MadeWith.of(model, name)
                if left:
                    ledger.append(measure(model, tokenizer, item, left, given.aware, context=context, made_with=with_))
                print(name, context, len(left), "methods", flush=True)


if __name__ == "__main__":
    main()
