"""Benchmarks of others: their records become items in their own words, and replies get their own scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from keepkv import tasks
from keepkv.errors import KeepKVError, UnknownName
from keepkv.metrics import boxed, infinitebench, longbench, summary
from keepkv.metrics.f1 import word_f1
from keepkv.metrics.instructions import RULES, follows
from keepkv.tasks.files import BENCHMARKS
from keepkv.tasks.files.longbench import LIMITS, METRICS, PROMPTS

LONGBENCH = {
    "input": "Who keeps the lighthouse?",
    "context": "The lighthouse is kept by Ada Lovelace. {input} is no field here.",
    "answers": ["Ada Lovelace", "Lady Lovelace"],
    "length": 12,
    "dataset": "hotpotqa",
    "language": "en",
    "all_classes": None,
    "_id": "0d1e",
}
TREC = {**LONGBENCH, "input": "Question: What is a fox?\nType:", "answers": ["Animal"], "dataset": "trec"} | {
    "all_classes": ["Animal", "City", "Date"]
}
V2 = {
    "_id": "66eb",
    "domain": "Single-Document QA",
    "sub_domain": "Literary",
    "difficulty": "hard",
    "length": "medium",
    "question": "What burns? ",
    "choice_A": "The oil",
    "choice_B": "The wick",
    "choice_C": "Nothing",
    "choice_D": "All",
    "answer": "B",
    "context": " A lamp burns.\n",
}
INFINITE = {
    "passkey": {
        "id": 0,
        "context": "The grass is green. The pass key is 71432. The sky is blue.",
        "input": "What is the pass key?",
        "answer": ["71432"],
        "options": [],
    },
    "longbook_choice_eng": {
        "id": 1,
        "context": "Call me Ishmael.",
        "input": "Who speaks?",
        "answer": ["Ishmael"],
        "options": ["Ahab", "Queequeg", "Ishmael", "Starbuck"],
    },
    "math_find": {
        "id": 2,
        "context": "[1, 9, 4]",
        "input": "You should answer with only one number. The largest number of the above list is:",
        "answer": [9],
        "options": [],
    },
    "code_run": {
        "id": 3,
        "context": "def func_1(x):\n    return x + 2",
        "input": "Please give me the exact number of the return value of func_1(-5).",
        "answer": [-3],
        "options": [],
    },
    "math_calc": {"id": 4, "context": "1 + 2 - 3", "input": "", "answer": [[1, 3, 0]], "options": []},
}
AIME = {"id": 60, "problem": "Find $x$.", "answer": "025", "solution": "So $\\boxed{025}$.", "url": "https://"}
MATH = {
    "problem": "Compute $\\tfrac12+\\tfrac14$.",
    "solution": "It is $\\boxed{\\frac{3}{4}}$.",
    "answer": "\\frac{3}{4}",
    "subject": "Algebra",
    "level": 2,
    "unique_id": "test/algebra/1.json",
}
IFEVAL = {
    "key": 1000,
    "prompt": "Write about rivers. No commas. Highlight at least 2 sections.",
    "instruction_id_list": ["punctuation:no_comma", "detectable_format:number_highlighted_sections"],
    "kwargs": [{"num_highlights": None}, {"num_highlights": 2, "relation": None}],
}


def lines(place: Path, *records: dict[str, Any]) -> Path:
    place.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return place


def value(item: Any, reply: str) -> float:
    metric = item.questions[0].metric
    assert metric is not None
    return float(metric(reply))


def test_longbench_item_and_score(tmp_path: Path) -> None:
    task = tasks.open("longbench:hotpotqa", lines(tmp_path / "hotpotqa.jsonl", LONGBENCH, LONGBENCH))
    item = task.generate(lambda text: len(text), 10_000, 1_000_000)
    before, after = PROMPTS["hotpotqa"]
    assert item.context == before + LONGBENCH["context"] and task.size == 2
    [asked] = item.questions
    assert asked.prompt == after.replace("{input}", LONGBENCH["input"]) and asked.limit == 32
    assert value(item, "The Lady Lovelace!") == 1 and value(item, "Ada") == pytest.approx(2 / 3)
    assert value(item, "Grace Hopper") == 0


def test_few_shot_replies_count_up_to_their_first_line(tmp_path: Path) -> None:
    item = tasks.open(f"longbench:trec={lines(tmp_path / 'trec.jsonl', TREC)}").item(0)
    assert value(item, "\nAnimal\nQuestion: What is Rome?\nType: City") == 1
    assert value(item, "Animal or City") == 0.5 and value(item, "City") == 0


def test_every_part_of_longbench_has_prompt_limit_and_metric() -> None:
    assert len(PROMPTS) == 21 and set(PROMPTS) == set(LIMITS) == set(METRICS)


def test_a_directory_and_a_list_are_read_too(tmp_path: Path) -> None:
    lines(tmp_path / "qasper.jsonl", LONGBENCH)
    assert tasks.get(f"longbench:qasper={tmp_path}").size == 1
    (tmp_path / "data.json").write_text(json.dumps([V2, V2, V2]), encoding="utf-8")
    task = tasks.open("longbench-v2", tmp_path / "data.json")
    assert task.size == 3


def test_parquet_is_read(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow", reason="pyarrow is in the extra eval")
    from pyarrow.parquet import write_table

    write_table(arrow.Table.from_pylist([V2, V2]), tmp_path / "v2.parquet")
    assert tasks.open("longbench-v2", tmp_path / "v2.parquet").item(1).questions[0].answer == " B"
    (tmp_path / "not.parquet").write_text("text", encoding="utf-8")
    with pytest.raises(tasks.TaskError, match="not a parquet"):
        tasks.open("longbench-v2", tmp_path / "not.parquet")


def test_longbench_v2_asks_for_a_letter(tmp_path: Path) -> None:
    item = tasks.open("longbench-v2", lines(tmp_path / "v2.jsonl", V2)).item(0)
    assert item.context.endswith("<text>\nA lamp burns.") and item.questions[0].prompt.startswith(
        "\n</text>\n\nWhat is"
    )
    assert "(C) Nothing\n(D) All\n\n" in item.questions[0].prompt and item.tags == {"hard": 1.0, "size": 1.0}
    assert value(item, "**The correct answer is (B)**") == value(item, "The correct answer is B") == 1
    assert value(item, "The correct answer is (A)") == value(item, "B") == 0


@pytest.mark.parametrize(
    ("part", "right", "wrong"),
    [
        ("passkey", " 71432.", " 7143"),
        ("longbook_choice_eng", " C. Ishmael", " A"),
        ("math_find", " 9, I think", " 4"),
        ("code_run", " -3", " 3"),
        ("math_calc", " [1, 3, 0]", " [2, 3, 0]"),
    ],
)
def test_infinitebench(part: str, right: str, wrong: str, tmp_path: Path) -> None:
    item = tasks.open(f"infinitebench:{part}", lines(tmp_path / "a.jsonl", INFINITE[part])).item(0)
    assert item.context.endswith(str(INFINITE[part]["context"])) and "{" not in item.questions[0].prompt
    assert value(item, right) == 1 and value(item, wrong) == 0


def test_infinitebench_words_its_questions(tmp_path: Path) -> None:
    made = {
        part: tasks.open(f"infinitebench:{part}", lines(tmp_path / f"{part}.jsonl", record)).item(0)
        for part, record in INFINITE.items()
    }
    assert made["math_find"].context.startswith("What is the largest number in the following list?\n\n[1")
    assert made["code_run"].questions[0].prompt.endswith("The value of func_1(-5) is")
    assert "B. Queequeg\nC. Ishmael" in made["longbook_choice_eng"].questions[0].prompt
    assert value(made["math_calc"], "[1, 3, 5]") == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("name", "record", "right", "wrong"),
    [
        ("aime:2024", AIME, "so \\boxed{25}", "so 25"),
        ("aime:2025", {"ID": "1", "Problem": "Find x.", "Answer": 25}, "\\boxed{025}", "\\boxed{24}"),
        ("math-500", MATH, "first \\boxed{1}, then \\boxed{\\dfrac34}", "\\boxed{\\frac{3}{4}} or \\boxed{1}"),
    ],
)
def test_mathematics_is_boxed(name: str, record: dict[str, Any], right: str, wrong: str, tmp_path: Path) -> None:
    task = tasks.open(name, lines(tmp_path / "a.jsonl", record))
    assert task.decodes and task.item(0).questions[0].prompt.endswith("\\boxed{}.")
    assert value(task.item(0), right) == 1 and value(task.item(0), wrong) == 0


def test_ifeval_counts_the_instructions_followed(tmp_path: Path) -> None:
    item = tasks.open("ifeval", lines(tmp_path / "a.jsonl", {**IFEVAL, "context": "A long text."})).item(0)
    assert item.context == f"A long text.\n\n{IFEVAL['prompt']}"
    no_comma, highlights = item.questions[0].checks
    assert no_comma.strict("No comma") and not no_comma.strict("One, comma")
    assert highlights.strict("*one* and *two*") and not highlights.strict("*one*")
    with pytest.raises(UnknownName, match="no_comma"):
        tasks.open(
            "ifeval", lines(tmp_path / "b.jsonl", {**IFEVAL, "instruction_id_list": ["punctuation:no_coma"] * 2})
        ).item(0)


RULE_CASES: dict[str, tuple[dict[str, Any], str, str]] = {
    "keywords:existence": ({"keywords": ["fox", "owl"]}, "Fox and owl", "fox"),
    "keywords:frequency": ({"keyword": "fox", "relation": "at least", "frequency": 2}, "fox, fox", "fox"),
    "keywords:forbidden_words": ({"forbidden_words": ["owl"]}, "owls", "an owl"),
    "keywords:letter_frequency": ({"letter": "q", "let_relation": "less than", "let_frequency": 2}, "q", "Qq"),
    "length_constraints:number_sentences": ({"relation": "at least", "num_sentences": 2}, "One. Two!", "One"),
    "length_constraints:number_paragraphs": ({"num_paragraphs": 2}, "a\n***\nb", "a\n***\n***\nb"),
    "length_constraints:number_words": ({"relation": "less than", "num_words": 3}, "a b", "a b c"),
    "length_constraints:nth_paragraph_first_word": (
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "owl"}, "A fox.\n\n'Owl' it is", "owl"
    ),
    "detectable_content:number_placeholders": ({"num_placeholders": 1}, "to [name]", "to name"),
    "detectable_content:postscript": ({"postscript_marker": "P.S."}, "x\nP. S. y", "x PS y"),
    "detectable_format:number_bullet_lists": ({"num_bullets": 2}, "* a\n- b", "* a"),
    "detectable_format:constrained_response": ({}, "My answer is no.", "No."),
    "detectable_format:number_highlighted_sections": ({"num_highlights": 1}, "*a*", "**"),
    "detectable_format:multiple_sections": (
        {"section_spliter": "Section", "num_sections": 2}, "Section 1 a Section 2 b", "Section 1"
    ),
    "detectable_format:json_format": ({}, '```json\n{"a": 1}\n```', "{a}"),
    "detectable_format:title": ({}, "<<a title>>", "<< >>"),
    "combination:two_responses": ({}, "a ****** b", "a ****** a"),
    "combination:repeat_prompt": ({"prompt_to_repeat": "Say a"}, "say A: b", "b, say a"),
    "startend:end_checker": ({"end_phrase": "The end."}, "x. the end.", "The end. x"),
    "startend:quotation": ({}, '"a"', '"a'),
    "change_case:capital_word_frequency": (
        {"capital_relation": "at least", "capital_frequency": 2}, "A fox IS", "A fox is"
    ),
    "change_case:english_capital": ({}, "FOX 1", "Fox"),
    "change_case:english_lowercase": ({}, "fox", "Fox"),
    "punctuation:no_comma": ({}, "a b", "a, b"),
}  # fmt: skip


@pytest.mark.parametrize("name", RULE_CASES)
def test_instructions(name: str) -> None:
    arguments, right, wrong = RULE_CASES[name]
    assert follows(right, name, arguments) and not follows(wrong, name, arguments)
    assert not follows(" ", name, arguments)


def test_every_instruction_has_a_case() -> None:
    assert set(RULES) - set(RULE_CASES) == {"language:response_language"}  # needs langdetect


def test_summaries_as_the_two_packages_score_them() -> None:
    """Values of rouge 1.0.1 and rouge_score 0.1.2 on the same texts."""
    reply, reference = (
        "the river runs. The fox sleeps near the river.\nIt is cold.",
        "A fox sleeps. the cold river runs",
    )
    assert summary.rouge_l_f(reply, reference) == pytest.approx(0.70588235, abs=1e-7)
    assert summary.rouge_lsum(reply, reference) == pytest.approx(10 / 19, abs=1e-12)
    assert summary.rouge_l_f("", "a") == summary.rouge_l_f(".", "a") == summary.rouge_lsum("", "a") == 0


def test_metrics_at_their_edges() -> None:
    assert longbench.share_of_numbers("Paragraph 3, not 12", "Paragraph 12") == 0.5
    assert longbench.code_similarity("# a\nx = 1", "x = 1") == 1 and longbench.code_similarity("", "x") == 0
    assert word_f1("the", "the") == 0  # nothing is left of either
    assert infinitebench.bug("The answer is: fetch", ("fetch", "C")) == infinitebench.bug("C.", ("fetch", "C")) == 1
    assert infinitebench.last_integer("", 3) == infinitebench.last_integer("three", 3) == 0
    assert boxed.boxed("\\boxed{\\frac{1}{2}") is None and boxed.boxed("\\boxed{a{b}c}") == "a{b}c"
    assert boxed.equal("x=\\frac12", "1/2") and boxed.equal("10,000", "10000") and not boxed.equal("1", "-1")


def test_long_contexts_lose_their_middle(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from keepkv.embedded import embedded_model

    tokenizer = AutoTokenizer.from_pretrained(embedded_model())
    long = {**LONGBENCH, "context": "".join(f" Line {i} of the story." for i in range(400))}
    task = tasks.open("longbench:narrativeqa", lines(tmp_path / "a.jsonl", long))
    for length in (100, 101, 333):
        context = task.generate(tokenizer, length, 0).context
        assert length - 3 <= len(tokenizer.encode(context, add_special_tokens=False)) <= length
        assert context.startswith("You are given a story") and context.endswith("Line 399 of the story.")
        assert len(task.generate(lambda text: len(text.encode()), length, 0).context.encode()) in (length - 1, length)


def test_what_cannot_be_opened_says_why(tmp_path: Path) -> None:
    good = lines(tmp_path / "good.jsonl", LONGBENCH)
    (tmp_path / "bad.jsonl").write_text('{"a": 1}\n{"a":', encoding="utf-8")
    (tmp_path / "empty.json").write_text("[]", encoding="utf-8")
    cases = {
        "longbench": "several parts",
        "longbench:qaspar": "Did you mean 'qasper'",
        f"longbench-v2:x={good}": "no parts",
        f"longbench:qasper={tmp_path}": "directory without qasper.jsonl",
        f"longbench:qasper={tmp_path}/none.jsonl": "No such file",
        f"longbench:qasper={tmp_path}/bad.jsonl": "line 2",
        f"longbench:qasper={tmp_path}/empty.json": "no list of records",
        f"longbench:qasper={tmp_path}/a.txt": "supported are",
        "longbrench:qasper": "Did you mean .longbench",
    }
    for name, message in cases.items():
        with pytest.raises(KeepKVError, match=message):
            tasks.get(name)
    with pytest.raises(KeepKVError, match="has 1 items, and item 2"):
        tasks.get(f"longbench:qasper={good}").generate(len, 9, 1)
    with pytest.raises(KeepKVError, match="no field 'Problem'"):
        tasks.open("math-500", good).item(0)
    with pytest.raises(KeepKVError, match="takes no options"):
        tasks.open("longbench:qasper", good).generate(len, 9, 0, depth=1)


def test_without_a_path_records_come_from_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr("keepkv.tasks.files.download", lambda *place: asked.append(place) or [LONGBENCH])
    for name in ("longbench:lcc", "longbench-v2", "infinitebench:passkey", "aime:2025", "math-500", "ifeval"):
        assert tasks.open(name).size == 1
    assert asked[0] == ("THUDM/LongBench", "lcc", "test") and len({place[0] for place in asked}) == 6
    others = set(BENCHMARKS) - {"longbench", "longbench-v2", "infinitebench", "aime", "math-500", "ifeval"}
    assert others == {"vlm"}  # which takes files alone
    from keepkv.tasks.files import _opened

    _opened.cache_clear()


def test_the_runner_evaluates_files(tmp_path: Path) -> None:
    """What the embedded model can find in the context it says, and the metric of the benchmark scores it."""
    from keepkv.cli.load import load
    from keepkv.evaluation.runner import evaluate
    from keepkv.evaluation.setup import Setup, Variant

    model, tokenizer = load(None, "cpu")
    made = [tasks.get("niah-single-2").generate(tokenizer, 300, seed) for seed in range(3)]
    records = [
        {**LONGBENCH, "context": item.context, "input": asked.prompt.strip(), "answers": [asked.answer.strip()]}
        for item in made
        for asked in item.questions
    ]
    name = f"longbench:triviaqa={lines(tmp_path / 'a.jsonl', *records)}"
    setup = Setup("embedded", (name,), (Variant("keydiff"),), (0.3,), lengths=(4096,), items=3)
    (tmp_path / "run").mkdir()
    cells = {cell.method: cell for cell in evaluate(model, tokenizer, setup, tmp_path / "run")}
    assert cells["full"].score == pytest.approx(1) and cells["keydiff"].ratio < 0.31
    assert cells["keydiff"].failed == 0 and cells["keydiff"].n == 3
    with pytest.raises(KeepKVError, match="has 3 items, and 4 were asked"):
        Setup("embedded", (name,), (), (0.3,), items=4)


def test_a_batch_ends_when_every_reply_has(tmp_path: Path) -> None:
    import keepkv
    from keepkv.cli.load import load
    from keepkv.tasks.asking import encode, read, reply

    model, tokenizer = load(None, "cpu")
    items = [encode(tokenizer, tasks.get("niah-single-2").generate(tokenizer, 200 + 40 * i, i)) for i in range(2)]
    prompts, newline = [item.asked[0].prompt for item in items], tokenizer.encode("\n", add_special_tokens=False)[0]
    said = []
    for end in (None, newline):
        cache = keepkv.Cache(model, "full")
        said.append(reply(model, cache, read(model, cache, [item.context for item in items]), prompts, 12, end)[0])
    whole, ended = (x.tolist() for x in said)
    length = max(row.index(newline) for row in whole) + 1
    assert ended == [row[:length] for row in whole] and length < 12
