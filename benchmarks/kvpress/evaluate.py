"""kvpress on the items of an evaluation: same prompts, weights, seeds and slots; rows beside keepkv's own.

    keepkv eval --method snapkv --method knorm … --out RUN
    python -m benchmarks.kvpress.evaluate RUN --kvpress-python DIRECTORY/bin/python [--items 5]

Reads RUN/run.json and RUN/items.jsonl and writes RUN/items-kvpress.jsonl and RUN/speed-kvpress.jsonl, which the summary
and ``keepkv report`` join: methods ``kvpress/snapkv`` and so on, each with as many slots per head as keepkv's method of
that name had on the same item. kvpress reads one prompt at a time, so ``--items`` of each task, length and mode are
run. What decodes long is left out: kvpress' slots are then in another order (docs/peers.md).

Then keepkv is run once more with options that mean the same as kvpress', and the two are compared item by item: where
both kept the same slots, replies must be the same too. RUN/agreement-kvpress.json holds the counts.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from keepkv.cli.load import load
from keepkv.core.when import When
from keepkv.evaluation.answers import in_turn, separately
from keepkv.evaluation.rows import ITEMS, RUN, SPEED
from keepkv.evaluation.setup import FULL, Setup, Unit, Variant
from keepkv.evaluation.summary import summarise
from keepkv.evaluation.unit import ROWS, build, make_cache, within
from keepkv.measure.files import read_lines
from keepkv.tasks.asking import Asked, Encoded, read
from keepkv.tasks.scoring import Score, grade

from .outcome import Outcome, kept_lists
from .pairs import MATCHED, Pair
from .reference import Reference

PEER = "kvpress"
NAMES = {
    "snapkv": "snapkv",
    "pyramidkv": "pyramidkv",
    "adakv(snapkv)": "adakv",
    "expected-attention": "expected-attention",
    "h2o (ObservedAttention)": "h2o",
    "tova": "tova",
    "keydiff": "keydiff",
    "knorm": "knorm",
    "streaming-llm": "streaming-llm",
}
PAIRS = {NAMES[pair.name]: pair for pair in MATCHED if pair.name in NAMES}
TIMES = {"prefill_s": "prefill_seconds", "answer_s": "answer_seconds"}
Record = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One prompt under one method: ``ids`` are read and compressed, ``asked`` follow. peer: None: the plain cache."""

    unit: Unit
    item: Encoded
    seed: int
    part: int
    ids: list[int]
    asked: tuple[Asked, ...]
    peer: str | None
    budget: Any
    slots: int

    @property
    def prompt(self) -> str:
        return f"{self.unit.task}/{self.unit.length}/{self.unit.mode}/{self.seed}/{self.part}"

    @property
    def name(self) -> str:
        return f"{self.prompt}/{self.peer}/{self.budget}"


def read_setup(folder: Path) -> Setup:
    """What the evaluation ran."""
    return Setup.from_dict(json.loads((folder / RUN).read_text("utf-8")))


def groups(setup: Setup, count: int) -> Iterator[Unit]:
    """One unit per task, length and mode, of its first ``count`` items."""
    for unit in setup.units():
        if unit.first and unit.variant == FULL and unit.mode != "decode":
            yield replace(unit, items=tuple(range(unit.items[0], unit.items[0] + min(count, setup.items))))


def cases(setup: Setup, unit: Unit, items: list[Encoded], held: dict[Any, Record], peers: list[str]) -> list[Case]:
    """In the order of the prompts. Slots are those of keepkv's method of that name on the item, or of any other at that
    budget."""
    made = []
    for seed, item in zip(unit.items, items, strict=True):
        if unit.mode == "aware":
            rows = [(item.context + one.prompt[:-1], (replace(one, prompt=one.prompt[-1:]),)) for one in item.asked]
        else:
            rows = [(item.context, item.asked)]
        for part, (ids, asked) in enumerate(rows):
            common = (unit, item, seed, part, ids, asked)
            made.append(Case(*common, None, 1.0, len(ids)))
            for budget in setup.budgets:
                key = (unit.task, unit.length, unit.mode, budget, seed)
                for peer in peers:
                    row = held.get((*key, peer)) or held.get((*key, "snapkv"))
                    # With room for every token there is nothing to compare: kvpress then does not run.
                    if row is not None and row["slots"] is not None and int(row["slots"]) < len(ids):
                        made.append(Case(*common, peer, budget, int(row["slots"])))
    return made


