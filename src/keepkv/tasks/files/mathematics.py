r"""AIME 2024 and 2025, and MATH-500: short problems, long reasoning, one answer in ``\boxed{}``.

Records as on the hub: problem, answer, solution (math-ai/aime24, math-ai/aime25, HuggingFaceH4/MATH-500 with subject
and level), or Problem and Answer (Maxwell-Jia/AIME_2024). What fills the cache is the model's own reasoning, so methods
compress while it decodes.
"""

from __future__ import annotations

from keepkv.metrics.boxed import boxed, boxed_equals
from keepkv.tasks.base import Item
from keepkv.tasks.files.base import Benchmark, question
from keepkv.tasks.files.records import Record

INSTRUCTION = "\n\nPlease reason step by step, and put your final answer within \\boxed{}."


def make(record: Record, part: str, limit: int) -> Item:
    """The problem, and the request for a boxed answer. Tag: ``level`` of MATH-500."""
    problem = record["problem"] if "problem" in record else record["Problem"]
    given = next((record[name] for name in ("answer", "Answer") if record.get(name) is not None), None)
    answer = boxed(record["solution"]) if given is None else boxed(str(given)) or str(given)
    if answer is None:
        raise ValueError("neither an answer nor a boxed one in the solution")
    tags = {"level": float(record["level"])} if "level" in record else {}
    return Item(problem.strip(), (question(INSTRUCTION, [answer.strip()], boxed_equals, limit),), tags=tags)


_AIME = {"2024": "math-ai/aime24", "2025": "math-ai/aime25"}
AIME = Benchmark(
    "aime",
    "thirty competition problems of a year",
    lambda record, part: make(record, part, 32_768),
    lambda part: (_AIME[part], None, "test"),
    tuple(_AIME),
    decodes=True,
)
MATH_500 = Benchmark(
    "math-500",
    "500 problems of MATH (arXiv 2103.03874)",
    lambda record, part: make(record, part, 8_192),
    lambda part: ("HuggingFaceH4/MATH-500", None, "test"),
    decodes=True,
)
