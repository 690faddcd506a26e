"""The study of the whole zoo: every method is in it or named as left out, and its tables are those of its rows."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.zoo.arms import FULL, OUT, STRONG, family, variants, zoo
from benchmarks.zoo.run import AGNOSTIC, AWARE, BUDGETS, Scored, measure
from benchmarks.zoo.tables import RESULTS, mean, rows_in, scores, table, winners
from benchmarks.zoo.texts import texts
from keepkv import embedded_model, tasks
from keepkv.evaluation.setup import HELD_OUT
from keepkv.measure.environment import MadeWith
from keepkv.methods.base import METHODS, make_method
from keepkv.methods.traits import YOURS
from keepkv.tasks.asking import encode
from keepkv.tasks.text import prose, sentences_of

MADE = MadeWith(model="small", device="cpu", dtype="bfloat16", versions={})


def row(arm: str, context: int, *right: list[bool], task: str = "qa-1", budgets: tuple[float, ...] = BUDGETS) -> Scored:
    return Scored(
        task=task, mode=AGNOSTIC, context=context, tokens=1024, arm=arm, questions=8, budgets=list(budgets),
        ratio=list(budgets), right=list(right), seed=[HELD_OUT + context, context], made_with=MADE,
    )  # fmt: skip


def test_every_method_is_an_arm_or_evicts_in_replies_alone_or_is_named_as_left_out() -> None:
    arms = {arm.partition(":")[0] for arm in zoo()}
    own = {name for name in METHODS if family(name) != YOURS}
    replies = {name for name in own - arms - set(OUT) - {FULL} if make_method(name, {}).prompt}
    assert arms | replies | set(OUT) | {FULL} == own and not arms & (replies | set(OUT))
    assert {"kvgrad", "curdkv", "keepkv2", "random", "protected-lru"} <= arms


def test_arms_that_need_a_calibration_are_left_out_without() -> None:
    found = variants((*zoo(), *STRONG), [])
    assert "keepkv3" in zoo() and "keepkv3" not in found and "kvzap" not in found
    assert found["kvzip:plus=true,allocate=pooled"].options == {"plus": True, "allocate": "pooled"}


def test_no_sentence_of_a_task_is_calibrated_on() -> None:
    told = {sentence.strip() for sentence in sentences_of(texts().replace("\n", "\n\n"))}
    assert len(told) > 1000 and not told & {sentence.strip() for sentence in prose()}


@pytest.mark.parametrize("mode", [AGNOSTIC, AWARE])
def test_an_arm_is_asked_what_the_full_cache_answers(mode: str) -> None:
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(embedded_model()).eval()
    tokenizer = AutoTokenizer.from_pretrained(embedded_model())
    item = encode(tokenizer, tasks.get("niah-multikey-1").generate(tokenizer, 640, HELD_OUT))
    wrong = replace(item.asked[1], answer=item.asked[0].answer)  # which the full cache cannot answer so
    item = replace(item, asked=(item.asked[0], wrong, item.asked[2]))
    arms = variants((FULL, "keepkv2", "random"), [])
    with torch.inference_mode():
        full, ours, chance = measure(
            model, tokenizer, item, arms, task="niah-multikey-1", mode=mode, context=0, made_with=MADE
        )
    assert full.questions == 3 and full.right == [[True, True]] and full.budgets == [1.0]
    assert ours.right[-1] == [True, True] and not all(chance.right[0])
    for one in (ours, chance):
        assert one.budgets == list(BUDGETS) and all(len(right) == 2 for right in one.right)
        assert one.ratio == pytest.approx(BUDGETS, rel=0.05)


def test_tasks_weigh_the_same_and_contexts_without_answers_do_not_count() -> None:
    no, yes = [False], [True]
    rows = [row("a", context, *[yes] * 4) for context in range(2)]
    rows += [row("a", context, *[no] * 4, task="qa-2") for context in range(6)] + [row("a", 2, *[[]] * 4)]
    rows += [row(FULL, context, yes, budgets=(1.0,)) for context in range(2)]
    found = scores(rows, 0.1)
    assert mean(found["a"]).value == 0.5 and {len(x) for x in found["a"].values()} == {2, 6}
    assert mean(found[FULL]).value == 1 and math.isnan(mean(scores(rows[:1], 0.1)["a"]).low)
    alone = scores([*rows, row("a", 0, *[yes] * 4, task="common-words")], 0.1)
    assert alone["a"] == found["a"]  # one context tells no spread


def test_the_tables_say_who_wins() -> None:
    no, yes = [False], [True]
    rows = [row(arm, context, *([yes] * 4 if arm == "better" else [no] * 4))
            for arm in ("better", "same", "keepkv2", "random", "protected-lru") for context in range(3)]  # fmt: skip
    first = next(winners(rows))
    assert "Ahead of `keepkv2`: `better`." in first and "Level with it: `same`." in first
    assert "Not ahead of `random`, 1 of 2: `same`." in list(winners(rows))[1]
    assert table(rows)[2].startswith("| `better` | 100 [100, 100] |") and "**+100 [+100, +100]**" in table(rows)[2]


def test_rows_are_balanced_and_the_tables_are_of_them() -> None:
    rows = rows_in(RESULTS)
    page = (RESULTS / "tables.md").read_text(encoding="utf-8")
    full = {(x.made_with.model, x.mode, x.task, x.context): len(x.right[0]) for x in rows if x.arm == FULL}
    counts = Counter((x.made_with.model, x.mode, x.task, x.context) for x in rows)
    arms = {(x.made_with.model, x.arm) for x in rows}
    for place, known in full.items():
        assert counts[place] == (sum(model == place[0] for model, _ in arms) if known else counts[place])
    assert all(len(right) == full[x.made_with.model, x.mode, x.task, x.context] for x in rows for right in x.right)
    embedded = [x for x in rows if x.made_with.model == "embedded" and x.mode == AWARE]
    assert "\n".join(table(embedded)) in page and "\n".join(winners(embedded)) in page
