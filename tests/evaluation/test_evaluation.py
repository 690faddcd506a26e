"""The runner: batches score as items alone do, and budgets are of tokens or bytes, as they say."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from typing import Any

import matrix
import pytest
import torch
from evaluation_setup import setup
from matrix import sampled

import keepkv
from keepkv import tasks
from keepkv.core.when import When
from keepkv.engine.layer import Layer
from keepkv.engine.versions import CACHE
from keepkv.errors import KeepKVError
from keepkv.evaluation.rows import ITEMS, ItemRow, Run, SpeedRow
from keepkv.evaluation.runner import evaluate, total
from keepkv.evaluation.setup import FULL, HELD_OUT, Unit, Variant
from keepkv.evaluation.summary import cells, summarise
from keepkv.evaluation.unit import build, make_cache, run, within
from keepkv.measure import MadeWith, environment
from keepkv.measure.files import read_lines
from keepkv.methods import METHODS, method_info
from keepkv.report import read
from keepkv.tasks.base import Item, Question, Task, TaskError

pytestmark = pytest.mark.filterwarnings("ignore:.* items of each task", "ignore:of .* tokens, a budget of")
EVERY_METHOD = [name for name in METHODS if name != "full"]


def of_method(method: str, model: Any) -> Variant:
    """The method, with the calibration that it needs, if it does."""
    known = matrix.calibration((method, {}), model)
    small = {"prompt": False, "whole": 0}  # or nothing is left to choose
    free = {name: x for name, x in small.items() if name in method_info(method).options}
    return Variant(method, free if known is None else {**free, "calibration": known})


def unit(**changes: Any) -> Unit:
    held = Unit("niah-multikey-1", 256, "agnostic", Variant("keydiff"), (0.25,), (HELD_OUT, HELD_OUT + 1), 0, True)
    return replace(held, **changes)


def alone(model: Any, tokenizer: Any, task: str, seed: int, variant: Variant, budget: float) -> list[float]:
    """What the simplest code says: one item, compressed at once, its questions asked one by one."""
    s = setup(sinks=4, window=16)
    item = build(tokenizer, s, unit(task=task, items=(seed,)))[0]
    cache = make_cache(model, s, variant, budget, 0, When())
    with torch.inference_mode():
        model(torch.tensor([item.context]), **{CACHE: cache})
    cache.compressing = False
    return [tasks.score(model, tokenizer, cache.copy(), question).value for question in item.item.questions]


@pytest.mark.parametrize("task", ["niah-multikey-1", "variable-tracking", "secret"])
def test_a_batch_scores_as_each_item_does_alone(task: str, loaded: Any) -> None:
    one = unit(task=task, variant=Variant("keydiff"), budgets=(120, 200))
    found = run(*loaded, setup(), one, build(loaded[1], setup(), one))
    assert [row.seed for row in found.items] == [*one.items, *one.items]
    for row in found.items:
        assert row.scores == alone(*loaded, task, row.seed, one.variant, row.budget)


@pytest.mark.parametrize("method", EVERY_METHOD)
def test_one_prefill_for_all_budgets_keeps_what_compressing_at_once_keeps(method: str, loaded: Any) -> None:
    model, tokenizer = loaded
    one = unit(variant=of_method(method, model), items=(HELD_OUT,))
    [item] = build(tokenizer, setup(), one)
    ids = torch.tensor([item.context])
    with torch.inference_mode():
        shared = make_cache(model, setup(), one.variant, 1.0, 0, When("deferred"))
        model(ids, **{CACHE: shared})
        for budget in (64, 100):
            once = make_cache(model, setup(), one.variant, budget, 0, When())
            model(ids, **{CACHE: once})
            mine = within(shared, one, budget)
            for layer in range(len(once.layers)):
                assert torch.equal(mine.kept_positions(layer), once.kept_positions(layer))
    assert not shared.report().compressed  # the copies left it alone


@pytest.mark.parametrize(("method", "mode"), sampled(2, EVERY_METHOD, ["agnostic", "aware"]))
def test_the_whole_budget_scores_as_the_full_cache(method: str, mode: str, loaded: Any) -> None:
    whole = unit(variant=of_method(method, loaded[0]), budgets=(1.0,), mode=mode, items=(HELD_OUT,), task="qa-1")
    items = build(loaded[1], setup(), whole)
    full = run(*loaded, setup(), replace(whole, variant=FULL), items).items
    mine = run(*loaded, setup(), whole, items).items
    assert [row.replies for row in mine] == [row.replies for row in full]


def test_shares_of_bytes_are_equal_for_every_method(loaded: Any) -> None:
    for method in EVERY_METHOD[::4]:
        one = unit(variant=of_method(method, loaded[0]), length=400, budgets=("25%bytes",))
        rows = run(*loaded, setup(), one, build(loaded[1], setup(), one)).items
        # Statistics of a score that are in use while decoding only are gone; per-row state is a few queries at most.
        assert all(0.9 * 0.25 < row.ratio <= 0.25 * 1.03 for row in rows), (method, rows[0].ratio)


def test_a_bare_share_is_one_of_the_tokens_as_everywhere(loaded: Any) -> None:
    """Before: of the bytes here, of the tokens in every other verb and in ``Cache``."""
    model, tokenizer = loaded
    one = unit(variant=Variant("keepkv"), items=(HELD_OUT,), budgets=(0.25,))
    [item] = items = build(tokenizer, setup(), one)
    [row] = run(model, tokenizer, setup(), one, items).items
    assert row.slots == len(item.context) // 4
    assert setup(budgets=("25%", 0.25, "20 % of bytes", 64)).budgets == (0.25, "20%bytes", 64)


def test_bare_shares_of_earlier_versions_are_read_as_what_they_were(tmp_path: Any, loaded: Any) -> None:
    evaluate(*loaded, setup(budgets=("25%bytes",)), tmp_path)
    for name in (ITEMS, "speed.jsonl", "maps.jsonl", "run.json"):
        text = (tmp_path / name).read_text().replace('"25%bytes"', "0.25").replace(' "shares": "tokens",\n', "")
        (tmp_path / name).write_text(text)
    assert '"shares"' not in (tmp_path / "run.json").read_text()
    assert {cell.budget for cell in summarise(tmp_path)} == {1.0, "25%bytes"}
    found = read(tmp_path)
    assert found.run.budgets == ["25%bytes"] and {row.budget for row in found.maps} == {1.0, "25%bytes"}
    with pytest.raises(KeepKVError, match="earlier version"):
        evaluate(*loaded, setup(budgets=("25%bytes",)), tmp_path)


def test_turns_are_one_conversation(loaded: Any) -> None:
    model, tokenizer = loaded
    one = unit(task="shared-context", items=(HELD_OUT,), budgets=(100,))
    [item] = items = build(tokenizer, setup(), one)
    [row] = run(model, tokenizer, setup(), one, items).items
    cache = make_cache(model, setup(), one.variant, 100, 0, When())
    with torch.inference_mode():
        model(torch.tensor([item.context]), **{CACHE: cache})
        cache.compressing = False
        last: list[int] = []
        for question, reply in zip(item.item.questions, row.replies, strict=True):
            fed = last + tokenizer.encode(question.prompt, add_special_tokens=False)
            said: list[int] = []
            while len(said) < len(tokenizer.encode(question.answer, add_special_tokens=False)):
                logits = model(torch.tensor([fed]), **{CACHE: cache}).logits
                said.append(int(logits[0, -1].argmax()))
                fed = said[-1:]
            last = said[-1:]
            assert tokenizer.decode(said) == reply


def test_the_question_is_seen_where_the_mode_says_so(loaded: Any) -> None:
    """SnapKV's window ends in the question: with it, what is asked for survives."""
    scores = {}
    for mode in ("agnostic", "aware"):
        one = unit(
            variant=Variant("snapkv"),
            mode=mode,
            length=500,
            budgets=(0.15,),
            items=tuple(range(HELD_OUT, HELD_OUT + 3)),
        )
        rows = run(*loaded, setup(), one, build(loaded[1], setup(), one)).items
        scores[mode] = sum(row.score or 0.0 for row in rows)
    assert scores["aware"] > scores["agnostic"] + 1