def run_peer(reference: Reference, model: str, window: int, made: list[Case]) -> tuple[dict[str, Outcome], Record]:
    """Outcomes by case."""
    files: dict[str, Tensor] = {}
    runs = []
    for case in made:
        files[case.prompt] = torch.tensor([case.ids])
        questions = []
        for i, one in enumerate(case.asked):
            prompt, answer = f"{case.prompt}.{i}", f"{case.prompt}.{i}.answer"
            files[prompt], files[answer] = (torch.tensor([x], dtype=torch.long) for x in (one.prompt, one.answer))
            limit = 0 if one.question.judged else one.limit
            questions.append({"prompt": prompt, "answer": answer, "limit": limit})
        # As kvpress rounds: int(n * (1 - ratio)) slots.
        ratio = 1 - (case.slots + 0.5) / len(case.ids)
        pair = PAIRS[case.peer] if case.peer else None
        run = {"id": case.name, "task": "ask", "prompt": case.prompt, "questions": questions}
        run |= {"conversation": case.item.item.conversation, "press": pair.press(ratio, window) if pair else None}
        runs.append(run | {"attention": "eager" if pair and pair.eager else "sdpa"})
    return reference.run(model, files, runs)


def scores_of(tokenizer: Any, case: Case, outcome: Outcome) -> list[Score]:
    """Graded as keepkv's replies are."""
    return [
        Score(said, False, "") if isinstance(said, float) else grade(tokenizer, one.question, one.answer, said)
        for one, said in zip(case.asked, outcome.facts["replies"], strict=True)
    ]


def rows_of(tokenizer: Any, made: list[Case], found: dict[str, Outcome]) -> tuple[list[Record], list[Record]]:
    """``items-kvpress.jsonl`` and ``speed-kvpress.jsonl``: the parts of an item (its questions, where each was read
    with the prompt) are one row."""
    parts: dict[tuple[Any, ...], list[Case]] = {}
    for case in made:
        parts.setdefault((case.peer or "full", case.budget, case.seed), []).append(case)
    items, speed = [], []
    for (peer, budget, seed), mine in parts.items():
        unit, item = mine[0].unit, mine[0].item
        key = {"task": unit.task, "length": unit.length, "mode": unit.mode}
        key |= {"method": f"{PEER}/{peer}", "budget": budget}
        outcomes = [found[case.name] for case in mine]
        error = next((one.error for one in outcomes if one.error), None)
        row = {**key, "seed": seed, "tokens": None, "score": None, "scores": [], "leaked": [], "replies": []}
        row |= {"ratio": None, "bytes": None, "full_bytes": None, "slots": None}
        row |= {"compressed": False, "tags": item.item.tags, "error": error}
        items.append(row)
        if error:
            continue
        said = [score for case, out in zip(mine, outcomes, strict=True) for score in scores_of(tokenizer, case, out)]
        asked = [one for case in mine for one in case.asked]
        values = [score.value for score, one in zip(said, asked, strict=True) if not one.question.probe]
        total = {name: sum(out.facts[name] for out in outcomes) / len(mine) for name in ("bytes", "full_bytes")}
        row |= {"tokens": len(item.context), "score": sum(values) / len(values), "scores": values}
        row |= {"leaked": [score.leaked for score in said], "replies": [score.reply for score in said], **total}
        row |= {"ratio": total["bytes"] / total["full_bytes"], "compressed": peer != "full"}
        row["slots"] = sum(sum(out.counts) / sum(map(len, out.kept)) for out in outcomes) / len(mine)
        times = {name: sum(out.facts[of] for out in outcomes) for name, of in TIMES.items()}
        times["tokens_read"] = sum(len(case.ids) for case in mine)
        times["tokens_written"] = sum(one.limit for one in asked if not one.question.judged)
        speed.append({**key, "seeds": [seed], **times, "peak_bytes": None})
    return items, speed


