"""LongBench v2 (arXiv 2412.15204): 503 questions with four options each.

Records as in ``data.json`` of THUDM/LongBench-v2: context, question, choice_A to choice_D, answer (a letter), domain,
sub_domain, difficulty (easy, hard), length (short, medium, long). The prompt is its ``prompts/0shot.txt``.
"""

from __future__ import annotations

from keepkv.metrics.longbench import letter
from keepkv.tasks.base import Item
from keepkv.tasks.files.base import Benchmark, question
from keepkv.tasks.files.records import Record


def make(record: Record, part: str) -> Item:
    """The text, and the question with its options. Tags: ``hard``, and ``size`` 0, 1 or 2."""
    options = "\n".join(f"({name}) {record[f'choice_{name}'].strip()}" for name in "ABCD")
    prompt = (
        f"\n</text>\n\nWhat is the correct answer to this question: "
        f"{record['question'].strip()}\nChoices:\n{options}\n\n"
        'Format your response as follows: "The correct answer is (insert answer here)".'
    )
    context = f"Please read the following text and answer the question below.\n\n<text>\n{record['context'].strip()}"
    sizes = ("short", "medium", "long")
    tags = {"hard": float(record.get("difficulty") == "hard")}
    if record.get("length") in sizes:
        tags["size"] = float(sizes.index(record["length"]))
    return Item(context, (question(prompt, [record["answer"]], letter, 128),), tags=tags)


BENCHMARK = Benchmark(
    "longbench-v2",
    "questions with four options about long texts (arXiv 2412.15204)",
    make,
    lambda part: ("THUDM/LongBench-v2", None, "train"),
)