def test_long_replies_are_compressed_while_they_grow(loaded: Any) -> None:
    one = unit(task="long-decode", mode="decode", variant=Variant("tova"), length=120, budgets=(40,))
    found = run(*loaded, setup(every=4), one, build(loaded[1], setup(), one))
    assert all(row.compressed and (row.slots or 0) <= 40 + 4 for row in found.items)


def test_a_row_that_was_not_compressed_fails_aloud(tmp_path: Any, loaded: Any) -> None:
    short = setup(budgets=(5000,), items=1)
    found = evaluate(*loaded, short, tmp_path)
    assert [cell.failed for cell in found if cell.method != "full"] == [1, 1, 1]
    assert "compressed nothing" in (found[-1].error or "")


def test_failed_items_are_counted_and_do_not_take_others_with_them(tmp_path: Any, loaded: Any) -> None:
    def build(rng: random.Random, count: Any, length: int) -> Item:
        number = rng.randrange(1000, 9999)
        prompt = "\nWhat is it?" if number % 2 else ""  # an empty prompt cannot be answered
        return Item(f"The code is {number}. " * 8, (Question(prompt, f" {number}"),))

    task = tasks.register(Task("half-broken", "for this test", build))
    try:
        found = evaluate(*loaded, setup(tasks=(task.name,), items=6, batch=3, budgets=(0.5,)), tmp_path)
    finally:
        tasks._TASKS.pop(task.name)
    for cell in found:
        assert cell.n + cell.failed == 6 and 0 < cell.failed < 6, cell
    assert len(list(read_lines(tmp_path, ITEMS))) == total(setup(items=6, budgets=(0.5,)))


