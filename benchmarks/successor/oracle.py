"""How small the output error could be: choices of slots, and refits, that know the queries of the questions to come.

    python benchmarks/successor/oracle.py --models embedded=embedded seed-1=PATH ... [--items 2] [--out DIRECTORY]
    python benchmarks/successor/oracle.py --tables [--out DIRECTORY]         # the page again, of what was measured

Writes ``oracle.json`` and ``oracle.md`` to ``--out``; models that stand there already and are not named stay. Items,
questions, bytes, protected tokens and errors are those of ``fidelity.py``, contexts one at a time. Of each context:

    oracle mass     slots by their mean attention from all query tokens that errors are then measured at: equal budgets
                    for heads, or one for all (pooled)
    oracle effect   by mean (a/(1−a))²‖v−o‖²/‖o‖², what the layer's output changes by if the slot alone goes
    oracle search   one budget; slots go a few at a time, those that add least to the error as it then stands, and
                    are exchanged for others while that lowers the error itself
    … refit         its slots, or those of ``keepkv2``, with biases and then values by ridge regression on these queries
    half …          the same with half of the questions known and the error measured at the other half, both ways round
    same task …     known are questions of the task about other texts, asked of this one
    other tasks …   known are questions of tasks that ask for something else, about other texts, asked of this one
    text again …    known are pieces of the text itself, read behind it
    keepkv2 and …   what ``keepkv2`` would keep at half the budget, and the rest by effect, pooled
    … int8          rounded as the int8 store rounds, more slots at equal bytes, of a cache in float32 or bfloat16
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from choosing import Asking, asking, by_effect, by_mass, refit, search, top
from fidelity import QUESTIONS, Reference, compare, measure, reference
from imposing import choice_of, impose, packed
from oracle_page import VALUES, page
from plan import FEW, OURS, SOME
from run import loaded
from torch import Tensor

from keepkv.cli.arguments import variant
from keepkv.engine.cache import Cache
from keepkv.engine.state import slot_bytes
from keepkv.evaluation.asking import Asked, Encoded, read
from keepkv.evaluation.setup import FULL, Setup, Unit
from keepkv.evaluation.unit import build
from keepkv.measure import environment

RUN = (
    OURS, "kvzip", "random", "keepkv2:merge=0.8", "keepkv2:merge=0.7", "keepkv2:merge=0.6", "keepkv2:merge=0.5",
    "keepkv2:merge=0.0", "keepkv2:floor=1.0", "keepkv2:floor=1.0,merge=0.5",
)  # fmt: skip
PACKED = (OURS, "keepkv2:merge=0.8", "kvzip")
SINKS, WINDOW, LENGTH = 4, 16, 1024
SEARCHED, RIDGE = {"oracle": 1e-4, "half": 0.3}, 0.3  # ridges of refits, of the mean square of a slot's column
KINDS = (("niah-multikey-1", "niah", "shared", "secret"), ("qa-1", "qa"), ("variable-tracking",), ("common-words",))
SEED, STRANGERS = 7000, 8  # first item that others' questions are taken from, and how many of them
PIECES, PIECE = 8, 64  # of the text read again, and their tokens
Record = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["embedded=embedded"], metavar="NAME=PATH")
    parser.add_argument("--items", type=int, default=2, help="contexts of a task and model")
    parser.add_argument("--tasks", nargs="*", default=SOME)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--tables", action="store_true", help="only write the page again")
    a = parser.parse_args()
    a.out.mkdir(parents=True, exist_ok=True)
    path = a.out / "oracle.json"
    held = json.loads(path.read_text()) if path.exists() else {"draws": {}, "cells": {}}
    for text in a.models if not a.tables else ():
        name, _, where = text.partition("=")
        draw = held["draws"].setdefault(name, len(held["draws"]))
        held["versions"], held["cells"][name] = environment.versions(), run(where or name, name, draw, a)
        path.write_text(json.dumps(held, separators=(",", ":")) + "\n")
    (a.out / "oracle.md").write_text(page(held))


@torch.inference_mode()
def run(path: str, name: str, draw: int, a: argparse.Namespace) -> Record:
    """By task, method and budget: for each seed its ``VALUES``."""
    model, tokenizer = loaded(path)
    setup = Setup(
        model=name, tasks=tuple(a.tasks), variants=(), budgets=FEW, lengths=(LENGTH,), items=a.items, batch=1,
        seeds=(draw,), sinks=SINKS, window=WINDOW,
    )  # fmt: skip
    found: Record = {}
    others = {task: foreign(tokenizer, setup, task) for task in {*a.tasks, *(kind[0] for kind in KINDS)}}
    for unit in setup.units():
        if unit.variant == FULL:
            began, [item] = time.monotonic(), build(tokenizer, setup, unit)
            cells = found.setdefault(unit.task, {})
            for row in context(model, setup, replace(unit, budgets=FEW), item, others):
                values = [float(f"{row[value]:.5g}") for value in VALUES]
                cells.setdefault(row["method"], {}).setdefault(str(row["budget"]), {})[unit.items[0]] = values
            print(f"{name}, {unit.task}, {unit.items[0]}: {time.monotonic() - began:.1f} s", flush=True)
    return found


def context(model: Any, setup: Setup, unit: Unit, item: Encoded, others: dict[str, list[Asked]]) -> Iterator[Record]:
    """Everything on one context. others: questions about other texts, by task."""
    questions = [one for one in item.asked[:QUESTIONS] if one.prompt and one.answer and not one.question.probe]
    full, *halves = (
        reference(model, setup, unit, [replace(item, asked=tuple(asked))])[1]
        for asked in (questions, questions[::2], questions[1::2])
        if asked
    )
    for label in RUN:
        yield from measure(model, setup, replace(unit, variant=variant(label)), [item], full)
    for label in PACKED:
        yield from packed(model, setup, replace(unit, variant=variant(label)), item, full)
    cache = Cache(model, "full", store="flat")
    mask = read(model, cache, [item.context])
    ours = choice_of(model, setup, replace(unit, variant=variant(OURS)), item)
    known = {"oracle": full} | strangers(model, setup, unit, item, others)
    for who, one in known.items():
        for label, budget, twin in imposed(cache, asking(cache, one), who, ours):
            yield from told(label, budget, compare(model, twin, mask, 1, full, twin.report().ratio))
    if len(halves) == 2:
        both: dict[tuple[str, float], list[Record]] = defaultdict(list)
        for knows, asked in (halves, halves[::-1]):
            for label, budget, twin in imposed(cache, asking(cache, knows), "half", ours):
                both[label, budget] += compare(model, twin, mask, 1, asked, twin.report().ratio)
        weights = [{"answer_kl": float(half.said.sum())} for half in halves[::-1]]
        every = [float(half.new.sum()) for half in halves[::-1]]
        for (label, budget), rows in both.items():
            parts = {v: [w.get(v, n) for w, n in zip(weights, every, strict=True)] for v in VALUES}
            joined = {v: sum(r[v] * w for r, w in zip(rows, parts[v], strict=True)) / sum(parts[v]) for v in VALUES}
            yield from told(label, budget, [joined])


def told(label: str, budget: float, rows: Sequence[Record]) -> list[Record]:
    """``rows`` with whose they are."""
    return [{"method": label, "budget": budget} | row for row in rows]


def foreign(tokenizer: Any, setup: Setup, name: str) -> list[Asked]:
    """Questions of the task ``name`` about texts that nothing is measured on."""
    unit = Unit(name, LENGTH, "agnostic", FULL, FEW, tuple(range(SEED, SEED + STRANGERS)), 0, False)
    items = build(tokenizer, setup, unit)
    return [one for depth in range(QUESTIONS) for item in items for one in item.asked[depth : depth + 1]][:STRANGERS]


def strangers(
    model: Any, setup: Setup, unit: Unit, item: Encoded, others: dict[str, list[Asked]]
) -> dict[str, Reference]:
    """What else may be asked of the context, by where it comes from. others: questions by task."""
    text, blank = item.context, item.asked[0]
    starts = [int(i * (len(text) - PIECE) / (PIECES - 1)) for i in range(PIECES)]
    pieces = [text[start : start + PIECE] for start in starts]
    other = [others[kind[0]][: STRANGERS // 2] for kind in KINDS if not unit.task.startswith(kind)]
    asked = {
        "same task": others[unit.task],
        "other tasks": [one for some in other for one in some],
        "text again": [replace(blank, prompt=piece[:-1], answer=piece[-1:]) for piece in pieces],
    }
    found = {}
    for who, some in asked.items():
        rows = [some[i : i + QUESTIONS] for i in range(0, len(some), QUESTIONS)]
        found[who] = reference(model, setup, unit, [replace(item, asked=tuple(row)) for row in rows])[1]
    return found


def imposed(cache: Cache, ask: Asking, who: str, ours: dict[float, Tensor]) -> Iterator[tuple[str, float, Cache]]:
    """``cache`` with what ``ask`` chooses of it, by name and budget."""
    held = torch.zeros_like(next(iter(ours.values())))
    held[..., :SINKS] = held[..., -WINDOW:] = True
    first: Any = cache.layers[0]
    content, extra = slot_bytes(first)
    sizes = {budget: int(held.shape[-1] * budget * content / (content + extra) + 1e-9) for budget in FEW}
    scores, shared = {"mass": by_mass(ask), "effect": by_effect(ask)}, f"{OURS} and {who}"
    searched = search(ask, held, list(sizes.values())) if who in SEARCHED else {}
    for budget, slots in sizes.items():
        kept = {f"{who} {name}, pooled": top(score, held, slots, True) for name, score in scores.items()}
        if who == "oracle":
            kept |= {f"{who} {name}": top(score, held, slots, False) for name, score in scores.items()}
        kept[shared] = top(scores["effect"], held | ours[budget / 2], slots, True)
        kept |= {f"{who} search": searched[slots]} if searched else {}
        for label, mask in kept.items():
            yield label, budget, impose(cache, mask.double())
        kept[f"{OURS}, {who}"] = ours[budget]
        for start in (f"{OURS}, {who}", shared, f"{who} search" if searched else f"{who} effect, pooled"):
            yield f"{start} refit", budget, impose(cache, *refit(ask, kept[start], SEARCHED.get(who, RIDGE)))


if __name__ == "__main__":
    main()