@torch.inference_mode()
def compare(model: Any, tokenizer: Any, setup: Setup, case: Case, theirs: Outcome) -> tuple[bool, bool, bool]:
    """Whether keepkv with options that mean the same kept the same slots, says the same, and scores the same."""
    method, options = matched(PAIRS[case.peer], setup.window or 16) if case.peer else ("full", {})
    bare = replace(setup, sinks=None, window=None)
    cache = make_cache(model, bare, Variant(method, options), 1.0, case.unit.draw, When("deferred"))
    mask = read(model, cache, [case.ids])
    twin = within(cache, replace(case.unit, variant=Variant(method, options)), case.slots) if case.peer else cache
    mine = [kept_lists(twin.kept_positions(i)) for i in range(len(twin.layers))]
    same = all(torch.equal(a, b) for x, y in zip(mine, theirs.kept, strict=True) for a, b in zip(x, y, strict=True))
    item = replace(case.item, asked=case.asked)
    answer = in_turn if case.item.item.conversation else separately
    [said] = answer(model, tokenizer, twin, mask, [item], ROWS)
    other = scores_of(tokenizer, case, theirs)
    pairs = list(zip(said, other, strict=True))
    same_scores = all(abs(a.value - b.value) < 1e-4 for a, b in pairs)  # probabilities: to rounding
    return same, same_scores and all(a.reply == b.reply for a, b in pairs), same_scores


def matched(pair: Pair, window: int) -> tuple[str, Record]:
    method = pair.method(window, ())
    assert isinstance(method, str)
    return method, pair.options(window)


def tally(verdicts: dict[str, list[tuple[bool, bool, bool]]]) -> list[Record]:
    """Per method: prompts; with equal kept sets; of these with identical replies, with equal scores; and of all."""
    made = []
    for peer, found in verdicts.items():
        equal = [one for one in found if one[0]]
        counts = {"prompts": len(found), "equal_sets": len(equal)}
        counts |= {"identical_at_equal_sets": sum(x[1] for x in equal), "score_at_equal_sets": sum(x[2] for x in equal)}
        counts |= {"identical": sum(x[1] for x in found), "score": sum(x[2] for x in found)}
        made.append({"method": peer, **counts})
        print(
            f"{peer:20} {len(found):5} prompts, {len(equal):5} with equal kept sets: replies identical in "
            f"{counts['identical_at_equal_sets']}, scores in {counts['score_at_equal_sets']}; of all: "
            f"{counts['identical']}, {counts['score']}"
        )
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="directory that keepkv eval wrote")
    parser.add_argument("--kvpress-python", required=True, help="python of the environment made by make_environment.sh")
    parser.add_argument("--items", type=int, default=5, help="of each task, length and mode")
    parser.add_argument("--method", action="append", choices=sorted(PAIRS), help="repeatable; default: all")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    setup, peers = read_setup(arguments.run), arguments.method or list(PAIRS)
    model, tokenizer = load(None if setup.model == "embedded" else setup.model, "cpu")
    dtype = str(model.dtype).removeprefix("torch.")
    reference = Reference(arguments.kvpress_python, {"threads": arguments.threads, "dtype": dtype}, timeout=24 * 3600)
    key = ("task", "length", "mode", "budget", "seed", "method")
    held = {tuple(row[k] for k in key): row for row in read_lines(arguments.run, ITEMS)}
    rows: list[Record] = []
    speed: list[Record] = []
    verdicts: dict[str, list[tuple[bool, bool, bool]]] = {peer: [] for peer in ["full", *peers]}
    versions: Record = {}
    for unit in groups(setup, arguments.items):
        print(f"{unit.task} {unit.length} {unit.mode}", file=sys.stderr)
        made = cases(setup, unit, build(tokenizer, setup, unit), held, peers)
        found, versions = run_peer(reference, model.name_or_path, setup.window or 16, made)
        new_items, new_speed = rows_of(tokenizer, made, found)
        rows, speed = rows + [row | {"versions": versions} for row in new_items], speed + new_speed
        for case in made:
            if not found[case.name].error:
                outcome = found[case.name]
                verdicts[case.peer or "full"].append(compare(model, tokenizer, setup, case, outcome))
    for name, records in ((ITEMS, rows), (SPEED, speed)):
        path = arguments.run / name.replace(".", f"-{PEER}.")
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in records), encoding="utf-8")
    summary = {"versions": versions, "items": arguments.items, "window": setup.window or 16, "methods": tally(verdicts)}
    (arguments.run / f"agreement-{PEER}.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    summarise(arguments.run)


if __name__ == "__main__":
    main()