def test_what_was_run_item_by_item_is_found_again(tmp_path: Any, loaded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A unit with a failure is recorded in pieces: resuming keeps them all."""
    monkeypatch.setattr(environment, "revision", lambda: None)

    def build(rng: random.Random, count: Any, length: int) -> Item:
        number = rng.randrange(1000, 9999)
        return Item(f"The code is {number}. " * 8, (Question("\nWhat is it?" if number % 2 else "", f" {number}"),))

    task = tasks.register(Task("half-broken", "for this test", build))
    try:
        for _ in range(2):
            evaluate(*loaded, setup(tasks=(task.name,), items=6, batch=3, budgets=(0.5,)), tmp_path)
            speed = list(read_lines(tmp_path, "speed.jsonl"))
            assert any(len(row["seeds"]) == 1 for row in speed)
            scored = [row for row in read_lines(tmp_path, ITEMS) if row["error"] is None]
            assert sum(len(row["seeds"]) for row in speed) == len(scored)
    finally:
        tasks._TASKS.pop(task.name)


def test_a_length_that_a_task_cannot_make_is_refused_before_anything_is_run(tmp_path: Any, loaded: Any) -> None:
    """Before: a table of rows that failed, and the reason after it."""
    with pytest.raises(KeepKVError, match=r"task niah-multikey-1 of 12 tokens: \d+ facts need"):
        evaluate(*loaded, setup(lengths=(256, 12), items=1), tmp_path / "none")
    assert not (tmp_path / "none" / "run.json").exists()


def test_what_makes_results_say_less_is_said() -> None:
    """Before: 25 slots, 20 of them the same for every method, and a table of 4 items, without a word."""
    pinned, few = setup(budgets=("10%bytes", 0.5), items=4).doubts()
    assert "of 256 tokens, a budget of 10% of the bytes is about 25 slots per head, of which 20 are the same" in pinned
    assert "methods differ in 5." in pinned and few.startswith(
        "4 items of each task: a score near 50 % is known to ± 35"
    )
    assert not setup(budgets=(0.5, 64), items=25).doubts() and not setup(budgets=(0.1,), items=25, window=None).doubts()
    assert len(setup(budgets=(30,), items=25).doubts()) == 1


def test_cells_pair_each_item_with_the_full_cache() -> None:
    def item(method: str, seed: int, score: float | None, **more: Any) -> ItemRow:
        budget = 1.0 if method == "full" else 0.25
        return ItemRow(
            task="t", length=9, mode="agnostic", method=method, budget=budget, seed=seed, score=score, **more
        )

    scores = {"full": [1.0, 0.5, 1.0], "random": [0.0, 0.5, 0.5]}
    rows = [item(method, i, x, ratio=0.25) for method, values in scores.items() for i, x in enumerate(values)]
    rows.append(item("random", 3, None, error="TaskError: no"))
    took = {"peak_bytes": 7, "prefill_s": 2.0, "answer_s": 4.0, "tokens_read": 100, "tokens_written": 8}
    speed = [SpeedRow(task="t", length=9, mode="agnostic", method="full", budget=1.0, **took)]
    made_with = MadeWith(device="cpu", dtype="float32", versions={"keepkv": "0"})
    run = Run(
        model="m", tasks=["t"], lengths=[9], modes=["agnostic"], methods=["full", "random"], budgets=[0.25], items=4,
        seeds=[5], environment=made_with,
    )  # fmt: skip
    full, mine = cells(rows, speed, run)
    assert (full.score, full.minus_full, full.failed, full.peak_bytes) == (2.5 / 3, 0, 0, 7)
    assert (full.read_per_s, full.written_per_s, full.seed, full.made_with) == (50, 2, [5], made_with)
    assert mine.n == 3 and mine.failed == 1 and mine.error == "TaskError: no" and mine.ratio == 0.25
    assert mine.minus_full == pytest.approx((-1 + 0 - 0.5) / 3) and mine.read_per_s is None
    assert mine.minus_full_low is not None and mine.minus_full_high is not None
    assert -1 <= mine.minus_full_low <= (mine.minus_full or 0) <= mine.minus_full_high <= 0


def test_every_row_says_what_it_was_made_with(tmp_path: Any, loaded: Any) -> None:
    found = evaluate(*loaded, setup(items=1, modes=("agnostic",)), tmp_path)
    for cell in found:
        assert cell.made_with == MadeWith.of(loaded[0], "embedded") and cell.seed == [0]
        assert cell.ratio and cell.bytes and cell.read_per_s and cell.written_per_s
    assert [cell.method for cell in found] == ["full", "random", "snapkv", "keepkv"]
    assert json.loads((tmp_path / "run.json").read_text())["methods"] == ["full", "random", "snapkv", "keepkv"]
    header = (tmp_path / "cells.csv").read_text().splitlines()[0]
    assert "score,low,high,minus_full" in header and "torch" in header


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": ("nonsense",)}, "nonsense"),
        ({"modes": ("sideways",)}, "sideways"),
        ({"budgets": ()}, "budgets"),
        ({"budgets": (1.5,)}, "1.5"),
        ({"items": 0}, "at least 1"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_is_read(changes: dict[str, Any], message: str) -> None:
    with pytest.raises((KeepKVError, TaskError), match=message):
        setup(**changes)


def test_survival_is_of_the_first_row(loaded: Any) -> None:
    one = unit(budgets=(50,))
    found = run(*loaded, setup(), one, build(loaded[1], setup(), one))
    [held] = found.maps
    heads = [count for layer in held.kept for count in layer]
    assert sum(held.survival) == pytest.approx(sum(heads) / len(heads), abs=0.05)
    assert held.survival[:4] == [1.0] * 4 and len(held.tokens) == len(held.survival)
    assert isinstance(keepkv.Cache(loaded[0], "full").layers[0], Layer)
