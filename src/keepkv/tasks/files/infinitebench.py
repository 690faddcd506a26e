"""InfiniteBench (arXiv 2402.13718): twelve data sets with contexts of 100 thousand tokens and more.

Records as in ``NAME.jsonl`` of xinrongzhang2022/InfiniteBench: id, context, input, answer (a list), options. Prompts
and reply lengths are those that its ``prompt.py`` and ``eval_utils.py`` give open models (YaRN-Mistral).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from keepkv.metrics import infinitebench as metrics
from keepkv.metrics.f1 import character_f1, word_f1
from keepkv.metrics.summary import rouge_lsum
from keepkv.tasks.base import Item
from keepkv.tasks.files.base import Benchmark, question
from keepkv.tasks.files.records import Record

_OPTIONS = "A. {A}\nB. {B}\nC. {C}\nD. {D}\n\n"

# Before the context, after it, tokens of a reply, metric of a reply and one answer.
PARTS: dict[str, tuple[str, str, int, Callable[[str, Any], float]]] = {
    "passkey": (
        "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. I will quiz you "
        "about the important information.\n\n",
        "\n\n{input}\n\nThe pass key is",
        6,
        metrics.first_integer,
    ),
    "number_string": (
        "There is an important info hidden inside a lot of irrelevant text. Find it. I will quiz you about the "
        "important information there.\n\n",
        "\n\n{input}\n\nThe sequence of digits is",
        12,
        metrics.first_integer,
    ),
    "kv_retrieval": (
        "Extract the value corresponding to the specified key in the JSON object below.\n\n",
        "\n\n{input}",
        50,
        metrics.word,
    ),
    "longbook_sum_eng": ("Summarize the book below.\n\n", "\n\nSummary:", 1200, rouge_lsum),
    "longbook_choice_eng": (
        "Read the book and answer the question.\n\n",
        f"\n\nQuestion: {{input}}\n{_OPTIONS}The letter of the correct answer is",
        40,
        metrics.choice,
    ),
    "longbook_qa_eng": (
        "Read the book and answer the question. Be very concise in your answer.\n\n",
        "\n\nQuestion: {input}\nAnswer:",
        40,
        word_f1,
    ),
    "longbook_qa_chn": ("阅读以下书籍然后回答问题。\n\n", "\n\n问题：{input}\n答案：", 40, character_f1),
    "longdialogue_qa_eng": (
        "Below is a dialogue script where one random occurrence of a character name is replaced with \"$$MASK$$\", and "
        "you should try to guess who that character is.\n\n",
        "\n\nThe name that has been replaced with $$MASK$$ is likely",
        40,
        metrics.name,
    ),
    "math_find": ("{prefix}\n\n", "\n\n{input}", 3, metrics.first_number),
    "math_calc": (
        "Let us calculate the intermediate values of an expression.\n\nExpression: 1 + 3 + 4\nValues: [1, 4, 8]\n\n"
        "Expression: 8 - 3 + 2 - 4\nValues: [8, 5, 7, 3]\n\nExpression: ",
        "\nValues:",
        30_000,
        metrics.leading_run,
    ),
    "code_run": (
        "There is a function called {func} in the following Python code.\n\n",
        "\n\nPlease compute the exact value of {call}. The value of {call} is",
        5,
        metrics.last_integer,
    ),
    "code_debug": (
        "Following is a Python code where exactly one of the functions/methods has a deliberate error that makes it "
        "crash.\n\n",
        f"\n\nOptions:\n{_OPTIONS}The correct option is:",
        5,
        metrics.bug,
    ),
}  # fmt: skip
_CHOICES = ("longbook_choice_eng", "code_debug")


def make(record: Record, part: str) -> Item:
    """The context, and the question in the words of InfiniteBench."""
    before, after, limit, metric = PARTS[part]
    fields = {"input": str(record["input"]), **_fields(record, part)}
    answers = _answers(record, part)

    asked = question(_fill(after, fields), answers, metric, limit)
    if part in _CHOICES:
        asked = replace(asked, answer=f" {answers[0][0]}")
    return Item(_fill(before, fields) + record["context"], (asked,))


def _fields(record: Record, part: str) -> dict[str, str]:
    if part in _CHOICES:
        return dict(zip("ABCD", map(str, record["options"]), strict=True))
    if part == "code_run":
        call = re.findall(r"func_[0-9]+\(-?[0-9]+\)", record["input"])[0]
        return {"call": call, "func": call.partition("(")[0]}
    if part == "math_find":  # "The largest number of ..." asks for "the largest number"
        target = re.findall(r"The .+ of", record["input"])[0].lower()[:-3]
        return {"prefix": f"What is {target} in the following list?"}
    return {}


def _answers(record: Record, part: str) -> list[Any]:
    """What a reply may be compared with: any of them is right."""
    answer = record["answer"]
    held = answer if isinstance(answer, list) else [answer]
    if not held:
        raise ValueError("no answer")
    if part in _CHOICES:
        if len(held) == 2 and held[1] in tuple("ABCD"):
            return [tuple(held)]
        return [(held[0], "ABCD"[record["options"].index(held[0])])]
    if part == "math_calc":
        return [held[0] if isinstance(held[0], list) else held]
    return held if part.startswith("longbook") else held[:1]


def _fill(template: str, fields: dict[str, str]) -> str:
    """In one pass: what a record says may hold braces itself."""
    return re.sub(r"\{(\w+)\}", lambda found: fields[found.group(1)], template)


BENCHMARK = Benchmark(
    "infinitebench",
    "twelve data sets beyond 100 thousand tokens (arXiv 2402.13718)",
    make,
    lambda part: ("xinrongzhang2022/InfiniteBench", None, part),
    tuple(PARTS),
)
